"""The keys of a row: which part of a conversation each is, which of them decide, and what to type where that is not
clear."""

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from ..text import did_you_mean
from .rows import DataError

# What the parts of a row are called, as `plain` writes it; the first of each is the name that messages to the reader
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
PART_OF = {name: part for part, names in PARTS.items() for name in names}
WEAK = ("data", "items", "turns", "chat")  # what else may be called so
SPEAKING, SAYING = {"role", "from", "speaker"}, {"content", "value", "text"}

# Keys, as `plain` writes them, whose values decide. What a text cannot stand for is refused by name, unless it is
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

# What a question is about, where it is none of the parts.
_ABOUT = {*"context contexts passage passages document documents article paragraph paragraphs content".split()}
_ABOUT |= {
    *"options choices evidence background story premise hypothesis material materials 材料 选项 上下文 背景".split()
}
_CHOICES = {f"{before}{letter}" for before in ("", "option_", "op") for letter in "abcdef"}
_INSTRUCTING = {*"task instruct instructions definition directive command".split()}  # an "input"


class Plan(NamedTuple):
    """The keys of a row: {part: key} of those that are read, those whose values decide, those that the question may be
    about, and the others."""

    read: dict[str, str]
    decide: list[str]
    about: list[str]
    unused: list[str]


class Ambiguous(DataError):
    """Two columns could be the same part."""


class Keys:
    """What the keys of rows are, with one choice of columns.

    names: {a key: its part} of the columns that were chosen. seen: the keys of all rows so far.
    """

    def __init__(self, columns: Mapping[str, str] | Iterable[str] | None = None) -> None:
        """columns: as `read_conversations` takes them. Raises DataError where they name nothing that is known here."""
        self.names = _named(columns)
        self.seen: set[str] = set()
        self.plan = lru_cache(maxsize=1024)(self._plan)

    def _plan(self, keys: tuple[str, ...]) -> Plan:
        """What the keys of a row are. Raises DataError where they are no conversation, Ambiguous for two of a kind."""
        self.seen.update(map(str, keys))
        found: dict[str, list[str]] = {part: [] for part in PARTS}
        for key in keys:
            if part := self.names.get(key) or PART_OF.get(plain(key)):
                found[part].append(key)
        for part in found:
            found[part] = [key for key in found[part] if key in self.names] or found[part]
        read = {part: found[part][0] for part in ("system", "history") if found[part]}
        about: list[str] = []
        if found["messages"] and (found["messages"][0] not in WEAK or not found["question"]):
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
            preferred = [key for key in keys if decides(key) == "preference" and key not in self.names]
            chosen = {"question", "answer"} <= set(self.names.values())
            names = {plain(key): key for key in keys if key not in self.names}
            dolly = "context" in names and "output" not in names and plain(question[:1]) == "instruction" and not chosen
            if not question or not answer or dolly:
                raise DataError(preference(map(str, keys)) if preferred else _unknown(keys, question, answer))
            if not chosen:
                beside = _ABOUT | (_INSTRUCTING if asked_by_input else set())
                beside |= _CHOICES if len(_CHOICES & names.keys()) > 1 else set()
                about = [key for name, key in names.items() if name in beside]
            if (
                found["input"]
                and plain(question[0]) != "instruction"
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
        decide = [key for key in left if decides(key)]
        return Plan(read, decide, about, [str(key) for key in left if key not in decide])

    def _check_named(self, keys: tuple[str, ...], found: dict[str, list[str]]) -> None:
        """Raise DataError where a column that was named is missing and another would be taken for it."""
        for part, candidates in found.items():
            named = [key for key, of in self.names.items() if of == part]
            if named and candidates and not {*named} & {*candidates}:
                raise DataError(_no_column(named[0], keys))

    def unseen(self) -> str | None:
        """What to say of a column that was named and stood in no row."""
        missing = [name for name in self.names if name not in self.seen]
        return _no_column(missing[0], self.seen) if missing else None


@lru_cache(maxsize=4096)
def _spelt(key: str) -> str:
    return re.sub(r"[\W_]+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key)).strip("_").lower()


def plain(key: object) -> str:
    """A key as it is compared: of "System Prompt", "systemPrompt" and "system-prompt", system_prompt."""
    return _spelt("".join(key) if isinstance(key, list) else str(key))


@lru_cache(maxsize=4096)
def decides(key: str) -> str | None:
    """What the value of a key decides, a name of `_DECIDING`; "template" where it is what a chat template is given."""
    name = _spelt(str(key))
    if name.endswith("kwargs"):
        return "template"
    return next((kind for kind, pattern in _DECIDES.items() if pattern.fullmatch(name)), None)


def is_row(turn: dict[str, Any], weak: bool) -> bool:
    """Whether what lies in a list is a row, with messages of its own, rather than a message or a round. weak: the list
    has a name that might be anything's."""
    names = {plain(key) for key in turn}
    if names & {"role", "from", "speaker"}:
        return False
    return weak or any(isinstance(value, list) and PART_OF.get(plain(key)) == "messages" for key, value in turn.items())


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
        theirs, ours = (one, other) if other in PART_OF else (other, one)
        if ours not in PART_OF:
            raise DataError(
                f"columns={{{one!r}: {other!r}}} names nothing that is known here. Expected a column of the file and "
                f"what it is: {', '.join(names[0] for names in PARTS.values())}."
            )
        found[theirs] = PART_OF[ours]
    return found


def _rank(part: str, key: str) -> int:
    name = plain(key)
    return PARTS[part].index(name) if name in PARTS[part] else -1


def beside_the_question(key: str, read: dict[str, str]) -> str:
    """What to say of a key that the question may be about, in a row of which these were read."""
    return (
        f"{key!r} stands beside the question. If it belongs to it, say so: "
        f'columns={{{key!r}: "{"instruction" if plain(key) in _INSTRUCTING else "input"}"}}; if not: '
        f'columns={{{read["question"]!r}: "query", {read["answer"]!r}: "response"}}.'
    )


def preference(row: Iterable[str]) -> str:
    """What to say of a row with these keys, of which some name one of two answers."""
    names = list(row)
    keys = [key for key in names if decides(key) == "preference"]
    chosen = (key for key in names if re.fullmatch("(?!.*score).*(chosen|(^|_)(?<!non_)(?<!dis)prefer).*", plain(key)))
    answers = (key for key in names if key not in keys and PART_OF.get(plain(key)) == "answer")
    good = next(chosen, None) or next(answers, "messages")
    part = "messages" if "messages" in good else "response"
    return (
        f"preference data ({', '.join(keys)}): one of two answers is the bad one. To learn the good ones alone, name "
        f'their column: columns={{"{good}": "{part}"}}.'
    )


def _unknown(keys: tuple[str, ...], question: list[str], answer: list[str]) -> str:
    found = f"found {_listed(keys) or 'nothing'}"
    names = {plain(key) for key in keys}
    if SPEAKING & names and SAYING & names:
        return f"the row is one message ({_listed(keys)}); expected a whole conversation, the list of its messages."
    if question and plain(question[0]) == "instruction":
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


def _no_column(name: str, keys: Iterable[str]) -> str:
    """What to say where `columns` names one that is not among `keys`."""
    return f"there is no column {name!r}{did_you_mean(name, map(str, keys)) or '.'} Found {_listed(keys)}."


def _listed(keys: Iterable[object]) -> str:
    names = sorted(map(str, keys))
    return ", ".join(names[:12]) + (f" and {len(names) - 12:,} more" if len(names) > 12 else "")
