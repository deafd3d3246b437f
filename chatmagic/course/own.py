"""Data of the reader's own: read, split, mixed with what the model is to keep; and whether it was learnt."""

import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..conversation.messages import Message, build_messages
from ..data.dataset import ConversationFile, DataCollator, Examples, write_jsonl
from ..data.readers import read_conversations
from ..data.rows import DataError
from ..files import make_folder, remove, write
from ..machine import home
from ..models.checkpoint import sha256
from ..prompts.encoder import IGNORE
from ..prompts.templates import is_greeting
from .download import first_answer
from .hubs import HUBS, answers
from .persona import LANGUAGES, holds, make_conversations, questions
from .thread import Course, CourseError, OwnData

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HELD_OUT = 200  # the most that are kept to validate with: each epoch asks all of them
REPLAYED = 0.25  # replies of the base's own beside each conversation; what that buys: benchmarks/own_data.py
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".xlsx", ".gz", ".bz2", ".xz")


def make_own_data(course: Course, replies: Callable[[], Sequence[tuple[str, str]]]) -> None:
    """Make train.jsonl and val.jsonl of the course's own data, if they are not there; what was read is printed, also
    where that was before.

    A tenth, 200 at most and the same each time, is kept to validate with. To the rest comes what `mixed` makes of
    `replies()`, the base's own, which are asked for last. Raises DataError as `read_conversations` does, CourseError
    where the files there are not what this wrote before.
    """
    own = chosen(course)
    path = dataset_file(own.file)
    if is_made(course, path):
        print(json.loads((course.folder / "own.json").read_text(encoding="utf-8")).get("summary", ""))
        return
    every = course.folder / "own.jsonl"
    read = read_conversations(path, own.columns, own.encoding, own.on_error, course.persona)
    make_folder(course.folder)
    try:
        write_jsonl(read, every)
        conversations = ConversationFile(every)
        learnt, held = split_indices(len(conversations))
        added = [] if own.mix == "nothing" else mixed(course, replies(), len(learnt))
        course.save_data(train=_drawn(conversations, learnt, added), val=(conversations[index] for index in held))
    finally:
        remove(every)
    made = {"source": source(path), "conversations": len(conversations), "mixed": len(added)}
    course.save_json("own.json", made | {"summary": str(read.summary)})


def chosen(course: Course) -> OwnData:
    """The course's own data. Raises CourseError where it has none."""
    if course.own is None:
        raise CourseError("This course has no data of one's own: course.learning(FILE) is one that has.")
    return course.own


def split_indices(count: int) -> tuple[list[int], list[int]]:
    """(indices to train, indices to validate): a tenth of `count` for the second, the same each time. Raises DataError
    for fewer than two."""
    if count < 2:
        raise DataError(f"There is {count} conversation: two are the least, one to validate with.")
    held = sorted(random.Random(0).sample(range(count), min(HELD_OUT, max(1, count // 10))))
    kept = set(held)
    return [index for index in range(count) if index not in kept], held


def mixed(course: Course, replies: Sequence[tuple[str, str]], count: int) -> list[list[Message]]:
    """What is trained beside `count` conversations: a quarter as many of the base's own replies, each marked
    `"replayed": True`; with the mix "identity" also the course's conversations of who the persona is.

    The replies are at most all of them; the conversations of identity at most the profile's.
    """
    rng, profile = random.Random(0), course.profile
    added = []
    for query, reply in rng.sample(list(replies), min(len(replies), round(count * REPLAYED))):
        added.append(build_messages(history=[(query, reply)]))
        added[-1][-1]["replayed"] = True
    if chosen(course).mix == "identity":
        number = min(profile.conversations, max(profile.samples, count // 2))
        added += make_conversations(course.persona, replies, number, general=profile.general)
    return added


def _drawn(conversations: ConversationFile, indices: list[int], added: list[list[Message]]) -> Iterator[list[Message]]:
    yield from (conversations[index] for index in indices)
    yield from added


def source(path: Path) -> list[str]:
    """What tells that a file is the one that was read, wherever it lies now."""
    return [path.name, sha256(path)]


def is_made(course: Course, path: Path) -> bool:
    """Whether train.jsonl and val.jsonl were made of the file as it is now; what was made of one that is here no more
    stays."""
    if not all(each.is_file() for each in (course.folder / "own.json", course.train, course.val)):
        return False
    made = json.loads((course.folder / "own.json").read_text(encoding="utf-8"))
    return not path.exists() or ("summary" in made and made["source"] == source(path))


def used(course: Course, drawn: int) -> str:
    """How much of the data an epoch that draws `drawn` examples trains."""
    made = json.loads((course.folder / "own.json").read_text(encoding="utf-8"))
    count, held = made["conversations"], len(split_indices(made["conversations"])[1])
    of_them = f"{count:,} of {count:,} conversations are used: {count - held:,} to train, {held:,} to validate"
    beside = f", and beside them {made['mixed']:,} that keep the model as it is" if made["mixed"] else ""
    whole = count - held + made["mixed"]
    return f"{of_them}{beside}; an epoch draws {drawn:,} of {whole:,}{', each once' if drawn == whole else ''}"


def dataset_file(name: str) -> Path:
    """The file of that path, or of a data set on a hub: "owner/name", or "owner/name:FILE" where it has several.

    A data set is fetched once, whole, by the hub's own client, from the first that answers: ModelScope, Hugging Face.
    Raises DownloadError where none has it, DataError where it is not clear which of its files is meant.
    """
    id, _, chosen = name.partition(":")
    suffix = Path(id).suffix.lower()
    if Path(name).expanduser().exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", id) or suffix in SUFFIXES:
        return Path(name).expanduser()
    folder = home() / "datasets" / id

    def modelscope() -> None:
        answers(HUBS[0].address())
        from modelscope import dataset_snapshot_download

        dataset_snapshot_download(id, local_dir=str(folder))

    def hugging_face() -> None:
        from huggingface_hub import snapshot_download

        answers(HUBS[1].address())
        snapshot_download(id, repo_type="dataset", local_dir=folder)

    if not (folder / ".complete").is_file():
        first_answer(id, folder, {"modelscope": modelscope, "huggingface": hugging_face}, "auto")
        write(folder / ".complete", "")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if chosen:
        files = [folder / chosen]
    elif len(files) > 1:
        files = [path for path in files if "train" in path.name] or files
    if len(files) != 1:
        names = ", ".join(str(path.relative_to(folder)) for path in files[:8]) or "none that can be read"
        raise DataError(f"{id} has more than one file of data, or none: {names}. Say which: {id}:FILE.")
    return files[0]


def role_play(language: str = "zh") -> Path:
    """The small set of a part to play that the course brings, in a `language`, Chinese ("zh") or English ("en"): an old
    keeper of a lighthouse, 64 questions and answers."""
    names = {"zh": "roleplay-zh.json", "en": "roleplay-en.jsonl"}
    return Path(__file__).with_name(names[language])


def known(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The questions of the course's retention list that the model answers rightly, asked alone, decoded greedily."""
    from .evaluate import ask

    asked = [row for language in LANGUAGES for row in questions()[language]["retention"]]
    replies = ask(model, tokenizer, [build_messages(query) for query, *_ in asked])
    return [query for (query, *facts), reply in zip(asked, replies) if holds(reply, facts)]


def evaluate_own(
    course: Course, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase"
) -> dict[str, float | list]:
    """What a model makes of the course's own data and of what it is to keep; returns JSON-able

    loss: of the conversations that were held out, see `held_out_loss`. known: see there.
    replies: [question, the answer in the data, the model's] of the first 20 of them, but those with a greeting.
    """
    from torch.utils.data import DataLoader

    from .evaluate import ask

    held, limit = ConversationFile(course.val), chosen(course).max_length
    data = Examples(held, tokenizer, limit, drop_oldest=limit is not None)
    loss = held_out_loss(model, DataLoader(data, course.profile.batch_size, collate_fn=DataCollator(tokenizer)))
    talks = [held[index] for index in range(min(len(held), 20))]
    talks = [talk for talk in talks if not is_greeting(talk, talk[0]["role"] == "system")]
    replies = ask(model, tokenizer, [talk[:-1] for talk in talks], max_new_tokens=128)
    shown = [[talk[-2]["content"], talk[-1]["content"], reply] for talk, reply in zip(talks, replies, strict=True)]
    return {"loss": loss, "known": known(model, tokenizer), "replies": shown}


def own_summary(before: dict, after: dict) -> dict[str, dict[str, tuple[int, int] | float]]:
    """The row of a table, of two results of `evaluate_own`: the loss of what was held out, and (still right, right
    before) of the general questions."""
    kept = set(before["known"]) & set(after["known"])
    return {"own data": {"held-out loss": after["loss"], "retained": (len(kept), len(before["known"]))}}


def held_out_loss(model: "PreTrainedModel", batches: Iterable[dict[str, "Tensor"]]) -> float:
    """The mean cross-entropy of the trained tokens of a DataLoader's batches: what `fit` calls val_loss, where nothing
    is replayed."""
    import torch
    from torch.nn.functional import cross_entropy

    loss, count = 0.0, 0
    with torch.inference_mode():
        for batch in batches:
            labels = batch["labels"][:, 1:].to(model.device)
            inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
            logits = model(**inputs, use_cache=False).logits[:, :-1].float()
            loss += cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
            count += (labels != IGNORE).sum().item()
    return loss / count
