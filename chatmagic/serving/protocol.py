"""How questions and replies are written at the address: OpenAI's Chat Completions API, and what vLLM adds to it."""

import json
import time
from collections.abc import Iterator
from typing import Annotated, Any, Literal
from uuid import uuid4

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from ..conversation.messages import Message
from ..conversation.reply import Reply, Stats

NEUTRAL: dict[str, Any] = {
    **{"n": 1, "frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "logprobs": False, "top_logprobs": 0},
    **{"response_format": {"type": "text"}, "modalities": ["text"], "tools": [], "functions": [], "store": False},
}
"""What the protocol knows and this server does not: each with the value that asks for nothing."""
UNREAD = {"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "service_tier"}
"""What changes no reply."""


def _text(content: Any) -> Any:
    """The text of a content that is a list of parts, each of them text; anything else as it is."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(
                f"only text is read here, a valid string or parts of type 'text' with one, and no {kind!r}"
            )
    return "".join(part["text"] for part in content)


def _texts(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


class Stated(BaseModel, extra="forbid"):
    """An object of a request: null is as good as nothing, and what is not known is refused."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given


class ChatMessage(Stated):
    """One message. What clients send back of a reply beside its words, empty lists and a thought, is not read."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text)]
    reasoning_content: str = ""
    refusal: Literal[""] = ""
    annotations: list[Any] = Field(default=[], max_length=0)
    tool_calls: list[Any] = Field(default=[], max_length=0)

    @property
    def message(self) -> Message:
        """As `ChatLLM.chat` takes it; developer is OpenAI's newer word for system."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class StreamOptions(Stated):
    """What a stream tells beside the reply."""

    include_usage: bool = False


class TemplateOptions(Stated):
    """vLLM's chat_template_kwargs: templates know the one or the other."""

    enable_thinking: bool | None = None
    thinking: bool | None = None


class Question(Stated):
    """The body of a request: every option that changes the reply is one of these fields, or refused."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_texts)] = []
    top_k: int | None = Field(None, ge=1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, allow_inf_nan=False)
    chat_template_kwargs: TemplateOptions = TemplateOptions()
    thinking_budget: int | None = Field(None, ge=0)
    thinking_token_budget: int | None = Field(None, ge=0)  # this and the next: as vLLM and llama.cpp call it
    thinking_budget_tokens: int | None = Field(None, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _without_what_says_nothing(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        said = {name: value for name, value in body.items() if name not in UNREAD}
        said = {name: value for name, value in said.items() if name not in NEUTRAL or value != NEUTRAL[name]}
        if not body.get("tools"):  # without tools there is no choice of them
            said = {name: value for name, value in said.items() if name not in ("tool_choice", "parallel_tool_calls")}
        return said

    @model_validator(mode="after")
    def _ends_with_a_question(self) -> "Question":
        if self.messages[-1].role != "user":
            raise ValueError("the last message must be the user's: there is nothing to reply to")
        return self

    @property
    def options(self) -> dict[str, Any]:
        """As `ChatLLM.chat` takes them; None for what was not said."""
        budgets = self.thinking_budget, self.thinking_token_budget, self.thinking_budget_tokens
        told = self.chat_template_kwargs
        return {
            **{name: getattr(self, name) for name in ("temperature", "top_p", "seed", "top_k", "min_p")},
            "repetition_penalty": self.repetition_penalty,
            "max_new_tokens": self.max_completion_tokens or self.max_tokens,
            "thinking": told.thinking if told.enable_thinking is None else told.enable_thinking,
            "thinking_budget": next((budget for budget in budgets if budget is not None), None),
            "stop": self.stop or None,
        }


class Written:
    """One reply as it is written, at once or as events of a stream."""

    def __init__(self, model: str) -> None:
        self._head = {"id": f"chatcmpl-{uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, reply: Reply) -> dict[str, Any]:
        """The body of a reply that is not streamed."""
        message = {"role": "assistant", "content": str(reply)} | thought(reply.thinking)
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reply.stats.stop_reason}
        return self._head | {"object": "chat.completion", "choices": [choice], "usage": usage(reply.stats)}

    def piece(self, delta: dict[str, str], finish_reason: str | None = None) -> str:
        """An event with a piece of the reply."""
        return self._event([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}])

    def end(self, stats: Stats, with_usage: bool) -> Iterator[str]:
        """The last events."""
        yield self.piece({}, stats.stop_reason)
        if with_usage:
            yield self._event([], usage=usage(stats))
        yield "data: [DONE]\n\n"

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> str:
        return event(self._head | {"object": "chat.completion.chunk", "choices": choices} | more)


def event(data: dict[str, Any]) -> str:
    """An event of a stream (WHATWG's server-sent events)."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def thought(text: str) -> dict[str, str]:
    """The field for what the model thought, by DeepSeek's and vLLM's name; none for no thought."""
    return {"reasoning_content": text} if text else {}


def usage(stats: Stats) -> dict[str, Any]:
    """The counts of tokens."""
    tokens_in, tokens_out = stats.tokens_in or 0, stats.tokens_out or 0
    return {
        "prompt_tokens": tokens_in,
        "completion_tokens": tokens_out,
        "total_tokens": tokens_in + tokens_out,
        "prompt_tokens_details": {"cached_tokens": stats.tokens_reused},
        "completion_tokens_details": {"reasoning_tokens": stats.tokens_thought or 0},
    }


def error(
    message: str, kind: str = "invalid_request_error", code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """The body of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
