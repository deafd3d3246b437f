"""What a model answered: the words, what is in them, what they cost and how they ended."""

import json
import re
from dataclasses import dataclass
from typing import Any

from ..errors import ChatmagicError


@dataclass
class Stats:
    """What a reply cost; None where a server does not tell."""

    tokens_in: int | None = None
    tokens_reused: int = 0  # of those in, how many had their keys and values kept from earlier turns
    tokens_out: int | None = None
    tokens_thought: int | None = None  # of those out, how many were thought and not said
    tokens_at_once: int = 1  # how many of those out came with the first piece, and were not timed one by one
    seconds_to_first_token: float | None = None
    seconds: float = 0.0
    stop_reason: str = "stop"  # or "length", "interrupted", "filtered", "refused", or a server's own word

    @property
    def tokens_per_second(self) -> float | None:
        """Speed of the tokens after the first piece; of all where all came at once."""
        if self.seconds_to_first_token is None or self.tokens_out is None or self.tokens_out < 2:
            return None
        if (timed := self.tokens_out - self.tokens_at_once) > 0:
            return timed / (self.seconds - self.seconds_to_first_token)
        return self.tokens_out / self.seconds

    def __str__(self) -> str:
        def known(value: float | None, form: str) -> str:
            return "?" if value is None else format(value, form)

        thought = f" ({self.tokens_thought} of them thought)" if self.tokens_thought else ""
        return (
            f"{known(self.tokens_in, 'd')} tokens in ({self.tokens_reused} kept), "
            f"{known(self.tokens_out, 'd')} out{thought}, first after {known(self.seconds_to_first_token, '.2f')} s, "
            f"{known(self.tokens_per_second, '.1f')} tokens/s, {self.stop_reason}"
        )


@dataclass
class Totals:
    """What all replies of a ChatLLM cost together, those that were stopped too; a server may not tell all."""

    replies: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0

    def add(self, stats: Stats) -> None:
        """Count one reply."""
        self.replies += 1
        self.tokens_in += stats.tokens_in or 0
        self.tokens_out += stats.tokens_out or 0
        self.seconds += stats.seconds


class Reply(str):
    """What the model said: a string, with what it was asked, by which name it answers, and what it cost; with what it
    thought first, and the notices that its reader was shown."""

    query: str
    model: str
    stats: Stats
    thinking: str
    notices: list[str]

    def json(self) -> Any:
        """The JSON that the reply is, or that a Markdown fence in it holds. Raises ChatmagicError if there is none."""
        fences = [fence["text"] for fence in FENCE.finditer(self)]
        failed: list[tuple[str, json.JSONDecodeError]] = []
        for text in (*fences, self, self.strip().strip("`").removeprefix("json")):
            try:
                return json.loads(text)
            except json.JSONDecodeError as error:
                failed.append((text, error))
            except RecursionError:
                raise ChatmagicError("the reply is JSON, but brackets within brackets without end") from None
        text, reason = failed[0]
        raise ChatmagicError(
            f"the reply is not JSON: {reason}; there it reads {text[reason.pos :][:30]!r}. It begins {self[:60]!r}. "
            "Ask for JSON alone, and allow enough tokens for all of it with --max-new-tokens"
        )

    def code(self) -> str:
        """The Python code in the reply's Markdown fences, those that name no language too; "" where there is none."""
        fences = (fence for fence in FENCE.finditer(self) if fence["language"].lower() in PYTHON)
        return "\n\n".join(fence["text"].strip("\n") for fence in fences)


FENCE = re.compile(
    r"^ {0,3}(?P<fence>`{3,}|~{3,})[ \t]*(?P<language>[^\s`]*)[^\n`]*\n"
    r"(?P<text>.*?)(?:^ {0,3}(?P=fence)[`~]*[ \t]*$|\Z)",
    re.MULTILINE | re.DOTALL,
)
PYTHON = ("", "python", "python3", "py", "ipython")


def ending(reply: Reply, max_new_tokens: int) -> str | None:
    """What the reader of a reply is to know of how it ended; None where it ended as replies do."""
    out, reason = reply.stats.tokens_out, reply.stats.stop_reason
    after = "" if out is None else f" after {out} tokens"
    more = "--max-new-tokens (max_new_tokens=) allows more"
    if reason == "length" and out is not None and out < max_new_tokens and reply.strip():
        more = "the context is full, and %chat_reset forgets the conversation"
    told = {
        "stop": "",
        "length": f"cut{after}: {more}",
        "filtered": f"cut{after} by a filter",
        "refused": "the model refused to answer",
    }.get(reason, f"ended by the server{after}: {reason}")
    if reply.strip():
        return told or None
    if reply.thinking or reply.stats.tokens_thought:
        return f"nothing was said, all went into the thought{after}; not remembered. {more}, or --thinking off"
    return f"the reply is empty, and is not remembered{told and f': {told}'}"
