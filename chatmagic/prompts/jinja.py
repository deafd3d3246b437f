"""A tokenizer's Jinja chat template, rendered so that one can tell afterwards who wrote what.

Private-use characters go through the template with the messages: one for each control token in them, and pairs
around an answer's words and around its thought.
"""

import ctypes
import re
import threading
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from ..conversation.messages import Message
from .templates import Span, TemplateError, control_pattern, control_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PRIVATE = "[\U00100000-\U0010fffd]"
_FIRST_STAND_IN, BEGIN, END, THOUGHT, THOUGHT_END = 0x100000, "\U0010fffc", "\U0010fffd", "\U0010fffa", "\U0010fffb"
QUESTION, CLOSING = "\U0010fff9", "\n</think>\n\n"
ANSWER = re.compile(f"{BEGIN}([^{BEGIN}{END}]*){END}")
# What opens and closes a thought is hidden in words even where the tokenizer has no token for it: templates cut there.
TAG = re.compile(r"</?(?:\w+:)?think(?:ing)?(?::\w+)?>")
MARKS = dict.fromkeys((BEGIN, END, THOUGHT, THOUGHT_END), "")
_MARKS, _STAND_INS = re.compile(f"[{''.join(MARKS)}]"), re.compile(f"({PRIVATE})")
SECONDS = 10.0
"""How long a template may take over one rendering; a template is somebody's program."""


class Renderer:
    """`apply_chat_template` of one tokenizer, with hidden messages."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self.source = tokenizer.get_chat_template()
        control = control_tokens(tokenizer, self.source)
        hidden = sorted({*control, *TAG.findall(self.source)}, key=len, reverse=True)
        self._hide = re.compile("|".join([*map(re.escape, hidden), PRIVATE]))
        self.control = re.compile(control_pattern(tokenizer, control))
        self.bos = tokenizer.bos_token if tokenizer.bos_token != tokenizer.eos_token else None

    def __call__(self, conversation: Sequence[Message], add_generation_prompt: bool, **switches: Any) -> str:
        """The text. Raises TemplateError for whatever goes wrong in the template, endless loops included."""
        if self._parts:
            conversation = [_in_parts(message) for message in conversation]
        return self._render(conversation, add_generation_prompt, **switches)

    @cached_property
    def _parts(self) -> bool:
        """Whether the template reads words only in a list of parts, as some of models that see too."""
        message = {"role": "user", "content": QUESTION}
        return (
            re.search(r"\btype\b", self.source) is not None
            and not self._shows(message)
            and self._shows(_in_parts(message))
        )

    def _shows(self, message: Message) -> bool:
        try:
            return QUESTION in self._render([message], True)
        except TemplateError:
            return False

    def _render(self, conversation: Sequence[Message], add_generation_prompt: bool, **switches: Any) -> str:
        try:
            with time_limit(SECONDS):
                text: str = self._tokenizer.apply_chat_template(
                    conversation, tokenize=False, add_generation_prompt=add_generation_prompt, **switches
                )
                return text
        except Exception as error:  # Jinja's own, and any that Python raises in a template: TypeError, ...
            said = str(error) or type(error).__name__
            raise TemplateError(f"The tokenizer's chat template refuses the conversation: {said}") from error

    def common(self, one: str, other: str) -> int:
        """How far two texts agree, in whole tokens and tags."""
        ends = range(1, min(len(one), len(other)) + 1)
        end = bisect_left(ends, True, key=lambda end: one[:end] != other[:end])
        for pattern in (self.control, TAG):
            for text in (one, other):
                cut = next(
                    (m.start() for m in pattern.finditer(text, max(0, end - 80)) if m.start() < end < m.end()), end
                )
                end = min(end, cut)
        return end

    def hide(self, messages: Sequence[Message], style: str | None = None) -> "Hidden":
        """The messages with the private characters in them.

        A thought goes where the template looks for it, by `style`: "key", into `reasoning_content`; "content", before
        the words, between tags that are the template's own; None, nowhere.
        """
        stand_ins: dict[str, str] = {}

        def stand_in(match: re.Match[str]) -> str:
            return stand_ins.setdefault(match[0], chr(_FIRST_STAND_IN + len(stand_ins)))

        hidden, thoughts = [], []
        for message in messages:
            shown = {
                key: self._hide.sub(stand_in, value) if isinstance(value, str) and key != "role" else value
                for key, value in message.items()
            }
            thought = shown.pop("reasoning_content", None)
            if message["role"] == "assistant":  # the whitespace around it stays outside: templates strip it
                before, words, after = _stripped(shown["content"])
                shown["content"] = before + BEGIN + words + END + after
                if thought is not None:
                    thought = THOUGHT + thought.strip() + THOUGHT_END
                    if style == "key":
                        shown["reasoning_content"] = thought
                    elif style == "content":
                        shown["content"] = f"<think>\n{thought}{CLOSING}{shown['content']}"
            hidden.append(shown)
            thoughts.append(thought)
        return Hidden(hidden, thoughts, {char: text for text, char in stand_ins.items()} | MARKS)


class Hidden(NamedTuple):
    """Messages as a template gets them; their thoughts, None where there is none, marked; and what each private
    character stands for."""

    messages: list[Message]
    thoughts: list[str | None]
    shown: dict[str, str]


def _in_parts(message: Message) -> Message:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _stripped(text: str) -> tuple[str, str, str]:
    """The whitespace before a text, the text, and that behind."""
    words = text.strip()
    before, _, after = text.partition(words) if words else (text, "", "")
    return before, words, after


def spans_of(text: str, shown: dict[str, str], *marks: bool) -> list[Span]:
    """Text that a template wrote, as spans with these `marks` (answer, trained, replayed); the private characters in
    it are someone's words."""
    parts = _STAND_INS.split(_MARKS.sub("", text))
    return [Span(shown.get(part, part), part not in shown, *marks) for part in parts if part]


class _TooLong(BaseException):
    pass


class _Watch:
    """One thread that raises _TooLong in every other that is longer at something than it may be."""

    def __init__(self) -> None:
        self._deadlines: dict[int, float] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def begin(self, seconds: float) -> None:
        with self._lock:
            self._deadlines[threading.get_ident()] = time.monotonic() + seconds
            if not self._thread or not self._thread.is_alive():  # a forked process has none
                self._thread = threading.Thread(target=self._watch, daemon=True, name="chat template watch")
                self._thread.start()

    def end(self) -> None:
        with self._lock:
            in_time = self._deadlines.pop(threading.get_ident(), None) is not None
        while not in_time:  # what was raised arrives within a few instructions
            time.sleep(0)

    def _watch(self) -> None:
        while True:
            time.sleep(0.2)
            with self._lock:
                for thread, deadline in list(self._deadlines.items()):
                    if time.monotonic() > deadline:
                        del self._deadlines[thread]
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_TooLong))


_watch = _Watch()


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError if the Python code in it takes longer."""
    try:
        _watch.begin(seconds)
        try:
            yield
        except _TooLong:
            raise  # it has arrived: nothing to wait for
        except BaseException:
            _watch.end()
            raise
        _watch.end()
    except _TooLong:
        raise TimeoutError(f"it was not done after {seconds:g} s") from None
