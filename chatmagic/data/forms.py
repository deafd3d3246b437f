"""Rows to messages: the forms in which people write conversations, found by their keys."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from ..conversation.messages import Message, MessagesError, validate_messages
from .rows import DataError

# What the parts of a row are called; the first of each is the name that messages to the reader use.
PARTS = {
    "messages": "messages conversations conversation dialogue dialog dialogs turns chat items data".split(),
    "system": "system system_prompt system_message".split(),
    "history": ["history"],
    "question": "query instruction prompt question user human problem".split(),
    "input": ["input"],
    "answer": "response output answer completion target assistant gpt bot reply".split(),
    "reasoning_content": "reasoning_content reasoning thinking".split(),
}
_PART_OF = {name: part for part, names in PARTS.items() for name in names}
_ROLES = {
    "system": "system developer 系统",
    "user": "user human prompter customer student seeker 用户 人类 问 提问",
    "assistant": "assistant gpt chatgpt gpt4 gpt-4 bot model ai llm bing bard claude gemini 助手 机器人 答 回答",
    "tool": "tool function observation ipython function_call function-call tool_call tool_response tool_result",
}
_ROLE_OF = {name: role for role, names in _ROLES.items() for name in names.split()}

# Keys whose values decide. What a text cannot stand for is refused by name, unless it is empty.
_TOOLS = "tools functions tool_calls function_call tool_call_id available_tools".split()
_MEDIA = "images image image_url image_path videos video audios audio audio_url speech objects bbox".split()
_PREFERENCE = re.compile("chosen|reject", re.IGNORECASE)
_VERDICTS = ["label", "kto_tag"]  # false: a bad answer, as in KTO
_WEIGHTS = "weight loss loss_weight loss_scale train".split()  # 0 or false: an answer that is not trained
_DECIDE = {*_TOOLS, *_MEDIA, *_VERDICTS, *_WEIGHTS}
_OFF, _ON = (False, "0", "0.0", "false", "no"), (True, "1", "1.0", "true", "yes")  # 0 == False

# As LLaMA-Factory, ms-swift and role-play cards write them. Code is left as it is.
_PLACEHOLDER = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`"
    r"|\{\{\s*(name|author|char|user|bot|bot_name|model|model_name|developer|company|english_name|birth|home)\s*\}\}"
    r"|<(NAME|AUTHOR)>",
    re.DOTALL | re.IGNORECASE,
)
_FIELD = dict.fromkeys(("char", "bot", "bot_name", "model", "model_name"), "name")
_FIELD |= dict.fromkeys(("developer", "company"), "author")


class LeftOut(Exception):
    """A row that is counted and not trained; the text says why."""


class Plan(NamedTuple):
    """The keys of a row: {part: key} of those that are read, those whose values decide, and the others."""

    read: dict[str, str]
    decide: list[str]
    unused: list[str]


class Ambiguous(DataError):
    """Two columns could be the same part."""


class Forms:
    """Rows to messages, with one choice of columns and one persona.

    unused: how often a key stood in a row that nothing reads. unanswered: how many rows ended with a question.
    """

    def __init__(self, columns: Mapping[str, str] | Iterable[str] | None = None, persona: object = None) -> None:
        self.names = _named(columns)
        self.filling = persona if isinstance(persona, Mapping) else vars(persona) if persona else {}
        self.unused: Counter[str] = Counter()
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
        read = {part: row[key] for part, key in plan.read.items()}
        if "messages" in read:
            listed = _unpacked(key := plan.read["messages"], read["messages"])
            if key in _WEAK and any(isinstance(turn, dict) and not {"role", "from"} & turn.keys() for turn in listed):
                raise DataError(f"the rows seem to lie under {key!r}. Save that list as a file by itself.")
            talk = self._turns(listed)
            if not talk:
                raise DataError(f"{plan.read['messages']!r} is empty; expected at least one message.")
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

    def _asked(self, keys: dict[str, str], read: dict[str, Any]) -> list[Message]:
        """The history and the question."""
        talk = self._turns(_unpacked("history", read["history"])) if read.get("history") else []
        if isinstance(read["question"], list):  # a prompt of messages, whose answers TRL does not train
            turns = self._turns(read["question"])
            return talk + [turn | {"weight": 0} if turn["role"] == "assistant" else turn for turn in turns]
        asked, more = _text(read["question"], keys["question"]), read.get("input")
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
        if role is None:
            try:
                talk = self._row(turn)
            except DataError as error:
                raise DataError(f"Message {index}: {error}") from None
            return talk[1:] if index and talk[0]["role"] == "system" else talk
        role = _ROLE_OF.get(role) or _ROLE_OF.get(str(role).strip().lower(), role)
        if role == "tool":
            raise DataError(f"Message {index} is a tool's ({turn.get('role') or turn.get('from')}). {_NO_TOOLS}")
        given = [key for key in ("content", "value", "text") if key in turn]
        key = next((key for key in given if turn[key] is not None), given[0] if given else None)
        message = {"role": role}
        if len(turn) > 2:
            message |= self._beside(turn, key, role, index)
        if key is None:
            raise DataError(f"Message {index} must have a role and a content; found the keys {', '.join(turn)}.")
        text = turn[key]
        message["content"] = text if isinstance(text, str) else _text(text, f"Message {index} ({role})")
        return [message]

    def _beside(self, turn: Message, content: str | None, role: str, index: int) -> Message:
        """What a message has beside its role and its content, where it matters."""
        kept: Message = {}
        for key, value in turn.items():
            if key in ("role", "from", content) or _is_nothing(value):
                continue
            if key in _WEIGHTS:
                if role == "assistant" and not _weight(key, value):
                    kept["weight"] = 0
            elif _PART_OF.get(key) == "reasoning_content" and role == "assistant":
                if not _is_empty(value):
                    kept["reasoning_content"] = _text(value, f"Message {index}: {key}")
            elif key == "replayed":
                kept[key] = value
            elif key in _DECIDE or _PREFERENCE.search(key):
                try:
                    self._decide(key, value, turn)
                except DataError as error:
                    raise DataError(f"Message {index} ({role}): {error}") from None
            else:
                self.unused[f"messages.{key}"] += 1
        return kept

    def _decide(self, key: str, value: Any, row: dict[str, Any]) -> None:
        """Honour or refuse a key on which the meaning hangs."""
        if key in _WEIGHTS or key in _VERDICTS:
            if _is_one_of(value, _OFF):
                why = "labelled bad" if key in _VERDICTS else "marked as not to be trained"
                raise LeftOut(f"{why} ({key})")
            if not _is_one_of(value, _ON) and not _is_nothing(value):
                if "weight" in key:
                    _weight(key, value)
                self.unused[key] += 1  # another thing of that name: a class, a loss that was measured
        elif _is_empty(value):
            return
        elif key in _TOOLS:
            raise DataError(f"it has {key!r}. {_NO_TOOLS}")
        elif key in _MEDIA:
            raise DataError(f"it has {key!r}: pictures, sound and the like cannot be trained here.")
        elif {"answer", "messages", "question"} & set(self.names.values()):
            self.unused[key] += 1
        else:
            raise DataError(_preference(row))

    def _make_plan(self, keys: tuple[str, ...]) -> Plan:
        """What the keys of a row are. Raises DataError where they are no conversation, Ambiguous for two of a kind."""
        found: dict[str, list[str]] = {part: [] for part in PARTS}
        for key in keys:
            if part := self.names.get(key) or _PART_OF.get(str(key).lower()):
                found[part].append(key)
        for part in found:
            found[part] = [key for key in found[part] if key in self.names] or found[part]
        read = {part: found[part][0] for part in ("system", "history") if found[part]}
        if found["messages"] and (found["messages"][0] not in _WEAK or not found["question"]):
            read["messages"] = min(found["messages"], key=lambda key: _rank("messages", key))
            read.pop("history", None)
            if named := [key for key in found["answer"] if key in self.names]:
                read["answer"] = named[0]
        else:
            question, answer = found["question"], found["answer"]
            if found["input"] and not question:
                question, found["input"] = found["input"], []
            preferred = [key for key in keys if _PREFERENCE.search(str(key)) and key not in self.names]
            if not question or not answer or "context" in keys and "output" not in keys and "context" not in self.names:
                raise DataError(_preference(map(str, keys)) if preferred else _unknown(keys, question, answer))
            if found["input"] and str(question[0]).lower() != "instruction" and question[0] not in self.names:
                question = question + found["input"]
            for part, candidates in (("query", question), ("response", answer)):
                if len(candidates) > 1:
                    raise Ambiguous(
                        f"more than one column could be the {part}: {', '.join(candidates)}. Say which: "
                        f"columns={{{candidates[0]!r}: {part!r}}}."
                    )
            read |= {part: found[part][0] for part in ("input", "reasoning_content") if found[part]}
            read |= {"question": question[0], "answer": answer[0]}
        left = [key for key in keys if key not in read.values()]
        decide = [key for key in left if key in _DECIDE or _PREFERENCE.search(str(key))]
        return Plan(read, decide, [str(key) for key in left if key not in decide])

    def _filled(self, match: re.Match[str]) -> str:
        field = (match[1] or match[2] or "").lower()
        if not field:
            return match[0]
        value = self.filling.get(field, self.filling.get(_FIELD.get(field, "")))
        if value is None:
            raise DataError(
                f"a place to be filled in, {match[0]}. Pass persona=Persona(name=..., author=...) of chatmagic.course, "
                f'or persona={{"{field}": "..."}}.'
            )
        return str(value)


_VISIBLE = re.compile(r"[^\s\u200b-\u200f\u2060\ufeff]")  # a character that a reader sees
_WEAK = ("data", "items", "turns", "chat")  # what else may be called so
_NO_TOOLS = "Tool calls cannot be trained here."


def _named(columns: Mapping[str, str] | Iterable[str] | None) -> dict[str, str]:
    """`columns` as {the file's name: the part that it is}."""
    if columns is None:
        return {}
    if not isinstance(columns, Mapping):
        columns = dict(zip(columns, ("query", "response"), strict=True))
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
    name = str(key).lower()
    return PARTS[part].index(name) if name in PARTS[part] else -1


def _unknown(keys: tuple[str, ...], question: list[str], answer: list[str]) -> str:
    found = f"found {', '.join(sorted(map(str, keys))) or 'nothing'}"
    if question and str(question[0]).lower() == "instruction":
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
    keys = [key for key in names if _PREFERENCE.search(key)]
    chosen = (key for key in keys if "chosen" in key.lower() and "score" not in key.lower())
    answers = (key for key in names if key not in keys and _PART_OF.get(key.lower()) == "answer")
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
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        texts = [part.get("text", part.get("value")) for part in value]
        for part, text in zip(value, texts):
            if not isinstance(text, str) or part.get("type", "text") not in _TEXT_PARTS:
                raise DataError(f"{name} has a part of type {part.get('type')!r}; only texts can be trained here.")
        return "".join(texts)
    raise DataError(f"{name} has content of type {_kind(value)}; expected a string.")


_TEXT_PARTS = ("text", "input_text", "output_text")


def _weight(key: str, value: object) -> bool:
    if _is_one_of(value, _OFF) or _is_one_of(value, _ON):
        return _is_one_of(value, _ON)
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
