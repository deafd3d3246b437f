"""ChatLLM: a conversation with a chat model, local or behind a server."""

import json
from collections.abc import Callable, Generator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import ChatmagicError
from ..files import write
from .messages import Message, build_messages, validate_messages
from .printing import Printer
from .registry import register

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Stats:
    """What a reply cost; None where a server does not tell."""

    tokens_in: int | None = None
    tokens_reused: int = 0  # of those in, how many had their keys and values kept from earlier turns
    tokens_out: int | None = None
    seconds_to_first_token: float | None = None
    seconds: float = 0.0
    stop_reason: str = "stop"  # or "length", "interrupted"

    @property
    def tokens_per_second(self) -> float | None:
        """Speed of the tokens after the first."""
        if self.seconds_to_first_token is None or self.tokens_out is None or self.tokens_out < 2:
            return None
        return (self.tokens_out - 1) / (self.seconds - self.seconds_to_first_token)

    def __str__(self) -> str:
        def known(value: float | None, form: str) -> str:
            return "?" if value is None else format(value, form)

        return (
            f"{known(self.tokens_in, 'd')} tokens in ({self.tokens_reused} kept), "
            f"{known(self.tokens_out, 'd')} out, first after {known(self.seconds_to_first_token, '.2f')} s, "
            f"{known(self.tokens_per_second, '.1f')} tokens/s, {self.stop_reason}"
        )


class Reply(str):
    """What the model said: a string, with what it was asked, by which name it answers, and what it cost."""

    query: str
    model: str
    stats: Stats

    def json(self) -> Any:
        """The reply parsed as JSON, in a Markdown fence or not. Raises ChatmagicError if it is none."""
        text = self.strip()
        if text.startswith("```") and text.endswith("```"):
            text = text[3:-3].removeprefix("json")
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ChatmagicError(
                f"the reply is not JSON: {error}. It begins {self[:60]!r}. Ask for JSON alone, and allow "
                "enough tokens for all of it with --max-new-tokens"
            ) from None


class Interrupted(KeyboardInterrupt):
    """Stop, or Ctrl-C, ended a reply; `reply` is what there was of it. The conversation is as before."""

    _render_traceback_ = ChatmagicError._render_traceback_

    def __init__(self, reply: Reply) -> None:
        out = reply.stats.tokens_out
        after = "" if out is None else f" after {out} tokens"
        super().__init__(f"stopped by you{after}; the conversation is as it was before")
        self.reply = reply


LIMITS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": (lambda value: isinstance(value, int) and value >= 1, "a whole number, 1 or more"),
    "temperature": (lambda value: value >= 0, "0 (greedy) or more"),
    "top_p": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
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
        """Pieces of the reply as they come; fills the token counts and stop reason of `stats`."""

    def forget(self) -> None:
        """Free what is kept of the conversation."""


class ChatLLM:
    """A conversation with a causal language model of transformers, or its PEFT wrapper, and its tokenizer.

    `model_type` names a chat template (see `get_template`), by default the one that fits model and tokenizer.
    The last `max_chat_rounds` rounds are remembered in `history`, a list of (query, reply). `stream` says
    whether replies are printed as they come. Creating one registers it under `name`, by default that of
    the model's folder, and in a notebook makes it the one `%%chat` talks to; nothing is sent to the
    model. `fast=False` answers by transformers' own `generate`, plainly. `thinking` tells a model that can be told
    so to think or not; None: as it was trained, else its own default. Without a tokenizer, `model` is a `ChatModel`.
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
        self.name = name or self.backend.name
        register(self)

    build_messages = staticmethod(build_messages)

    def build_prompt(self, messages: list[Message], add_generation_prompt: bool = True) -> str:
        """The prompt as a string. The model is sent ids: see `encode_prompt`. Raises ChatmagicError for a server's."""
        validate_messages(messages)
        if (template := getattr(self.backend, "template", None)) is None:
            raise ChatmagicError(f"only the server has the chat template of {self.name}")
        return "".join(span.text for span in template.render(messages, add_generation_prompt, self.thinking))

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
        check: Callable[[Reply], object] | None = None,
        **generation: Any,
    ) -> Reply:
        """Ask `query` in the conversation so far, and remember the round; arguments as for `chat`.

        `new=True` forgets the conversation first, `remember=False` asks outside it. `check` is called with the
        reply before it is remembered, and may raise. A turn that fails in any way, or is interrupted, leaves the
        history as it was, with `new` too. When rounds outgrow the model's context the oldest are left out of the
        prompt.
        """
        system = self.system if system is None else system
        room = generation.get("max_new_tokens", self.max_new_tokens)
        before = [] if new else self.history
        told = self._told(generation)
        shown = self._rounds_that_fit(before, query, system, room, told) if remember else []
        stream = self.stream if stream is None else stream
        reply = self.chat(build_messages(query, shown, system), stream, **generation)
        if check:
            check(reply)
        self.history = self._last_rounds([*before, (query, reply)]) if remember else before
        return reply

    def chat(self, messages: list[Message], stream: bool | Callable[[str], None] = False, **generation: Any) -> Reply:
        """The reply to `messages`, history untouched.

        `stream=True` prints it as it comes; a function is called with every piece of text instead.
        `generation`: `max_new_tokens`, `temperature`, `top_p`, `seed`, `greedy`, `thinking`, for a local model also
        any other field of transformers' `GenerationConfig`; what is not given is as the model's own has it.
        Raises ChatmagicError for an option that is out of its range, and Interrupted, which has the part there is, in
        the place of a KeyboardInterrupt.
        """
        shown = Printer() if stream is True else nullcontext(stream or (lambda piece: None))
        stats, pieces, start = Stats(), [], perf_counter()
        interrupted = False
        generation = {"max_new_tokens": self.max_new_tokens, **generation, **self._told(generation)}
        for option, (possible, expected) in LIMITS.items():
            if option in generation and not possible(value := generation[option]):
                raise ChatmagicError(f"{option} must be {expected}, not {value!r}")
        try:
            with shown as write, closing(self.backend.stream(messages, stats, **generation)) as stream_of_text:
                for piece in stream_of_text:
                    stats.seconds_to_first_token = stats.seconds_to_first_token or perf_counter() - start
                    if piece:
                        pieces.append(piece)
                        write(piece)
        except KeyboardInterrupt:
            stats.stop_reason, interrupted = "interrupted", True
        stats.seconds = perf_counter() - start
        reply = Reply("".join(pieces))
        reply.query, reply.model, reply.stats = messages[-1]["content"], self.name, stats
        if interrupted:
            raise Interrupted(reply)
        return reply

    def reset(self) -> None:
        """Forget the conversation, and free the keys and values kept of it."""
        self.history = []
        self.backend.forget()

    def round_tokens(self) -> list[int | None]:
        """Tokens of each round in `history`, role marks included; None where only a server could count."""
        ends = [
            self.backend.count(build_messages("", self.history[:index], self.system))
            for index in range(len(self.history) + 1)
        ]
        return [None if start is None or end is None else end - start for start, end in pairwise(ends)]

    def save(self, path: str | Path) -> None:
        """Write system text and history as a line of JSON, `{"messages": [...]}`: also a row to train on.

        Raises WriteError, and leaves what was there, where the file cannot be written; ChatmagicError for a text
        that UTF-8 cannot hold.
        """
        line = json.dumps({"messages": build_messages(None, self.history, self.system)}, ensure_ascii=False)
        try:
            write(path, f"{line}\n")
        except UnicodeError as error:
            raise ChatmagicError(f"the conversation cannot be saved: {error}") from None

    def load(self, path: str | Path) -> None:
        """Take system text and history from a file of `save`'s. Raises ChatmagicError where it cannot."""
        try:
            (line,) = Path(path).expanduser().read_text(encoding="utf-8").removesuffix("\n").split("\n")
            messages = json.loads(line)["messages"]
        except OSError as error:
            raise ChatmagicError(f"the conversation cannot be read: {error}") from None
        except (ValueError, LookupError, TypeError):
            raise ChatmagicError(f'{path} is not one line of JSON of the form {{"messages": [...]}}') from None
        validate_messages(messages)
        system = messages.pop(0)["content"] if messages[0]["role"] == "system" else None
        if messages[-1]["role"] != "assistant":
            raise ChatmagicError(f"{path} ends with a question that was not answered; remove its last message")
        contents = [message["content"] for message in messages]
        self.history, self.system = list(zip(contents[::2], contents[1::2])), system

    def _last_rounds(self, history: list[tuple[str, str]]) -> list[tuple[str, str]]:
        return history[max(0, len(history) - self.max_chat_rounds) :]

    def _told(self, generation: dict[str, Any]) -> dict[str, bool]:
        """Whether the model is told to think or not, as an option; nothing where nobody says."""
        thinking = generation.get("thinking")
        thinking = self.thinking if thinking is None else thinking
        return {} if thinking is None else {"thinking": thinking}

    def _rounds_that_fit(
        self, history: list[tuple[str, str]], query: str, system: str | None, max_new_tokens: int, told: dict[str, bool]
    ) -> list[tuple[str, str]]:
        """The last rounds that leave room in the context for `max_new_tokens`, at most half of it."""
        history = self._last_rounds(history)
        if self.backend.context is not None:
            limit = self.backend.context - min(max_new_tokens, self.backend.context // 2)
            while history and (self.backend.count(build_messages(query, history, system), **told) or 0) > limit:
                history = history[1:]
        return history

    def __repr__(self) -> str:
        return f"<ChatLLM {self.name!r}: {len(self.history)} rounds>"
