"""What a base model itself answers to the general questions, which training replays. Asked once a model, kept as
it comes.

    python -m chatmagic.course.replies PROFILE

asks anew, and writes what the package ships: `replies.json`, {fingerprint of the model's folder: {question: reply}}.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..conversation.messages import build_messages
from ..files import make_folder, write
from ..machine import courses
from ..models.provenance import base_fingerprint
from ..progress import Bar
from .evaluate import ask
from .persona import LANGUAGES, questions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHIPPED = Path(__file__).with_suffix(".json")
TOKENS, BATCH = 64, 16


def own_replies(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> list[tuple[str, str]]:
    """(question, reply) for each general question that is replayed: the base model's own words, at most 64 tokens.

    They depend on nobody's name: those of the embedded model come with the package, others are kept beside the
    courses after each batch, by the fingerprint of the model's folder. What is there is not asked again.
    """
    folder = Path(model.name_or_path)
    asked, replies = replayed(), shipped_replies(folder)
    kept = courses() / "replies" / f"{folder.name}-{(base_fingerprint(folder) or 'quantised')[:12]}.json"
    if kept.is_file():
        replies |= json.loads(kept.read_text(encoding="utf-8"))
    missing = sorted((query for query in asked if query not in replies), key=len)  # a batch is as slow as its longest
    if missing:
        make_folder(kept.parent)
        with Bar(total=len(missing), desc="the model's own replies") as bar:
            for start in range(0, len(missing), BATCH):
                found = answered(model, tokenizer, missing[start : start + BATCH])
                replies |= dict(found)
                write(kept, json.dumps(replies, ensure_ascii=False, indent=0))
                bar.update(len(found))
    return [(query, replies[query]) for query in asked if replies[query]]


def replayed() -> list[str]:
    """The questions that the base model answers itself, in both languages."""
    return [
        query for language in LANGUAGES for kind in ("replay", "near_replay") for query in questions()[language][kind]
    ]


def answered(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", asked: list[str]) -> list[tuple[str, str]]:
    """(question, reply) of each question: one that is longer than 64 tokens ends with its last whole sentence."""
    replies = ask(model, tokenizer, [build_messages(query) for query in asked], TOKENS)
    return [
        (query, last_sentence(reply[:-1]) if reply.endswith("…") else reply) for query, reply in zip(asked, replies)
    ]


def last_sentence(text: str) -> str:
    """The text up to the last mark that ends a sentence; all of it where there is none."""
    return text[: 1 + max(text.rfind(mark) for mark in ".!?。！？")] or text


def shipped_replies(folder: Path) -> dict[str, str]:
    """What the package brings for the model in `folder`, whoever put it there."""
    known: dict[str, dict[str, str]] = json.loads(SHIPPED.read_text(encoding="utf-8")) if SHIPPED.is_file() else {}
    return known.get(base_fingerprint(folder) or "", {})


def main(name: str) -> None:
    """Ask the profile's model everything again, and write what the package ships."""
    from ..models.load import load_model
    from .download import snapshot_download

    model, tokenizer = load_model(folder := snapshot_download(name))
    asked = sorted(replayed(), key=len)
    found: dict[str, str] = {}
    for start in Bar(range(0, len(asked), BATCH)):
        found |= dict(answered(model, tokenizer, asked[start : start + BATCH]))
    every = json.loads(SHIPPED.read_text(encoding="utf-8")) | {base_fingerprint(folder): found}
    write(SHIPPED, json.dumps(every, ensure_ascii=False, indent=0) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
