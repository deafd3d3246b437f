"""Does what answers there know who it is? A folder, a GGUF file or an address, asked some questions of `evaluate`."""

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..backends.presets import SERVERS
from ..backends.server import connect, models_at
from ..conversation.messages import Message, build_messages
from ..errors import ChatmagicError
from .persona import LANGUAGES, Persona, holds, questions

Answer = Callable[[Sequence[list[Message]]], list[str]]
"""Greedy replies to conversations."""
KINDS = ("trained", "heldout", "near", "retention")
REPLY_TOKENS = 48
"""Tokens of a reply, as in `evaluate`."""


class Asked(NamedTuple):
    """One question: `right` says of a reply whether it is; where it is given, `reply` is it."""

    kind: str
    language: str
    question: str
    right: Callable[[str], bool]
    reply: str = ""


def examine(answer: Answer, persona: Persona, kinds: Collection[str] = KINDS) -> list[Asked]:
    """What was asked in both languages, each question alone, and what `answer` said, a function of conversations.
    kinds: of these four.

    trained: the nine questions. heldout: paraphrases that were never trained. near: what sounds like them and is
    not about the model; right is what does not speak of the new self. retention: right is what holds the fact.
    """
    asked = [each for language in LANGUAGES for each in _questions(persona, language) if each.kind in kinds]
    replies = answer([build_messages(each.question) for each in asked])
    return [each._replace(reply=reply) for each, reply in zip(asked, replies, strict=True)]


def _questions(persona: Persona, language: str) -> Iterator[Asked]:
    def is_quiet(reply: str, asked: str) -> bool:
        return not persona.leaks(asked, reply)

    for kind in ("trained", "heldout"):
        for topic, question in persona.asked(kind, language):
            yield Asked(kind, language, question, partial(persona.knows, topic, language=language))
    for question in questions()[language]["near"]:
        yield Asked("near", language, question, partial(is_quiet, asked=question))
    for question, *facts in questions()[language]["retention"]:
        yield Asked("retention", language, question, partial(holds, words=facts))


def find_answer(target: str, model: str | None = None) -> Answer:
    """Who answers at `target`: the model or adapter in a folder, a GGUF file, or `model` at an address, by default its
    only one. Raises ChatmagicError for what is none of these, and what opening it raises."""
    path = Path(target).expanduser()
    if "://" in target or target in SERVERS:  # before a folder of such a name: this package's own is one
        names = [model] if model else models_at(target)
        if len(names) > 1:
            raise ChatmagicError(f"Several models answer at {target}: choose with --model {' | '.join(names)}")
        llm = connect(target, names[0])
    elif model:
        raise ChatmagicError(f"--model chooses among those at an address, and {target} is none: leave it out")
    elif path.is_dir():
        from ..models.load import load_trained
        from .evaluate import ask

        return partial(ask, *load_trained(path), max_new_tokens=REPLY_TOKENS)
    elif path.suffix == ".gguf":
        from ..backends.gguf import open_gguf

        llm = open_gguf(path)
    else:
        raise ChatmagicError(f"{target} is no folder that is here, no GGUF file, and no address such as http://HOST/v1")

    def answer(conversations: Sequence[list[Message]]) -> list[str]:
        replies, options = [], dict[str, Any](greedy=True, max_new_tokens=REPLY_TOKENS)
        for messages in conversations:
            reply = llm.chat(messages, **options)
            if reply.thinking and not reply.strip() and "thinking" not in options:
                options["thinking"] = False  # as `evaluate` asks one that thinks
                reply = llm.chat(messages, **options)
            replies.append(str(reply))
        return replies

    return answer
