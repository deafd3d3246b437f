"""Rows to messages: the forms in which people write conversations, found by their keys."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from ..conversation.messages import Message, MessagesError, validate_messages
from .keys import (
    PART_OF,
    SAYING,
    SPEAKING,
    WEAK,
    Ambiguous,
    Keys,
    Plan,
    beside_the_question,
    decides,
    is_row,
    plain,
    preference,
)
from .placeholders import Filling, medium_in
from .rows import DataError
from .values import LABELLED_BAD, OFF, ON, is_empty, is_nothing, is_one_of, is_trained, text_of, unpacked

_ROLES = {
    "system": "system developer 系统",
    "user": "user human prompter customer client student seeker patient visitor 用户 人类 问 提问 患者 来访者 求助者 "
    "顾客 客户",
    "assistant": "assistant gpt chatgpt gpt4 gpt-4 bot chatbot model ai llm bing bard claude gemini agent doctor "
    "counselor therapist supporter 助手 机器人 答 回答 医生 咨询师 心理咨询师 客服 模型",
    "tool": "tool function observation ipython function_call function-call tool_call tool_response tool_result",
}
_ROLE_OF = {name: role for role, names in _ROLES.items() for name in names.split()}
_TURN = {"speaker": "role"} | {name: name for name in ("role", "from", *SAYING)}
_NO_TOOLS = "Tool calls cannot be trained here."
_NO_MEDIA = "pictures, sound and the like cannot be trained here."
_VISIBLE = re.compile(r"[^\s\u200b-\u200f\u2060\ufeff]")  # a character that a reader sees
_SPEAKER = re.compile(r"(?:\A|\n)[ \t]*(?:(Human|User)|Assistant)[ \t]*[:：]")


class LeftOut(Exception):
    """A row that is counted and not trained; the text says why."""


class Forms:
    """Rows to messages, with one choice of columns and one persona.

    unused: how often a key stood in a row that nothing reads. unanswered: how many rows ended with a question.
    """

    def __init__(self, columns: Mapping[str, str] | Iterable[str] | None = None, persona: object = None) -> None:
        self.keys = Keys(columns)
        self.filling = Filling(persona)
        self.unused: Counter[str] = Counter()
        self.unanswered = 0

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
            if medium := medium_in(text):
                raise DataError(f"it has {medium[:60]!r} in a text: {_NO_MEDIA}")
            message["content"] = self.filling.fill(text)
        if not any(answer.get("weight", 1) for answer in answers):
            raise LeftOut("no answer that is to be trained")
        return messages

    def _row(self, row: object) -> list[Message]:
        if not isinstance(row, dict):
            raise DataError(f"expected an object or a list of messages; found a JSON {type(row).__name__}.")
        try:
            plan = self.keys.plan(tuple(row))
        except Ambiguous:  # perhaps one of the two is always empty
            plan = self.keys.plan(tuple(key for key, value in row.items() if not is_empty(value)))
        if "messages" in plan.read and is_nothing(row[plan.read["messages"]]):
            plan = self.keys.plan(tuple(key for key, value in row.items() if not is_nothing(value)))
        for key in plan.unused:
            self.unused[key] += 1
        for key in plan.decide:
            self._decide(key, row[key], row)
        for key in plan.about:
            if not is_empty(row[key]):
                raise DataError(beside_the_question(key, plan.read))
        read = {part: row[key] for part, key in plan.read.items()}
        if "messages" in read:
            listed = unpacked(key := plan.read["messages"], read["messages"])
            if any(isinstance(turn, dict) and is_row(turn, key in WEAK) for turn in listed):
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
        system = text_of(read["system"], plan.read["system"])
        if system and talk and talk[0]["role"] == "system":
            if talk[0]["content"] not in ("", system):
                raise DataError("there are two system texts, one in the messages and one beside them. Leave one.")
            del talk[0]
        return [{"role": "system", "content": system}, *talk] if system else talk

    def _complete(self, talk: list[Message], plan: Plan, row: dict[str, Any]) -> None:
        """Put to the messages what stands beside them and belongs to them: the last answer, what was thought for the
        only one. Raises DataError for an instruction that is in none of them."""
        for key in (key for key in row if str(key) in plan.unused and not is_empty(row[key])):
            part, value = PART_OF.get(plain(key)), row[key]
            answers = [message for message in talk if message["role"] == "assistant"]
            if part == "answer" and talk[-1]["role"] == "user":
                talk[:] = self._answered(talk, str(key), value, None)
            elif part == "reasoning_content" and len(answers) == 1 and isinstance(value, str):
                answers[0].setdefault("reasoning_content", value)
            else:
                told = isinstance(value, str) and any(value.strip() in str(message["content"]) for message in talk)
                if plain(key) == "instruction" and not told and "messages" not in self.keys.names.values():
                    raise DataError(
                        f"{key!r} stands beside the messages and is in none of them. Say what it is: "
                        f'columns={{{key!r}: "system"}}; or go without it: '
                        f'columns={{{plan.read["messages"]!r}: "messages"}}.'
                    )
                continue
            self.unused -= Counter([str(key)])

    def _asked(self, keys: dict[str, str], read: dict[str, Any]) -> list[Message]:
        """The history and the question."""
        talk = [] if is_empty(read.get("history")) else self._turns(unpacked("history", read["history"]))
        if isinstance(prompt := read["question"], list | dict):  # messages, whose answers TRL does not train
            turns = self._turns(prompt if isinstance(prompt, list) else [prompt])
            return talk + [turn | {"weight": 0} if turn["role"] == "assistant" else turn for turn in turns]
        asked, more = text_of(read["question"], keys["question"]), read.get("input")
        if not more and (said := _transcribed(asked)):
            return talk + said
        if more and (more := text_of(more, keys["input"])).strip():
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
        message = {"role": "assistant", "content": text_of(answer, key)}
        if not is_empty(reasoning):
            message["reasoning_content"] = text_of(reasoning, "reasoning_content")
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
                talk += [{"role": role, "content": text_of(text, f"a turn ({role})")} for role, text in pair]
            else:
                raise DataError(
                    f"turn {index} is a {type(turn).__name__}; expected a message, a text or a pair of texts."
                )
        return talk

    def _turn(self, turn: Message, index: int) -> list[Message]:
        """The message that a dict is, or the messages of a round."""
        role: Any = turn.get("role") or turn.get("from")  # in a table of both kinds the other is null
        if role is None and SPEAKING & (names := {plain(key) for key in turn}) and SAYING & names:
            turn = {_TURN.get(plain(key), key): value for key, value in turn.items()}
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
        message["content"] = text if isinstance(text, str) else text_of(text, f"Message {index} ({role})")
        return [message]

    def _round(self, turn: dict[str, Any], index: int) -> list[Message]:
        """The messages of a question and its answer, which may be marked as not to be trained."""
        marks = {key: value for key, value in turn.items() if decides(key) in ("weight", "mask")}
        try:
            talk = self._row({key: value for key, value in turn.items() if key not in marks})
        except DataError as error:
            raise DataError(f"Message {index}: {error}") from None
        if not all(is_trained(key, value) for key, value in marks.items() if not is_nothing(value)):
            talk = [message | {"weight": 0} if message["role"] == "assistant" else message for message in talk]
        return talk[1:] if index and talk[0]["role"] == "system" else talk

    def _beside(self, turn: Message, content: str | None, role: str, index: int) -> Message:
        """What a message has beside its role and its content, where it matters."""
        kept: Message = {}
        for key, value in turn.items():
            if key in ("role", "from", content) or is_nothing(value):
                continue
            kind = decides(key)
            if kind in ("weight", "mask"):
                if role == "assistant" and not is_trained(key, value):
                    kept["weight"] = 0
            elif PART_OF.get(plain(key)) == "reasoning_content" and role == "assistant":
                if not is_empty(value):
                    kept["reasoning_content"] = text_of(value, f"Message {index}: {key}")
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
        kind = decides(key)
        if kind == "verdict" and is_one_of(value, LABELLED_BAD) or kind == "fault" and is_one_of(value, ON):
            raise LeftOut(f"labelled bad ({key})")
        if kind in ("weight", "mask") and is_one_of(value, ON if kind == "mask" else OFF):
            raise LeftOut(f"marked as not to be trained ({key})")
        if kind in ("verdict", "fault", "weight", "mask"):
            if not is_one_of(value, ON + OFF) and not is_nothing(value):
                if "weight" in plain(key) or isinstance(value, list | dict) and kind != "verdict":
                    is_trained(key, value)
                self.unused[key] += 1  # another thing of that name: a class, a loss that was measured
        elif is_empty(value):
            return
        elif kind == "tools" and value is not True:
            raise DataError(f"it has {key!r}. {_NO_TOOLS}")
        elif kind == "media":
            raise DataError(f"it has {key!r}: {_NO_MEDIA}")
        elif kind == "preference":
            if not {"answer", "messages", "question"} & set(self.keys.names.values()):
                raise DataError(preference(row))
            self.unused[key] += 1
        elif isinstance(value, dict) and (told := [name for name, each in value.items() if each and each is not True]):
            raise DataError(
                f"it has {key!r}, with what a template is to write ({', '.join(told)}). It is not read here."
            )
        else:
            self.unused[key] += 1


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
