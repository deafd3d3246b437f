"""ChatLLM: a conversation with a chat model, local or behind a server."""

import json
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, closing, nullcontext
from itertools import pairwise
from math import isfinite
from numbers import Integral, Real
from pathlib import Path
from threading import RLock
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import ChatmagicError
from ..files import write
from ..text import mend
from .messages import Message, build_messages, validate_messages
from .pieces import Heard, Notice, mended
from .printing import Printer
from .registry import register
from .reply import Reply, Stats, Totals, ending

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ContextOverflow(ChatmagicError):
    """The messages are more than the model's context holds."""


class Interrupted(KeyboardInterrupt):
    """Stop, or Ctrl-C, ended a reply; `reply` is what there was of it. The conversation is as before."""

    _render_traceback_ = ChatmagicError._render_traceback_

    def __init__(self, reply: Reply) -> None:
        out = reply.stats.tokens_out
        after = "" if out is None else f" after {out} tokens"
        super().__init__(f"stopped by you{after}; the conversation is as it was before")
        self.reply = reply


def _number(value: Any, whole: bool = False) -> bool:
    return isinstance(value, Integral if whole else Real) and not isinstance(value, bool) and isfinite(value)


def _texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(text, str) and text for text in value)


LIMITS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": (lambda value: _number(value, whole=True) and value >= 1, "a whole number, 1 or more"),
    "temperature": (lambda value: _number(value) and value >= 0, "a number, 0 (greedy) or more"),
    "top_p": (lambda value: _number(value) and 0 < value <= 1, "a number above 0 and at most 1"),
    "seed": (lambda value: _number(value, whole=True) and value >= 0, "a whole number, 0 or more"),
    "greedy": (lambda value: isinstance(value, bool), "True or False"),
    "thinking": (lambda value: isinstance(value, bool), "True or False"),
    "thinking_budget": (lambda value: _number(value, whole=True) and value >= 0, "a whole number, 0 or more"),
    "stop": (_texts, "a list of texts, none of them empty"),
}
"""What the options that all models have may be, and how an error says so."""


class ChatModel(Protocol):
    """What ChatLLM asks of a model; `LocalModel`, `ServerModel` and a test's fake are such."""

    name: str
    context: int | None  # tokens that prompt and reply may have together, if known

    def count(self, messages: list[Message], thinking: bool | None = None) -> int | None:
        """Tokens of the prompt, if that can be known."""

    def stream(
        self, messages: list[Message], stats: Stats, max_new_tokens: int, **options: Any
    ) -> Generator[str, None, None]:
        """Pieces of the reply as they come, words, thoughts and notices (see `pieces.py`); fills the token counts and
        stop reason of `stats`. Raises ContextOverflow, before the first piece, for messages that are too long."""

    def forget(self) -> None:
        """Free what is kept of the conversation."""


class ChatLLM:
    """A conversation with a causal language model of transformers, or its PEFT wrapper, and its tokenizer.

    `model_type` names a chat template (see `get_template`), by default the one that fits model and tokenizer.
    Up to `max_chat_rounds` rounds are remembered in `history`, a list of (query, reply); beyond that the oldest quarter
    goes at once, since each time all that was kept of the later rounds must be computed anew. `system` is the system
    text; a reply has `max_new_tokens` tokens at most. `stream` says whether replies are printed as they come. Creating
    one registers it under `name`, by default that of the model's folder, and
    in a notebook makes it the one `%%chat` talks to; nothing is sent to the model. `fast=False` answers by
    transformers' own `generate`, plainly. `thinking` tells a model that can be told so to think or not; None: as it was
    trained, else its own default. Without a tokenizer, `model` is a `ChatModel`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        model_type: str | None = None,
        max_chat_rounds: int = 20,
        max_new_tokens: int = 512,
        stream: bool = True,
        history: list[tuple[str, str]] | None = None,
        system: str | None = None,
        name: str | None = None,
        fast: bool = True,
        thinking: bool | None = None,
    ) -> None:
        self.model, self.tokenizer, self.model_type = model, tokenizer, model_type
        if tokenizer is None:
            self.backend: ChatModel = model
        else:
            from ..backends.generate import LocalModel

            self.backend = LocalModel(model, tokenizer, model_type, fast)
        self.thinking = thinking
        self.max_chat_rounds, self.max_new_tokens, self.stream = max_chat_rounds, max_new_tokens, stream
        self.history = list(history or [])
        self.system = system
        self.totals = Totals()
        self.asked: str | None = None  # the last question, answered or not
        self.partial: Reply | None = None  # what there was of its reply, if that was stopped
        self._answer: tuple[str, str] | None = None  # the round that it made
        self._partial_after: list[tuple[str, str]] = []  # the rounds that it was to follow
        self._turn = RLock()  # two threads in one conversation: one asks, the other waits
        self._oldest_shown: tuple[str, str] | None = None  # the round that a full context begins with
        self.name = name or self.backend.name
        register(self)

    build_messages = staticmethod(build_messages)

    def build_prompt(self, messages: list[Message], add_generation_prompt: bool = True) -> str:
        """The prompt of `messages` as a string, with what leads to an answer if `add_generation_prompt`. The model is
        sent ids: see `encode_prompt`. Raises ChatmagicError for a server's."""
        validate_messages(messages)
        if (render := getattr(self.backend, "render", None)) is None:
            raise ChatmagicError(f"only the server has the chat template of {self.name}")
        prompt: str = render(messages, add_generation_prompt, self.thinking)
        return prompt

    def build_inputs_labels(self, messages: list[Message], multi_rounds: bool = True) -> tuple[list[int], list[int]]:
        """Ids and labels of a conversation for training: see `chatmagic.build_inputs_labels`."""
        from ..prompts.labels import build_inputs_labels

        return build_inputs_labels(messages, self.tokenizer, self.model_type, multi_rounds, thinking=self.thinking)

    def __call__(
        self,
        query: str,
        stream: bool | Callable[[str], None] | None = None,
        system: str | None = None,
        remember: bool = True,
        new: bool = False,
        round: int | None = None,
        check: Callable[[Reply], object] | None = None,
        **generation: Any,
    ) -> Reply:
        """Ask `query` in the conversation so far, and remember the round. `stream` and `system` stand in place of the
        conversation's own; `generation`, and what is raised, as for `chat`.

        `new=True` forgets the conversation first, `round=N` its N-th round, 1 being the first, and all after it;
        `remember=False` asks outside it. `check` is called with the reply before it is remembered, and may raise. A
        turn that fails in any way, or is interrupted, leaves the history as it was, with `new` too; what there was of a
        reply that was interrupted is `partial` until the next turn. An empty reply is not remembered. When rounds
        outgrow the model's context the oldest are left out of the prompt; the reply's notices say so where only the
        server could tell.
        """
        system = self.system if system is None else system
        validate_messages(build_messages(query, system=system))
        query, options = mend(query), self._options(generation)
        with (
            self._turn if remember or new else nullcontext(),
            _shown(self.stream if stream is None else stream) as write,
        ):
            before, heard, dropped = self._before(1 if new else round), Heard(write), 0
            self.asked, self.partial, self._partial_after, self._answer = query, None, before, None
            shown = self._rounds_that_fit(before, query, system, options) if remember else []
            while True:
                try:
                    reply = self._reply(build_messages(query, shown, system), heard, options)
                    break
                except ContextOverflow:
                    if not shown:
                        raise
                    half = (len(shown) + 1) // 2
                    shown, dropped = shown[half:], dropped + half
                    self._oldest_shown = shown[0] if shown else None
                except Interrupted as stopped:
                    self.partial = stopped.reply
                    raise
            if dropped:
                heard(Notice(f"{self.name}'s context is full: the {dropped} oldest rounds were left out"))
            if check:
                check(reply)
            if remember and reply.strip():
                self._answer = (query, reply)
                before = self._last_rounds([*before, self._answer])
            self.history = before
        return reply

    def _before(self, round: int | None) -> list[tuple[str, str]]:
        """The rounds before that one; all of them if None."""
        if round is not None and not 1 <= round <= max(1, len(self.history)):
            raise ChatmagicError(f"there is no round {round}: the conversation has {len(self.history)}")
        return self.history if round is None else self.history[: round - 1]

    @property
    def answered(self) -> int | None:
        """The number of the round that the last question made; None where it failed, was asked outside or undone."""
        made = self.history and (self.asked is None or self.history[-1] is self._answer)
        return len(self.history) if made else None

    def keep(self) -> None:
        """Remember the question whose reply was stopped, and what there was of that. Raises ChatmagicError if none was,
        or nothing was said."""
        if self.partial is None or not self.partial.strip():
            raise ChatmagicError("no part of a reply is there to keep: the last one was not stopped, or not begun")
        self.history = self._last_rounds([*self._partial_after, (self.partial.query, self.partial)])
        self.partial = None

    def chat(self, messages: list[Message], stream: bool | Callable[[str], None] = False, **generation: Any) -> Reply:
        """The reply to `messages`, history untouched.

        `stream=True` prints it as it comes; a function is called with every piece of text instead: with words, and
        with the `Thought` and `Notice` of `pieces.py`, which are strings too.
        `generation`: `max_new_tokens`, `temperature`, `top_p`, `seed`, `greedy`, `thinking`, `thinking_budget` (in
        tokens), `stop` (texts before the first of which the words end), for a local model also the fields of
        transformers' `GenerationConfig` that say how a token is chosen; what is not given, or None, is as the model's
        own has it.
        Raises MessagesError for messages that are none, ChatmagicError for an option that is out of its range,
        ContextOverflow for messages that are too long, and Interrupted, which has the part there is, in the place of a
        KeyboardInterrupt.
        """
        with _shown(stream) as write:
            return self._reply(messages, Heard(write), self._options(generation))

    def _options(self, generation: dict[str, Any]) -> dict[str, Any]:
        """The options, with what this ChatLLM has for those that nobody gave."""
        given = {name: value for name, value in generation.items() if value is not None}
        options = {"max_new_tokens": self.max_new_tokens, "thinking": self.thinking} | given
        options = {name: value for name, value in options.items() if value is not None}
        for option, (possible, expected) in LIMITS.items():
            if option in options and not possible(value := options[option]):
                raise ChatmagicError(f"{option} must be {expected}, not {value!r}")
        return options

    def _reply(self, messages: list[Message], heard: Heard, options: dict[str, Any]) -> Reply:
        validate_messages(messages)
        messages = [{**message, "content": mend(message["content"])} for message in messages]
        stats, start, interrupted = Stats(), perf_counter(), False
        try:
            with closing(self.backend.stream(messages, stats, **options)) as pieces:
                for piece in mended(pieces):
                    if stats.seconds_to_first_token is None and not isinstance(piece, Notice):
                        stats.seconds_to_first_token = perf_counter() - start
                    heard(piece)
        except KeyboardInterrupt:
            stats.stop_reason, interrupted = "interrupted", True
        stats.seconds = perf_counter() - start
        self.totals.add(stats)
        reply = Reply("".join(heard.said))
        reply.query, reply.model, reply.stats = messages[-1]["content"], self.name, stats
        reply.thinking, reply.notices = "".join(heard.thought).strip(), heard.notices
        if interrupted:
            raise Interrupted(reply)
        if told := ending(reply, options["max_new_tokens"]):
            heard(Notice(told))
        return reply

    def reset(self) -> None:
        """Forget the conversation, and free the keys and values kept of it."""
        self.history, self.partial = [], None
        self.backend.forget()

    def round_tokens(self) -> list[int | None]:
        """Tokens of each round in `history`, role marks included; None where only a server could count."""
        ends = [
            self.backend.count(build_messages("", self.history[:index], self.system))
            for index in range(len(self.history) + 1)
        ]
        return [None if start is None or end is None else end - start for start, end in pairwise(ends)]

    def save(self, path: str | Path) -> None:
        """Write system text and history to `path` as a line of JSON, `{"messages": [...]}`: also a row to train on.

        Raises WriteError, and leaves what was there, where the file cannot be written; ChatmagicError for a text
        that UTF-8 cannot hold.
        """
        line = json.dumps({"messages": build_messages(None, self.history, self.system)}, ensure_ascii=False)
        try:
            write(_file(path), f"{line}\n")
        except UnicodeError as error:
            raise ChatmagicError(f"the conversation cannot be saved: {error}") from None

    def load(self, path: str | Path) -> None:
        """Take system text and history from `path`, a file of `save`'s. Raises ChatmagicError where it cannot."""
        path = _file(path)
        try:
            messages = json.loads(path.read_text(encoding="utf-8-sig"))["messages"]
        except OSError as error:
            raise ChatmagicError(f"the conversation cannot be read: {error}") from None
        except (ValueError, LookupError, TypeError, RecursionError):
            raise ChatmagicError(f'{path} is not JSON of one conversation, {{"messages": [...]}}') from None
        validate_messages(messages)
        system = messages.pop(0)["content"] if messages[0]["role"] == "system" else None
        if messages[-1]["role"] != "assistant":
            raise ChatmagicError(f"{path} ends with a question that was not answered; remove its last message")
        contents = [message["content"] for message in messages]
        self.history, self.system = list(zip(contents[::2], contents[1::2])), system
        self.asked = self.partial = None

    def _last_rounds(self, history: list[tuple[str, str]]) -> list[tuple[str, str]]:
        most = self.max_chat_rounds
        return history if len(history) <= most else history[len(history) - (most - most // 4) :]

    def _rounds_that_fit(
        self, history: list[tuple[str, str]], query: str, system: str | None, options: dict[str, Any]
    ) -> list[tuple[str, str]]:
        """The last rounds that leave room in the context for `max_new_tokens`, at most half of it.

        Where they no longer do, so many are left out that the next turns have room as well, a quarter of the whole, and
        begin as this one does; but one round stays if it can.
        """
        history = self._last_rounds(history)
        first = next((index for index, each in enumerate(history) if each is self._oldest_shown), 0)
        if self.backend.context is None:
            return history[first:]
        limit = self.backend.context - min(options["max_new_tokens"], self.backend.context // 2)
        told = {"thinking": options["thinking"]} if "thinking" in options else {}

        def tokens(first: int) -> int:
            return self.backend.count(build_messages(query, history[first:], system), **told) or 0

        if history and tokens(first) > limit:
            first, last = first + 1, len(history) - 1
            while first <= last and tokens(first) > limit * (1 if first == last else 0.75):
                first += 1
        self._oldest_shown = history[first] if first < len(history) else None
        return history[first:]

    def __repr__(self) -> str:
        return f"<ChatLLM {self.name!r}: {len(self.history)} rounds>"


def _file(path: str | Path) -> Path:
    """The path, `~` resolved. Raises ChatmagicError for that of a folder."""
    path = Path(path).expanduser()
    if path.is_dir():
        raise ChatmagicError(f"{path} is a folder: name a file in it, such as {path / 'chat.jsonl'}")
    return path


def _shown(stream: bool | Callable[[str], None]) -> AbstractContextManager[Callable[[str], None]]:
    """Who is called with the pieces of a reply."""
    return Printer() if stream is True else nullcontext(stream or (lambda piece: None))
