"""A chat model behind an OpenAI-compatible server (vLLM, llama.cpp, Ollama, ...): a class can share one GPU."""

import difflib
import os
from collections.abc import Iterator

from .errors import ChatmagicError
from .llm import ChatLLM

OPTIONS = {"max_new_tokens": "max_tokens", "temperature": "temperature", "top_p": "top_p", "seed": "seed"}


def connect(url: str, model: str, **settings) -> ChatLLM:
    """A ChatLLM over `model` at `url`, such as "http://localhost:8000/v1"; `settings` are ChatLLM's own.

    The key, where the server wants one, is read from the environment variable OPENAI_API_KEY.
    Nothing is sent before the first question.
    """
    return ChatLLM(ServerModel(url, model), **settings)


class ServerModel:
    """The chat model protocol of `llm.py` over the openai client."""

    context = None

    def __init__(self, url: str, model: str):
        from openai import OpenAI

        self.url, self.name = url, model
        key = os.environ.get("OPENAI_API_KEY", "none")  # the client insists on one, most local servers do not
        self._client = OpenAI(base_url=url, api_key=key, max_retries=1)

    def count(self, messages: list[dict]) -> None:
        """Only the server has the tokenizer."""

    def forget(self) -> None:
        """The server keeps nothing of ours."""

    def stream(self, messages: list[dict], stats, greedy: bool = False, **options) -> Iterator[str]:
        """The reply, in the pieces that the server sends. Raises ChatmagicError for whatever goes wrong there."""
        import openai

        if unknown := options.keys() - OPTIONS.keys():
            raise ChatmagicError(f"a server has no option {min(unknown)!r}; it has {', '.join(OPTIONS)}, greedy")
        if greedy:
            options["temperature"] = 0
        try:
            with self._client.chat.completions.create(
                model=self.name, messages=messages, stream=True, stream_options={"include_usage": True},
                **{OPTIONS[name]: value for name, value in options.items()},
            ) as chunks:
                for chunk in chunks:
                    if chunk.usage:
                        stats.tokens_in, stats.tokens_out = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
                    for choice in chunk.choices:
                        stats.stop_reason = choice.finish_reason or stats.stop_reason
                        if choice.delta.content:
                            yield choice.delta.content
        except openai.APITimeoutError:
            raise ChatmagicError(f"the server at {self.url} took too long to answer; ask again") from None
        except openai.APIConnectionError:
            raise ChatmagicError(
                f"no server answers at {self.url}: start it, or check the address given to chatmagic.connect"
            ) from None
        except openai.AuthenticationError:
            raise ChatmagicError(
                f"the server at {self.url} refused the key: set the environment variable OPENAI_API_KEY before "
                "chatmagic.connect"
            ) from None
        except openai.NotFoundError as error:
            raise ChatmagicError(f"{self.url} has no model {self.name!r}{self._nearest(error)}") from None
        except openai.APIError as error:
            raise ChatmagicError(f"the server at {self.url} failed: {error.message}") from None

    def _nearest(self, error) -> str:
        import openai

        try:
            names = [model.id for model in self._client.models.list()]
        except openai.APIError:
            return f": {error.message}"
        near = difflib.get_close_matches(self.name, names, 1, cutoff=0.3)
        return f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(names)}"
