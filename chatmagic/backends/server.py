"""A chat model behind an OpenAI-compatible server, such as vLLM or Ollama: a class can share one GPU."""

import re
from collections.abc import Generator, Iterator
from contextlib import closing
from email.utils import parsedate_to_datetime
from math import ceil
from pathlib import Path
from time import sleep, time
from typing import TYPE_CHECKING, Any

from ..conversation.llm import ChatLLM
from ..conversation.messages import Message
from ..conversation.pieces import Notice, Parting, Thought
from ..conversation.reply import Stats
from ..errors import ChatmagicError
from .connection import OVERFLOW, Connection, body_of
from .wire import (
    DONE,
    BrokenEvent,
    NoReply,
    choices_in,
    error_in,
    number_in,
    read_events,
    text_in,
    thought_and_words,
)

if TYPE_CHECKING:
    import httpx2

FIELDS = {"max_new_tokens": "max_tokens"} | {name: name for name in ("temperature", "top_p", "seed", "stop")}
BROKE_OFF = "broke off in the middle of a reply; ask again"
LONGEST_WAIT = 120
"""Seconds that a server which says it is busy is waited for, all in all."""
ENDINGS = {
    "content_filter": "filtered",
    "sensitive": "filtered",
    "safety": "filtered",
    "refusal": "refused",
    "max_tokens": "length",
    "model_length": "length",
    "model_context_window_exceeded": "length",
    "eos": "stop",
    "eos_token": "stop",
    "end_turn": "stop",
    "stop_sequence": "stop",
    "stop": "stop",
    "length": "length",
}
"""What servers call the ends of replies; they send their own word for others."""
UNWANTED = re.compile(
    r"unsupported|not support|unknown|unrecogni[sz]ed|unexpected|not (permitted|allowed|available|implemented)|"
    r"deprecated|no longer|instead|must be false|to false|disabled|invalid|cannot be|must be verified|"
    r"不(支持|允许|能)|无效|非法|未知",
    re.IGNORECASE,
)
NO_MONEY = re.compile(r"quota|balance|billing|credit|arrear|欠费|余额", re.IGNORECASE)
"""Of a refusal that no waiting mends."""


def connect(
    url: str,
    model: str,
    key: str | None = None,
    *,
    timeout: float = 600,
    headers: dict[str, str] | None = None,
    extra_body: dict[str, Any] | None = None,
    context: int | None = None,
    verify: bool | str | Path = True,
    proxy: str | bool | None = None,
    **settings: Any,
) -> ChatLLM:
    """A ChatLLM over `model` at `url`; `settings` are ChatLLM's own.

    url         such as "http://localhost:8000/v1", or a name: chatmagic (`chatmagic serve`), vllm, ollama, llama.cpp,
                lmstudio, deepseek, dashscope, siliconflow, openai (see `presets.SERVERS`)
    key         by default what the environment has for that host: CHATMAGIC_KEY_ and the host's name (as in
                CHATMAGIC_KEY_LOCALHOST), the variable that is the custom of such a server, OPENAI_API_KEY for OpenAI
    timeout     seconds until the first, and between two pieces of a reply
    headers     added to every request
    extra_body  added to the body of every request
    context     tokens that prompt and reply may have together; the oldest rounds are then left out by an estimate,
                which each reply's count of tokens corrects
    verify      False: any certificate is taken; a file or folder: of the certificates to trust besides this machine's
    proxy       its address; False: none; by default that of the environment, which this machine and its network pass by

    Nothing is sent before the first question. Raises ChatmagicError for what cannot be asked.
    """
    connection = Connection(url, key, timeout, headers, verify, proxy)
    return ChatLLM(ServerModel(connection, model, extra_body, context), **settings)


def models_at(url: str, key: str | None = None) -> list[str]:
    """The names of the models at an address; both are as for `connect`. Raises ChatmagicError where none can be had."""
    return Connection(url, key, 60, None, True, None).models()


class ServerModel:
    """The chat model protocol of `llm.py` over HTTP; what it takes beside the connection is as for `connect`."""

    def __init__(
        self, connection: Connection, model: str, extra_body: dict[str, Any] | None, context: int | None
    ) -> None:
        if not isinstance(model, str) or not model.strip():
            raise ChatmagicError(f"connect takes the name of a model after the address, not {model!r}")
        if context is not None and (not isinstance(context, int) or context < 1):
            raise ChatmagicError(f"context must be a number of tokens, not {context!r}")
        if not isinstance(extra_body or {}, dict):
            raise ChatmagicError(f"extra_body must be a dict of fields, not {extra_body!r}")
        self._connection, self.name, self.context = connection, model, context
        self._extra = extra_body or {}
        self._max_tokens = "max_tokens"  # what the server calls it; OpenAI's newer models want another word
        self._left_out: set[str] = set()  # what it refused in requests
        self._tokens_per_byte = 1 / 3  # some three bytes are a token: a Chinese character, most of an English word

    def count(self, messages: list[Message], thinking: bool | None = None) -> int | None:
        """Tokens of the prompt, estimated where `context` was given; only the server has the tokenizer."""
        return ceil(_bytes(messages) * self._tokens_per_byte) if self.context else None

    def forget(self) -> None:
        """The server keeps nothing of ours."""

    def stream(
        self,
        messages: list[Message],
        stats: Stats,
        greedy: bool = False,
        thinking: bool | None = None,
        thinking_budget: int | None = None,
        **options: Any,
    ) -> Generator[str, None, None]:
        """The reply, in the pieces that the server sends; its thoughts apart, whichever way it sends them.

        A busy server is waited for, with a notice; what it does not know of a request, but a reply does not need, is
        left out then and later. Raises ContextOverflow, and ChatmagicError for what else goes wrong, each cause in its
        words.
        """
        if unknown := options.keys() - FIELDS.keys():
            raise ChatmagicError(
                f"a server has no option {min(unknown)!r}; it has {', '.join(FIELDS)}, greedy, thinking and "
                "thinking_budget. Fields of its own go into connect(..., extra_body=)"
            )
        if greedy:
            options["temperature"] = 0
        request = {FIELDS[name]: value for name, value in options.items()}
        request |= {"model": self.name, "messages": messages}
        request |= self._told(thinking, thinking_budget) | self._extra
        response = yield from self._ask(request)
        with closing(response):
            yield from self._hear(response, messages, stats)
        if thinking_budget is not None and (stats.tokens_thought or 0) > thinking_budget + 16:
            yield Notice(f"thought {stats.tokens_thought} tokens: the server does not keep to a budget")

    def _told(self, thinking: bool | None, budget: int | None) -> dict[str, Any]:
        """What is added to a request for these; a number of tokens to think is by itself a wish to."""
        if budget is None:
            return {} if thinking is None else self._connection.server.told(thinking)
        if not self._connection.server.budgets:
            raise ChatmagicError(
                f"{self._connection.host} takes no thinking_budget; max_new_tokens bounds thought and words"
            )
        return self._connection.server.told(thinking is not False) | dict.fromkeys(
            self._connection.server.budgets, budget
        )

    def _ask(self, request: dict[str, Any]) -> "Generator[Notice, None, httpx2.Response]":
        """The response to a request, asked again for as long as that may help."""
        waited, pause = 0.0, 1.0
        while True:
            response = self._connection.post(self._as_wanted(request))
            if response.is_success:
                return response
            with closing(response):
                said, status = self._connection.words(body_of(response)), response.status_code
            if status in (429, 503) and not NO_MONEY.search(said):
                pause = _seconds(response.headers.get("retry-after")) or min(pause * 2, 30)
                busy = f"is busy{said and f' ({said[:60]})'}"
                if waited + pause > LONGEST_WAIT:
                    raise self._connection.failure(f"{busy}; ask again in {pause:.0f} s")
                yield Notice(f"{self._connection.host} {busy}: asked again in {pause:.0f} s")
                sleep(pause)
                waited += pause
            elif status not in (400, 422, 501) or not self._learn(said):
                raise self._connection.refusal(status, said, self.name, response.headers.get("location", ""))

    def _as_wanted(self, request: dict[str, Any]) -> dict[str, Any]:
        body = {"stream": True, "stream_options": {"include_usage": True}} | request
        if "max_tokens" in body:
            body[self._max_tokens] = body.pop("max_tokens")
        return {name: value for name, value in body.items() if name not in self._left_out}

    def _learn(self, said: str) -> bool:
        """Whether what the server refuses is no part of the question, and is now said otherwise, or not at all."""
        named = re.search("stream_options|include_usage|max_completion_tokens", said)  # by us alone, or to be used
        if OVERFLOW.search(said) or not (named or UNWANTED.search(said)):
            return False
        if re.search(r"\bmax_tokens\b", said):
            before, self._max_tokens = self._max_tokens, "max_completion_tokens"
            return before != self._max_tokens
        for field, pattern in ("stream_options", r"stream_options|include_usage"), ("stream", r"(?i)\bstream(ing)?\b"):
            if re.search(pattern, said) and field not in self._left_out:
                self._left_out |= {"stream_options", field}
                return True
        return False

    def _hear(self, response: "httpx2.Response", messages: list[Message], stats: Stats) -> Generator[str, None, None]:
        """The pieces of a reply; fills `stats`."""
        parting, finished, hidden, whole, refused, first = Parting(), "", 0, False, False, None
        heard: set[type] = set()  # the kinds of pieces there were
        for event in self._events(response):
            if error := error_in(event):
                refusal = self._connection.refusal(400, self._connection.words(error), self.name)
                raise ChatmagicError(str(refusal)) if heard else refusal  # no question is asked again in mid-reply
            if event is DONE:
                finished = finished or "stop"
            if isinstance(usage := event.get("usage"), dict):
                stats.tokens_in = number_in(usage.get("prompt_tokens"))
                stats.tokens_out = number_in(usage.get("completion_tokens"))
                details = usage.get("completion_tokens_details")
                hidden = number_in(details.get("reasoning_tokens")) or 0 if isinstance(details, dict) else 0
            for choice in choices_in(event):
                if choice.get("index", first) != (first := choice.get("index") if first is None else first):
                    continue  # of several replies the first is shown
                again = heard and "delta" in choice  # the whole once more, at the end of a stream
                message = None if again else choice.get("message")
                whole = message is not None
                finished = text_in(choice.get("finish_reason")) or finished or "stop" * whole
                said = choice.get("delta") or message or {"content": choice.get("text")}
                thought, words = thought_and_words(said)
                if thought:
                    parting.apart()
                if isinstance(said, dict) and (declined := text_in(said.get("refusal"))):
                    words, refused = words + declined, True
                for piece in [Thought(thought)] * bool(thought) + parting.push(words):
                    heard.add(type(piece))
                    yield piece
        for piece in parting.flush():
            heard.add(type(piece))
            yield piece
        if not finished and response.headers.get("transfer-encoding") != "chunked":  # whose end is marked
            raise self._connection.failure(BROKE_OFF)
        stats.stop_reason = "refused" if refused else ENDINGS.get(finished.lower(), finished or "stop")
        stats.tokens_thought = hidden or None
        if whole:
            stats.tokens_at_once = stats.tokens_out or 1
        elif Thought not in heard:
            stats.tokens_at_once += hidden  # they were thought before the first piece came
        if stats.tokens_in:
            self._tokens_per_byte = stats.tokens_in / _bytes(messages)

    def _events(self, response: "httpx2.Response") -> Iterator[dict[str, Any]]:
        """The objects in a response. Raises ChatmagicError for what is no reply, and for a reply that breaks off."""
        import httpx2

        try:
            yield from read_events(response.iter_bytes())
        except NoReply as no_reply:
            reason = f"answered what is no reply: {self._connection.words(str(no_reply))[:200]!r}"
            if str(no_reply).lstrip().startswith("<"):  # a page of some other program
                reason = self._connection.not_found(self.name)
        except httpx2.TimeoutException:
            reason = self._connection.too_slow()
        except (BrokenEvent, httpx2.HTTPError):
            reason = BROKE_OFF
        else:
            return
        raise self._connection.failure(reason)


def _seconds(after: str | None) -> float | None:
    """What a Retry-After header asks to wait: a number of seconds, or a date."""
    try:
        return max(float(after or ""), 1.0)
    except ValueError:
        pass
    try:
        return max(parsedate_to_datetime(after or "").timestamp() - time(), 1.0)
    except ValueError:
        return None


def _bytes(messages: list[Message]) -> int:
    """The bytes of the messages in UTF-8, and some for what a chat template writes around each."""
    return sum(len(message["content"].encode("utf-8", "replace")) + 12 for message in messages)
