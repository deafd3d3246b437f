"""From files of conversations to padded batches."""

import hashlib
import json
import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from heapq import nlargest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..conversation.messages import MessagesError, validate_messages
from ..errors import ChatmagicError
from ..files import writing
from ..progress import Bar
from ..prompts.encoder import IGNORE
from ..prompts.labels import encode_rows
from .file_formats import existing
from .rows import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_jsonl(path: str | Path, progress: bool = True) -> Iterator[list[dict[str, str]]]:
    """The conversations of the JSONL file at `path`, one a line, as lists of messages, read as they are consumed.

    A line is an object with `messages`, in ShareGPT's form (`conversations` of `from` and `value`, `system`)
    or in Alpaca's (`instruction`, `input`, `output`, `system`, `history`). Empty lines are passed over. With
    `progress`, a bar shows the bytes read. Raises DataError with the number of the line that is no valid
    conversation.
    """
    path = existing(path)
    with Bar(total=path.stat().st_size, unit="B", unit_scale=True, desc=path.name, disable=not progress) as bar:
        for size, messages in _read_lines(path):
            bar.update(size)
            if messages is not None:
                yield messages


def _read_lines(path: Path) -> Iterator[tuple[int, list[dict] | None]]:
    """(bytes, conversation) of each line of a file; None for an empty one."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            yield len(line), _of_line(line, path.name, number) if line.strip() else None


def _of_line(line: bytes, name: str, number: int) -> "Conversation":
    try:
        row = json.loads(line.decode("utf-8-sig"))
        messages = _messages(row)
        validate_messages(messages)
        conversation = Conversation(messages)
        if "place" in row:
            conversation.place = tuple(row["place"])
    except (ValueError, TypeError, AttributeError, MessagesError) as error:
        raise DataError(f"{name}, line {number}: {error}") from error
    return conversation


def write_jsonl(conversations: Iterable[list[dict]], path: str | Path) -> None:
    """Write `conversations` to `path`, one a line, as `read_jsonl` reads them. Raises WriteError where the file
    cannot be written."""
    with writing(path) as file:
        file.writelines(as_line(messages).encode() for messages in conversations)


def as_line(messages: list[dict]) -> str:
    """A conversation as a line of a file, with the place where it stood if it knows one."""
    place = {"place": messages.place} if hasattr(messages, "place") else {}
    return json.dumps({"messages": messages} | place, ensure_ascii=False) + "\n"


class Conversation(list):
    """A list of messages that knows where it stood, so that what fails later can name it.

    place: (the file's name, the line, the number of the row).
    """

    __slots__ = ("place",)
    place: tuple[str, int, int]

    @property
    def where(self) -> str:
        """The place in words."""
        return named(*self.place)


def named(name: str, line: int, row: int) -> str:
    """A place in words: the row too, where it is not that of the line."""
    return f"{name}, line {line}" if line == row else f"{name}, line {line} (row {row})"


class ConversationFile(Sequence):
    """The conversations of the file at `path` as `read_jsonl` reads it, each read when it is asked for.

    The file is run through once, so that a bad line is found before training; of each line its place, number and bytes
    are kept. `without`: conversations that are passed over. Raises DataError as `read_jsonl` does.
    """

    def __init__(self, path: str | Path, without: Iterable[list[dict]] = ()) -> None:
        self.path, self.starts, self.numbers, self.lengths = existing(path), array("q"), array("q"), array("q")
        passed_over = {json.dumps(messages) for messages in without}
        start = 0
        for number, (size, messages) in enumerate(_read_lines(self.path), 1):
            if messages is not None and not (passed_over and json.dumps(messages) in passed_over):
                self.starts.append(start)
                self.numbers.append(number)
                self.lengths.append(size)
            start += size

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Conversation:
        with self.path.open("rb") as file:
            file.seek(self.starts[index])
            conversation = _of_line(file.readline(), self.path.name, self.numbers[index])
        if not hasattr(conversation, "place"):
            conversation.place = self.path.name, self.numbers[index], self.numbers[index]
        return conversation

    def digest(self) -> str:
        """A SHA-256 of the file, and of which of its lines count."""
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        digest.update(self.starts.tobytes())
        return digest.hexdigest()


class Examples(Sequence):
    """Conversations as examples, each encoded when it is drawn: a map-style dataset for torch's DataLoader.

    conversations: a list of them, or a ConversationFile, of which `summary` tells. The rest as for `encode_example`.
    """

    def __init__(
        self,
        conversations: Sequence[list[dict]],
        tokenizer: "PreTrainedTokenizerBase",
        max_length: int | None = None,
        drop_oldest: bool = False,
    ) -> None:
        self.conversations, self.tokenizer = conversations, tokenizer
        self.cut = {"max_length": max_length, "drop_oldest": drop_oldest}

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> list[dict[str, list]]:
        """The rows of one conversation, which DataCollator puts into the same batch."""
        return encode_example(self.conversations[index], self.tokenizer, **self.cut)

    def digest(self) -> str:
        """A SHA-256 of the conversations, and of how they are cut: by it a run that goes on knows its data again."""
        file = isinstance(self.conversations, ConversationFile)
        of = self.conversations.digest() if file else json.dumps([*self.conversations])
        return hashlib.sha256(f"{self.cut} {of}".encode()).hexdigest()

    def summary(self) -> str:
        """The tokens that are trained, of a thousand examples scaled up where there are more, and the longest row.

        Raises LabelsError, with its line, for a conversation that is too long: only those that have many bytes can be,
        and they are encoded here and now.
        """
        every, sizes = range(len(self)), self.conversations.lengths
        limit = self.cut["max_length"] or self.tokenizer.model_max_length
        drawn = every if len(self) <= 1000 else random.Random(0).sample(every, 1000)
        labels = (label for index in drawn for row in _rows(self[index]) for label in row["labels"])
        trained = sum(label != IGNORE for label in labels) * len(self) // len(drawn)
        long = {index for index in every if sizes[index] > limit / 2} | {*nlargest(8, every, key=sizes.__getitem__)}
        tokens, index = max((len(row["input_ids"]), index) for index in long for row in _rows(self[index]))
        about = "" if len(drawn) == len(self) else "about "
        context = "" if limit > 10**9 else f" of {limit:,}"
        return (
            f"{about}{trained:,} tokens trained, the longest row has {tokens:,}{context} "
            f"({self.conversations[index].where})"
        )


def _rows(example: dict[str, list] | list[dict[str, list]]) -> list[dict[str, list]]:
    """The rows of a conversation, of which some templates need more than one."""
    return example if isinstance(example, list) else [example]


# What ShareGPT files call the roles, next to their proper names.
_SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}


def _messages(row: Any) -> list[dict]:
    """The messages of one line, not yet validated."""
    keys = set(row) if isinstance(row, dict) else set()
    if "messages" in keys:
        return row["messages"]
    if not keys & {"conversations", "instruction"}:
        found = f"the keys {sorted(keys)}" if keys else f"a JSON {type(row).__name__}"
        raise ValueError(f"expected an object with 'messages', 'conversations' or 'instruction'; found {found}.")
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    if "conversations" in keys:
        turns = [(turn.get("from"), turn.get("value")) for turn in row["conversations"]]
    else:
        asked = f"{row['instruction']}\n{row['input']}" if row.get("input") else row["instruction"]
        rounds = [*(row.get("history") or ()), (asked, row.get("output"))]
        turns = [(role, text) for each in rounds for role, text in zip(("user", "assistant"), each, strict=True)]
    return system + [{"role": _SPEAKERS.get(role, role), "content": text} for role, text in turns]


def encode_example(
    messages: Sequence[dict],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int | None = None,
    drop_oldest: bool = False,
    thinking: bool | None = None,
    system: str | None = None,
) -> list[dict[str, list]]:
    """A conversation as rows of `input_ids`, `labels` and `replayed`, lists of the same length. Mostly one: several
    where the chat template writes a last answer otherwise than earlier ones.

    labels: -100 also at an answer whose message says `"weight": 0`, as `read_conversations` marks what is not to be
    trained. replayed: True at the labels of an answer whose message says `"replayed": True`, as `make_conversations`
    marks the base model's own: StepRunner keeps the model there as the base is. The other arguments,
    and errors, are those of `encode_rows`; they name the line where the messages know it.
    """
    where = getattr(messages, "where", "")
    options = {"max_length": max_length, "drop_oldest": drop_oldest, "thinking": thinking, "system": system}
    try:
        rows = encode_rows(messages, tokenizer, **options)
    except ChatmagicError as error:
        asked = [message["role"] for message in messages if message["role"] != "system"]
        way_out = " Leave its greeting out, or put it into the system text." if asked[:1] == ["assistant"] else ""
        error.args = (f"{where}: {error}{way_out}".removeprefix(": "),)
        raise
    return [vars(row) for row in rows]


class DataCollator:
    """Examples of different lengths to one batch, in the order given.

    Pads on the right, whatever `tokenizer.padding_side` says: that side is for generation, while all families
    of the course were trained with their first token at position 0. The length of a batch, in tokens, is a
    multiple of `pad_to_multiple_of`. Raises DataError where there is no pad token.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", pad_to_multiple_of: int | None = None) -> None:
        if tokenizer.pad_token_id is None:
            raise DataError(
                "The tokenizer has no pad token. Choose one that is never trained: "
                "tokenizer.pad_token = tokenizer.unk_token"
            )
        self.tokenizer = tokenizer  # for whoever shows what a batch says
        self.pad_token, self.pad_token_id = tokenizer.pad_token, tokenizer.pad_token_id
        self.multiple = pad_to_multiple_of or 1

    def __call__(self, examples: Sequence[dict | list[dict]]) -> dict:
        """The rows' `input_ids` and `labels` as int64 tensors of shape (rows, length), with -100
        in the labels' padding, and `attention_mask`, 0 there. Raises DataError for an example that trains the
        pad token: whoever masks labels where the id is the pad's would never teach the model to end its
        turn. Examples that have `replayed` give a bool tensor of it too; a list of examples, as of a conversation, is
        as many."""
        import torch

        examples = [row for example in examples for row in _rows(example)]

        length = max(len(example["input_ids"]) for example in examples)
        shape = len(examples), -(-length // self.multiple) * self.multiple
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "labels": torch.full(shape, IGNORE),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
        }
        if "replayed" in examples[0]:
            batch["replayed"] = torch.zeros(shape, dtype=torch.bool)
        for row, example in enumerate(examples):
            labels = torch.as_tensor(example["labels"])
            if (labels == self.pad_token_id).any():
                raise DataError(
                    f"Example {row} trains {self.pad_token!r}, which ends a turn and is the pad token too: "
                    "it would be masked as padding. Choose another: tokenizer.pad_token = tokenizer.unk_token"
                )
            filled = slice(len(labels))
            batch["input_ids"][row, filled] = torch.as_tensor(example["input_ids"])
            batch["labels"][row, filled] = labels
            batch["attention_mask"][row, filled] = 1
            if "replayed" in batch:
                batch["replayed"][row, filled] = torch.as_tensor(example["replayed"])
        return batch
