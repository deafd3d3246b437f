"""Conversations as lists of `{"role": ..., "content": ...}`: how to build them, what they must look like."""

from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import ChatmagicError

ROLES = ("system", "user", "assistant")
Message = dict[str, Any]
"""`role` and `content`, both strings; what else stands in one is for those who know it."""


class MessagesError(ChatmagicError):
    """A conversation that no chat template can render; the text names the message's index."""


def build_messages(
    query: str | None = None,
    history: Iterable[tuple[str, str]] | None = None,
    system: str | None = None,
) -> list[Message]:
    """The conversation that asks `query` after `history`, a list of (query, reply) pairs, under a `system` text."""
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    for question, reply in history or ():
        messages += {"role": "user", "content": question}, {"role": "assistant", "content": reply}
    return messages if query is None else [*messages, {"role": "user", "content": query}]


def merge_system(messages: Sequence[Message]) -> list[Message]:
    """The messages, the system text that comes first put into the first question: for a family that knows none."""
    first = {**messages[1], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
    return [first, *messages[2:]]


def validate_messages(messages: Sequence[Message]) -> None:
    """Raise MessagesError unless `messages` is at most one system text, then user and assistant in turn."""
    if not isinstance(messages, (list, tuple)):
        raise MessagesError(f"The messages are of type {type(messages).__name__}; expected a list of dicts.")
    if not messages:
        raise MessagesError("The list of messages is empty; expected at least one user message.")
    expected: tuple[str, ...] = ("system", "user")
    for index, message in enumerate(messages):
        try:
            role, content = message["role"], message["content"]
        except (TypeError, KeyError):
            found = f"keys {sorted(message)}" if isinstance(message, dict) else type(message).__name__
            raise MessagesError(f"Message {index} must be a dict with 'role' and 'content'; found {found}.") from None
        if role not in expected:
            known = "" if role in ROLES else f" Roles are {', '.join(ROLES)}."
            raise MessagesError(f"Message {index} has role {role!r}; expected {' or '.join(expected)}.{known}")
        if not isinstance(content, str):
            raise MessagesError(
                f"Message {index} ({role}) has content of type {type(content).__name__}; expected a string."
            )
        expected = ("assistant",) if role == "user" else ("user",)
    if role == "system":
        raise MessagesError(f"Message {index} has role 'system' and nothing follows; expected user.")
