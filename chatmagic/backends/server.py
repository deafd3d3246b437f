"""A chat model behind an OpenAI-compatible server, such as vLLM or Ollama: a class can share one GPU."""

import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from typing import Any

from ..conversation.llm import ChatLLM, Stats
from ..errors import ChatmagicError
from ..text import nearest

FIELDS = {"max_new_tokens": "max_tokens", "temperature": "temperature", "top_p": "top_p", "seed": "seed"}
BROKE_OFF = "broke off in the middle of a reply; ask again"


def connect(url: str, model: str, **settings: Any) -> ChatLLM:
    """A ChatLLM over `model` at `url`, such as "http://localhost:8000/v1"; `settings` are ChatLLM's own.

    The key, where the server wants one, is read from the environment variable OPENAI_API_KEY.
    Nothing is sent before the first question.
    """
    return ChatLLM(ServerModel(url, model), **settings)


class ServerModel:
    """The chat model protocol of `llm.py` over the openai client."""

    context = None

    def __init__(self, url: str, model: str) -> None:
        from openai import OpenAI

        self.url, self.name = url, model
        key = os.environ.get("OPENAI_API_KEY") or "none"  # the client wants one, most local servers do not
        self._client = OpenAI(base_url=url, api_key=key, max_retries=1)

    def count(self, messages: list[dict], thinking: bool | None = None) -> None:
        """Only the server has the tokenizer."""

    def forget(self) -> None:
        """The server keeps nothing of ours."""

    def stream(
        self, messages: list[dict], stats: Stats, greedy: bool = False, thinking: bool | None = None, **options: Any
    ) -> Generator[str, None, None]:
        """The reply, in the pieces that the server sends. `thinking` goes to the chat template there, as vLLM and
        llama.cpp take it. Raises ChatmagicError for what goes wrong there."""
        if unknown := options.keys() - FIELDS.keys():
            raise ChatmagicError(f"a server has no option {min(unknown)!r}; it has {', '.join(FIELDS)}, greedy")
        if greedy:
            options["temperature"] = 0
        request = {FIELDS[name]: value for name, value in options.items()}
        if thinking is not None:
            told = {"enable_thinking": thinking, "thinking": thinking}  # templates know the one or the other
            request["extra_body"] = {"chat_template_kwargs": told}
        request |= {"model": self.name, "messages": messages, "stream": True}
        finished = None
        with self._errors_in_words("does not answer: start it, or check the address that connect was given"):
            chunks = self._client.chat.completions.create(**request, stream_options={"include_usage": True})
        with chunks, self._errors_in_words(BROKE_OFF):
            for chunk in chunks:
                if usage := chunk.usage:
                    stats.tokens_in, stats.tokens_out = usage.prompt_tokens, usage.completion_tokens
                for choice in chunk.choices:
                    finished = choice.finish_reason or finished
                    if choice.delta.content:
                        yield choice.delta.content
        if finished is None:
            raise ChatmagicError(f"the server at {self.url} {BROKE_OFF}")
        stats.stop_reason = finished

    @contextmanager
    def _errors_in_words(self, lost: str) -> Iterator[None]:
        """The client's exceptions as ChatmagicError; `lost` tells of a connection that was not, or no longer."""
        import openai

        try:
            yield
        except openai.APITimeoutError:
            reason = "took too long to answer; ask again"
        except (openai.APIConnectionError, JSONDecodeError):  # the latter for half an event
            reason = lost
        except openai.AuthenticationError:
            reason = "refused the key: set OPENAI_API_KEY before chatmagic.connect"
        except openai.NotFoundError:
            reason = f"has no model {self.name!r}: {self._nearest()}"
        except openai.APIError as error:
            reason = f"failed: {error.message}"
        else:
            return
        raise ChatmagicError(f"the server at {self.url} {reason}")

    def _nearest(self) -> str:
        import openai

        try:
            names = [model.id for model in self._client.models.list()]
        except openai.APIError:
            return "it has not even a list of them, so the address may lack its /v1"
        return "it has " + ", ".join(nearest(self.name, names, cutoff=0))
