"""Rows to messages: the forms in which people write conversations, found by their keys."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from ..conversation.messages import Message, MessagesError, validate_messages
from ..text import did_you_mean
from .rows import DataError

# What the parts of a row are called, as `_plain` writes it; the first of each is the name that messages to the reader
# use.
PARTS = {
    "messages": "messages conversations conversation dialogue dialog dialogs contents turns chat items data".split(),
    "system": "system system_prompt system_message system_instruction 系统提示 系统提示词".split(),
    "history": ["history"],
    "question": "query instruction prompt question user human problem 问题 提问 问 指令".split(),
    "input": ["input", "输入"],
    "answer": "response output answer completion target assistant gpt bot reply 回答 答案 答 输出 回复".split(),
    "reasoning_content": "reasoning_content reasoning thinking".split(),
}
_PART_OF = {name: part for part, names in PARTS.items() for name in names}
_ROLES = {
    "system": "system developer 系统",
    "user": "user human prompter customer client student seeker patient visitor 用户 人类 问 提问 患者 来访者 求助者 "
    "顾客 客户",
    "assistant": "assistant gpt chatgpt gpt4 gpt-4 bot chatbot model ai llm bing bard claude gemini agent doctor "
    "counselor therapist supporter 助手 机器人 答 回答 医生 咨询师 心理咨询师 客服 模型",
    "tool": "tool function observation ipython function_call function-call tool_call tool_response tool_result",
}
_ROLE_OF = {name: role for role, names in _ROLES.items() for name in names.split()}

# Keys, as `_plain` writes them, whose values decide. What a text cannot stand for is refused by name, unless it is
# empty.
_DECIDING = {
    "tools": r"(.*_)?(tools|functions|apis|plugins)"
    r"|(.*_)?(tool|function)_(calls?|call_id|choice|description|schema|results?)",
    "media": r"(.*_)?(images?|imgs?|pictures?|photos?|videos?|audios?|wavs?)"
    r"(_(paths?|files?|urls?|ids?|names?|base64|bytes))?|speech|bbox|objects|pixel_values",
    "verdict": r"label|kto_tag|thumbs_up"
    r"|(.*_)?(safe|correct|accepted|acceptable|desirable|preferred|helpful|good|approved)",
    "fault": r"thumbs_down|(is_|was_)?(bad|wrong|incorrect|unsafe|harmful|toxic|flagged|undesirable|deleted)",
    "weight": r"weight|sample_weight|loss|loss_weight|loss_scale|loss_mask|output_with_loss"
    r"|train|training|trainable|train_on_turn|train_detail",
    "mask": r"mask(ed)?|ignored?|no_loss",  # as a weight, the other way round
    "preference": r".*(chosen|reject|prefer).*",
}
_DECIDES = {kind: re.compile(pattern) for kind, pattern in _DECIDING.items()}
_OFF, _ON = (False, "0", "0.0", "false", "no"), (True, "1", "1.0", "true", "yes")  # 0 == False
_BAD = (*_OFF, -1, *"-1 bad rejected undesirable unsafe wrong incorrect 差 坏 错 错误".split())

# What a question is about, where it is none of the parts.
_ABOUT = {*"context contexts passage passages document documents article paragraph paragraphs content".split()}
_ABOUT |= {
    *"options choices evidence background story premise hypothesis material materials 材料 选项 上下文 背景".split()
}
_CHOICES = {f"{before}{letter}" for before in ("", "option_", "op") for letter in "abcdef"}
_INSTRUCTING = {*"task instruct instructions definition directive command".split()}  # an "input"

# As LLaMA-Factory, ms-swift and role-play cards write them. Code is left as it is.
_CODE = r"```.*?(?:```|\Z)|`[^`\n]*`"
_PLACEHOLDER = re.compile(_CODE + r"|\{\{\s*([\w -]{1,40}?)\s*\}\}|<(NAME|AUTHOR)>", re.DOTALL | re.IGNORECASE)
_FIELD = {field: field for field in "name author user english_name birth home".split()}
_FIELD |= dict.fromkeys(
    "char bot bot_name model model_name assistant assistant_name ai_name 名字 姓名 名称".split(), "name"
)
_FIELD |= dict.fromkeys("developer company creator owner team organization 作者 开发者 公司 团队".split(), "author")

# Pictures and sound in a text, as Qwen-VL, LLaVA and LLaMA-Factory write them.
_INLINE = re.compile(
    _CODE + r"|(<(?P<one>img|audio|video)>[^<>\s]+</(?P=one)>|<\|(?:image|vision|audio|video)_?\w*\|>"
    r"|^[ \t]*<(?P<two>image|video|audio)>[ \t]*$(?!.*</(?P=two)>)"
    r"|\A\s*<(?P<three>image)>(?!.*</(?P=three)>))",
    re.DOTALL | re.MULTILINE,
)


class LeftOut(Exception):
    """A row that is counted and not trained; the text says why."""


class Plan(NamedTuple):
    """The keys of a row: {part: key} of those that are read, those whose values decide, those that the question may be
    about, and the others."""

    read: dict[str, str]
    decide: list[str]
    about: list[str]
    unused: list[str]


class Ambiguous(DataError):
    """Two columns could be the same part."""


class Forms:
    """Rows to messages, with one choice of columns and one persona.

    unused: how often a key stood in a row that nothing reads. unanswered: how many rows ended with a question.
    unfilled: how often a place to be filled in stayed, of those that nobody here knows.
    """

    def __init__(self, columns: Mapping[str, str] | Iterable[str] | None = None, persona: object = None) -> None:
        self.names = _named(columns)
        filling = persona if isinstance(persona, Mapping) else vars(persona) if persona else {}
        self.filling = {_plain(field): value for field, value in filling.items()}
        self.unused: Counter[str] = Counter()
        self.unfilled: Counter[str] = Counter()
        self.seen: set[str] = set()
        self.unanswered = 0
        self._plan = lru_cache(maxsize=1024)(self._make_plan)

    def messages(self, row: object) -> list[Message]:
        """The valid messages of a row; an answer that is not to be trained has `"weight": 0`, as OpenAI says it.

        Raises DataError for what cannot be read, or would be trained otherwise than it is meant; LeftOut for what is
        empty or labelled bad.
        """
        messages = self._turns(row) if isinstance(row, list) else self._row(row)
        system = bool(messages) and messages[0]["role"] == "system"
        if system and not messages[0]["content"].strip():
            system = False
            del messages[0]
        greeted = len(messages) > system and messages[system]["role"] == "assistant"
        if greeted:
            messages[system]["weight"] = 0  # nobody asked for it
        try:
            validate_messages(messages[:system] + messages[system + 1 :] if greeted else messages)
        except MessagesError as error:
            raise DataError(str(error)) from None
        answers = [message for message in messages if message["role"] == "assistant"]
        if not answers:
            raise LeftOut("no answer")
        if messages[-1]["role"] == "user":
            self.unanswered += 1
            messages.pop()
        for message in messages:
            text = message["content"]
            if not _VISIBLE.search(text):
                raise LeftOut("an empty answer" if message["role"] == "assistant" else "an empty question")
            if "<" in text and (found := next((match[1] for match in _INLINE.finditer(text) if match[1]), None)):
                raise DataError(f"it has {found.strip()[:60]!r} in a text: {_NO_MEDIA}")
            if "{{" in text or "<" in text and ("<NAME>" in text or "<AUTHOR>" in text):
                message["content"] = _PLACEHOLDER.sub(self._filled, text)
        if not any(answer.get("weight", 1) for answer in answers):
            raise LeftOut("no answer that is to be trained")
        return messages

    def _row(self, row: object) -> list[Message]:
        if not isinstance(row, dict):
            raise DataError(f"expected an object or a list of messages; found a JSON {type(row).__name__}.")
        try:
            plan = self._plan(tuple(row))
        except Ambiguous:  # perhaps one of the two is always empty
            plan = self._plan(tuple(key for key, value in row.items() if not _is_empty(value)))
        if "messages" in plan.read and _is_nothing(row[plan.read["messages"]]):
            plan = self._plan(tuple(key for key, value in row.items() if not _is_nothing(value)))
        for key in plan.unused:
            self.unused[key] += 1
        for key in plan.decide:
            self._decide(key, row[key], row)
        for key in plan.about:
            if not _is_empty(row[key]):
                raise DataError(_beside_the_question(key, plan.read))
        read = {part: row[key] for part, key in plan.read.items()}
        if "messages" in read:
            listed = _unpacked(key := plan.read["messages"], read["messages"])
            if any(isinstance(turn, dict) and _is_row(turn, key in _WEAK) for turn in listed):
                raise DataError(f"the rows seem to lie under {key!r}. Save that list as a file by itself.")
            talk = self._turns(listed)
            if not talk:
                raise DataError(f"{plan.read['messages']!r} is empty; expected at least one message.")
            if "answer" not in read:
                self._complete(talk, plan, row)
        else:
            talk = self._asked(plan.read, read)
        if "answer" in read:
            talk = self._answered(talk, plan.read["answer"], read["answer"], read.get("reasoning_content"))
        if "system" not in read:
            return talk
        system = _text(read["system"], plan.read["system"])
        if system and talk and talk[0]["role"] == "system":
            if talk[0]["content"] not in ("", system):
                raise DataError("there are two system texts, one in the messages and one beside them. Leave one.")
            del talk[0]
        return [{"role": "system", "content": system}, *talk] if system else talk

    def _complete(self, talk: list[Message], plan: Plan, row: dict[str, Any]) -> None:
        """Put to the messages what stands beside them and belongs to them: the last answer, what was thought for the
        only one. Raises DataError for an instruction that is in none of them."""
        for key in (key for key in row if str(key) in plan.unused and not _is_empty(row[key])):
            part, value = _PART_OF.get(_plain(key)), row[key]
            answers = [message for message in talk if message["role"] == "assistant"]
            if part == "answer" and talk[-1]["role"] == "user":
                talk[:] = self._answered(talk, str(key), value, None)
            elif part == "reasoning_content" and len(answers) == 1 and isinstance(value, str):
                answers[0].setdefault("reasoning_content", value)
            else:
                told = isinstance(value, str) and any(value.strip() in str(message["content"]) for message in talk)
                if _plain(key) == "instruction" and not told and "messages" not in self.names.values():
                    raise DataError(
                        f"{key!r} stands beside the messages and is in none of them. Say what it is: "
                        f'columns={{{key!r}: "system"}}; or go without it: '
                        f'columns={{{plan.read["messages"]!r}: "messages"}}.'
                    )
                continue
            self.unused -= Counter([str(key)])

    def _asked(self, keys: dict[str, str], read: dict[str, Any]) -> list[Message]:
        """The history and the question."""
        talk = [] if _is_empty(read.get("history")) else self._turns(_unpacked("history", read["history"]))
        if isinstance(prompt := read["question"], list | dict):  # messages, whose answers TRL does not train
            turns = self._turns(prompt if isinstance(prompt, list) else [prompt])
            return talk + [turn | {"weight": 0} if turn["role"] == "assistant" else turn for turn in turns]
        asked, more = _text(read["question"], keys["question"]), read.get("input")
        if not more and (said := _transcribed(asked)):
            return talk + said
        if more and (more := _text(more, keys["input"])).strip():
            asked = f"{asked}\n{more}" if asked.strip() else more
        talk.append({"role": "user", "content": asked})
        return talk

    def _answered(self, talk: list[Message], key: str, answer: Any, reasoning: Any) -> list[Message]:
        """What was said, with the answer: a text, a message, or messages, which may be the whole conversation."""
        if isinstance(answer, str) and reasoning is None:
            talk.append({"role": "assistant", "content": answer})
            return talk
        if isinstance(answer, dict):
            answer = [answer]
        if (
            isinstance(answer, list)
            and answer
            and all(isinstance(turn, dict) and "type" not in turn for turn in answer)
        ):
            turns = self._turns(answer)
            return talk + turns if turns[0]["role"] == "assistant" else turns
        message = {"role": "assistant", "content": _text(answer, key)}
        if not _is_empty(reasoning):
            message["reasoning_content"] = _text(reasoning, "reasoning_content")
        return [*talk, message]

    def _turns(self, listed: list[Any]) -> list[Message]:
        """Messages of a list: of messages, of rounds, of pairs, or of texts that take turns."""
        talk: list[Message] = []
        for index, turn in enumerate(listed):
            if isinstance(turn, dict):
                talk += self._turn(turn, len(talk))
            elif isinstance(turn, str):
                talk.append({"role": ("user", "assistant")[index % 2], "content": turn})
            elif isinstance(turn, list | tuple) and len(turn) == 2:
                pair = zip(("user", "assistant"), turn)
                talk += [{"role": role, "content": _text(text, f"a turn ({role})")} for role, text in pair]
            else:
                raise DataError(f"turn {index} is a {_kind(turn)}; expected a message, a text or a pair of texts.")
        return talk

    def _turn(self, turn: Message, index: int) -> list[Message]:
        """The message that a dict is, or the messages of a round."""
        role: Any = turn.get("role") or turn.get("from")  # in a table of both kinds the other is null
        if role is None and _SPEAKING & (names := {_plain(key) for key in turn}) and _SAYING & names:
            turn = {_TURN.get(_plain(key), key): value for key, value in turn.items()}
            role = turn.get("role") or turn.get("from")
        if role is None:
            return self._round(turn, index)
        role = _ROLE_OF.get(role) or _ROLE_OF.get(str(role).strip().lower(), role)
        if role == "tool":
            raise DataError(f"Message {index} is a tool's ({turn.get('role') or turn.get('from')}). {_NO_TOOLS}")
        given = [key for key in ("content", "value", "text", "parts") if key in turn]
        key = next((key for key in given if turn[key] is not None), given[0] if given else None)
        message = {"role": role}
        if len(turn) > 2:
            message |= self._beside(turn, key, role, index)
        if key is None:
            raise DataError(f"Message {index} must have a role and a content; found the keys {', '.join(turn)}.")
        text = turn[key]
        message["content"] = text if isinstance(text, str) else _text(text, f"Message {index} ({role})")
        return [message]

    def _round(self, turn: dict[str, Any], index: int) -> list[Message]:
        """The messages of a question and its answer, which may be marked as not to be trained."""
        marks = {key: value for key, value in turn.items() if _decides(key) in ("weight", "mask")}
        try:
            talk = self._row({key: value for key, value in turn.items() if key not in marks})
        except DataError as error:
            raise DataError(f"Message {index}: {error}") from None
        if not all(_is_trained(key, value) for key, value in marks.items() if not _is_nothing(value)):
            talk = [message | {"weight": 0} if message["role"] == "assistant" else message for message in talk]
        return talk[1:] if index and talk[0]["role"] == "system" else talk

    def _beside(self, turn: Message, content: str | None, role: str, index: int) -> Message:
        """What a message has beside its role and its content, where it matters."""
        kept: Message = {}
        for key, value in turn.items():
            if key in ("role", "from", content) or _is_nothing(value):
                continue
            kind = _decides(key)
            if kind in ("weight", "mask"):
                if role == "assistant" and not _is_trained(key, value):
                    kept["weight"] = 0
            elif _PART_OF.get(_plain(key)) == "reasoning_content" and role == "assistant":
                if not _is_empty(value):
                    kept["reasoning_content"] = _text(value, f"Message {index}: {key}")
            elif key == "replayed":
                kept[key] = value
            elif kind:
                try:
                    self._decide(key, value, turn)
                except DataError as error:
                    raise DataError(f"Message {index} ({role}): {error}") from None
            else:
                self.unused[f"messages.{key}"] += 1
        return kept

    def _decide(self, key: str, value: Any, row: dict[str, Any]) -> None:
        """Honour or refuse a key on which the meaning hangs."""
        kind = _decides(key)
        if kind == "verdict" and _is_one_of(value, _BAD) or kind == "fault" and _is_one_of(value, _ON):
            raise LeftOut(f"labelled bad ({key})")
        if kind in ("weight", "mask") and _is_one_of(value, _ON if kind == "mask" else _OFF):
            raise LeftOut(f"marked as not to be trained ({key})")
        if kind in ("verdict", "fault", "weight", "mask"):
            if not _is_one_of(value, _ON + _OFF) and not _is_nothing(value):
                if "weight" in _plain(key) or isinstance(value, list | dict) and kind != "verdict":
                    _is_trained(key, value)
                self.unused[key] += 1  # another thing of that name: a class, a loss that was measured
        elif _is_empty(value):
            return
        elif kind == "tools" and value is not True:
            raise DataError(f"it has {key!r}. {_NO_TOOLS}")
        elif kind == "media":
            raise DataError(f"it has {key!r}: {_NO_MEDIA}")
        elif kind == "preference":
            if not {"answer", "messages", "question"} & set(self.names.values()):
                raise DataError(_preference(row))
            self.unused[key] += 1
        elif isinstance(value, dict) and (told := [name for name, each in value.items() if each and each is not True]):
            raise DataError(
                f"it has {key!r}, with what a template is to write ({', '.join(told)}). It is not read here."
            )
        else:
            self.unused[key] += 1

    def _make_plan(self, keys: tuple[str, ...]) -> Plan:
        """What the keys of a row are. Raises DataError where they are no conversation, Ambiguous for two of a kind."""
        self.seen.update(map(str, keys))
        found: dict[str, list[str]] = {part: [] for part in PARTS}
        for key in keys:
            if part := self.names.get(key) or _PART_OF.get(_plain(key)):
                found[part].append(key)
        for part in found:
            found[part] = [key for key in found[part] if key in self.names] or found[part]
        read = {part: found[part][0] for part in ("system", "history") if found[part]}
        about: list[str] = []
        if found["messages"] and (found["messages"][0] not in _WEAK or not found["question"]):
            read["messages"] = min(found["messages"], key=lambda key: _rank("messages", key))
            read.pop("history", None)
            if named := [key for key in found["answer"] if key in self.names]:
                read["answer"] = named[0]
        else:
            question, answer = found["question"], found["answer"]
            self._check_named(keys, {"question": question, "answer": answer})
            asked_by_input = bool(found["input"]) and not question
            if asked_by_input:
                question, found["input"] = found["input"], []
            preferred = [key for key in keys if _decides(key) == "preference" and key not in self.names]
            chosen = {"question", "answer"} <= set(self.names.values())
            names = {_plain(key): key for key in keys if key not in self.names}
            dolly = (
                "context" in names and "output" not in names and _plain(question[:1]) == "instruction" and not chosen
            )
            if not question or not answer or dolly:
                raise DataError(_preference(map(str, keys)) if preferred else _unknown(keys, question, answer))
            if not chosen:
                beside = _ABOUT | (_INSTRUCTING if asked_by_input else set())
                beside |= _CHOICES if len(_CHOICES & names.keys()) > 1 else set()
                about = [key for name, key in names.items() if name in beside]
            if (
                found["input"]
                and _plain(question[0]) != "instruction"
                and not {question[0], *found["input"]} & {*self.names}
            ):
                question = question + found["input"]
            for part, candidates in (("query", question), ("input", found["input"]), ("response", answer)):
                if len(candidates) > 1:
                    raise Ambiguous(
                        f"more than one column could be the {part}: {', '.join(candidates)}. Say which: "
                        f"columns={{{candidates[0]!r}: {part!r}}}."
                    )
            read |= {part: found[part][0] for part in ("input", "reasoning_content") if found[part]}
            read |= {"question": question[0], "answer": answer[0]}
        left = [key for key in keys if key not in read.values() and key not in about]
        decide = [key for key in left if _decides(key)]
        return Plan(read, decide, about, [str(key) for key in left if key not in decide])

    def _check_named(self, keys: tuple[str, ...], found: dict[str, list[str]]) -> None:
        """Raise DataError where a column that was named is missing and another would be taken for it."""
        for part, candidates in found.items():
            named = [key for key, of in self.names.items() if of == part]
            if named and candidates and not {*named} & {*candidates}:
                raise DataError(no_column(named[0], keys))

    def unseen(self) -> str | None:
        """What to say of a column that was named and stood in no row."""
        missing = [name for name in self.names if name not in self.seen]
        return no_column(missing[0], self.seen) if missing else None

    def _filled(self, match: re.Match[str]) -> str:
        field = _plain(match[1] or match[2] or "")
        if not field:
            return match[0]
        value = self.filling.get(field, self.filling.get(_FIELD.get(field, "")))
        if value is None and field not in _FIELD:
            self.unfilled[match[0]] += 1
            return match[0]
        if value is None:
            raise DataError(
                f"a place to be filled in, {match[0]}. Pass persona=Persona(name=..., author=...) of chatmagic.course, "
                f'or persona={{"{field}": "..."}}.'
            )
        return str(value)


_VISIBLE = re.compile(r"[^\s\u200b-\u200f\u2060\ufeff]")  # a character that a reader sees
_WEAK = ("data", "items", "turns", "chat")  # what else may be called so
_NO_TOOLS = "Tool calls cannot be trained here."
_NO_MEDIA = "pictures, sound and the like cannot be trained here."
_SPEAKING, _SAYING = {"role", "from", "speaker"}, {"content", "value", "text"}
_TURN = {"speaker": "role"} | {name: name for name in ("role", "from", *_SAYING)}


@lru_cache(maxsize=4096)
def _spelt(key: str) -> str:
    return re.sub(r"[\W_]+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key)).strip("_").lower()


def _plain(key: object) -> str:
    """A key as it is compared: of "System Prompt", "systemPrompt" and "system-prompt", system_prompt."""
    return _spelt("".join(key) if isinstance(key, list) else str(key))


@lru_cache(maxsize=4096)
def _decides(key: str) -> str | None:
    """What the value of a key decides, a name of `_DECIDING`; "template" where it is what a chat template is given."""
    name = _spelt(str(key))
    if name.endswith("kwargs"):
        return "template"
    return next((kind for kind, pattern in _DECIDES.items() if pattern.fullmatch(name)), None)


def _is_row(turn: dict[str, Any], weak: bool) -> bool:
    """Whether what lies in a list is a row, with messages of its own, rather than a message or a round. weak: the list
    has a name that might be anything's."""
    names = {_plain(key) for key in turn}
    if names & {"role", "from", "speaker"}:
        return False
    return weak or any(
        isinstance(value, list) and _PART_OF.get(_plain(key)) == "messages" for key, value in turn.items()
    )


def no_column(name: str, keys: Iterable[str]) -> str:
    """What to say where `columns` names one that is not among `keys`."""
    return f"there is no column {name!r}{did_you_mean(name, map(str, keys)) or '.'} Found {_listed(keys)}."


def _listed(keys: Iterable[object]) -> str:
    names = sorted(map(str, keys))
    return ", ".join(names[:12]) + (f" and {len(names) - 12:,} more" if len(names) > 12 else "")


def _beside_the_question(key: str, read: dict[str, str]) -> str:
    return (
        f"{key!r} stands beside the question. If it belongs to it, say so: "
        f'columns={{{key!r}: "{"instruction" if _plain(key) in _INSTRUCTING else "input"}"}}; if not: '
        f'columns={{{read["question"]!r}: "query", {read["answer"]!r}: "response"}}.'
    )


def _named(columns: Mapping[str, str] | Iterable[str] | None) -> dict[str, str]:
    """`columns` as {the file's name: the part that it is}."""
    if columns is None:
        return {}
    if not isinstance(columns, Mapping):
        if isinstance(columns, str) or len(columns := list(columns)) != 2:
            raise DataError(
                f"columns={columns!r} is neither two names, the question's and the answer's, "
                'nor {NAME: "query", OTHER: "response"}.'
            )
        columns = dict(zip(columns, ("query", "response")))
    found = {}
    for one, other in columns.items():
        theirs, ours = (one, other) if other in _PART_OF else (other, one)
        if ours not in _PART_OF:
            raise DataError(
                f"columns={{{one!r}: {other!r}}} names nothing that is known here. Expected a column of the file and "
                f"what it is: {', '.join(names[0] for names in PARTS.values())}."
            )
        found[theirs] = _PART_OF[ours]
    return found


def _rank(part: str, key: str) -> int:
    name = _plain(key)
    return PARTS[part].index(name) if name in PARTS[part] else -1


def _unknown(keys: tuple[str, ...], question: list[str], answer: list[str]) -> str:
    found = f"found {_listed(keys) or 'nothing'}"
    names = {_plain(key) for key in keys}
    if _SPEAKING & names and _SAYING & names:
        return f"the row is one message ({_listed(keys)}); expected a whole conversation, the list of its messages."
    if question and _plain(question[0]) == "instruction":
        ways = "".join(f', {key!r}: "{name}"' for key, name in (("context", "input"),) if key in keys)
        to_type = f' Say what is what: columns={{{answer[0]!r}: "output"{ways}}}.' if answer else ""
        return f"no 'output'; {found}.{to_type}"
    if question:
        return f'no answer beside {question[0]!r}; {found}. Say which it is: columns={{NAME: "response"}}.'
    one, other = keys if len(keys) == 2 else ("NAME", "OTHER")
    return (
        "expected an object with 'messages', 'conversations', 'instruction' and 'output', or 'query' and 'response'; "
        f'{found}. Say which columns they are: columns={{{one!r}: "query", {other!r}: "response"}}.'
    )


def _preference(row: Iterable[str]) -> str:
    """What to say of a row with these keys, of which some name one of two answers."""
    names = list(row)
    keys = [key for key in names if _decides(key) == "preference"]
    chosen = (key for key in names if re.fullmatch("(?!.*score).*(chosen|(^|_)(?<!non_)(?<!dis)prefer).*", _plain(key)))
    answers = (key for key in names if key not in keys and _PART_OF.get(_plain(key)) == "answer")
    good = next(chosen, None) or next(answers, "messages")
    part = "messages" if "messages" in good else "response"
    return (
        f"preference data ({', '.join(keys)}): one of two answers is the bad one. To learn the good ones alone, name "
        f'their column: columns={{"{good}": "{part}"}}.'
    )


def _unpacked(key: str, value: Any) -> list[Any]:
    """A list, also one that is written as JSON in a cell of a table."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = json.loads(value)
        except ValueError:
            raise DataError(
                f"{key!r} is a text that is no JSON: {value[:40]!r}. Write the cell with json.dumps."
            ) from None
    if not isinstance(value, list):
        raise DataError(f"{key!r} is of type {_kind(value)}; expected a list of messages.")
    return value


def _text(value: Any, name: str | None) -> str:
    """A text, or the text that parts of type text are; nothing is an empty one."""
    if isinstance(value, str):
        return value
    if _is_nothing(value):
        return ""
    if isinstance(value, dict) and "parts" in value and not value.keys() - {"parts", "role"}:
        value = value["parts"]  # Gemini's
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        texts = [part.get("text", part.get("value")) for part in value]
        for part, text in zip(value, texts):
            if not isinstance(text, str) or part.get("type", "text") not in _TEXT_PARTS:
                raise DataError(f"{name} has a part of type {part.get('type')!r}; only texts can be trained here.")
        return "".join(texts)
    raise DataError(f"{name} has content of type {_kind(value)}; expected a string.")


_TEXT_PARTS = ("text", "input_text", "output_text")


_SPEAKER = re.compile(r"(?:\A|\n)[ \t]*(?:(Human|User)|Assistant)[ \t]*[:：]")


def _transcribed(text: str) -> list[Message]:
    """The messages of a question that is a whole transcript, from "Human:" to the "Assistant:" whose turn it is, as
    BELLE and hh-rlhf write it; the answers in it are not trained. Empty where it is none."""
    if not re.match(r"\s*(Human|User)[ \t]*[:：]", text) or not re.search(r"\n[ \t]*Assistant[ \t]*[:：]\s*\Z", text):
        return []
    begun = list(_SPEAKER.finditer(text.lstrip()))
    ends = [match.start() for match in begun[1:]]
    if any(bool(match[1]) == bool(index % 2) for index, match in enumerate(begun)):
        return []  # two in a row
    said = [text.lstrip()[match.end() : end].strip() for match, end in zip(begun, ends)]
    return [
        {"role": "user", "content": text} | ({"role": "assistant", "weight": 0} if index % 2 else {})
        for index, text in enumerate(said)
    ]


def _is_trained(key: str, value: object) -> bool:
    """Whether an answer that is marked so is trained. Raises DataError for a mark that says neither."""
    if _is_one_of(value, _OFF) or _is_one_of(value, _ON):
        return _is_one_of(value, _OFF if _decides(key) == "mask" else _ON)
    raise DataError(f"an answer has {key}: {value!r}; an answer is trained (1) or not (0), nothing between.")


def _is_one_of(value: object, values: tuple[object, ...]) -> bool:
    return (value.strip().lower() if isinstance(value, str) else value) in values


def _is_nothing(value: object) -> bool:
    """None, or NaN, as tables have where a cell is empty."""
    return value is None or value != value


def _is_empty(value: object) -> bool:
    return (
        _is_nothing(value) or value in ([], {}, False) or isinstance(value, str) and value.strip() in ("", "[]", "{}")
    )


def _kind(value: object) -> str:
    return type(value).__name__
