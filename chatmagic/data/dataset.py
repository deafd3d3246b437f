"""From files of conversations to padded batches."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..conversation.messages import MessagesError, validate_messages
from ..errors import ChatmagicError
from ..files import write
from ..prompts.labels import encode_rows


class DataError(ChatmagicError):
    """A file or a batch that cannot be trained on."""


def read_jsonl(path: str | Path, progress: bool = True) -> Iterator[list[dict[str, str]]]:
    """The conversations of a JSONL file, one a line, as lists of messages, read as they are consumed.

    A line is an object with `messages`, in ShareGPT's form (`conversations` of `from` and `value`, `system`)
    or in Alpaca's (`instruction`, `input`, `output`, `system`, `history`). Empty lines are passed over. With
    `progress`, a bar shows the bytes read. Raises DataError with the number of the line that is no valid
    conversation.
    """
    from tqdm.auto import tqdm

    path = Path(path).expanduser()
    with (
        path.open("rb") as file,
        tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=path.name, disable=not progress) as bar,
    ):
        for number, line in enumerate(file, 1):
            bar.update(len(line))
            if not line.strip():
                continue
            try:
                messages = _messages(json.loads(line.decode("utf-8-sig")))
                validate_messages(messages)
            except (ValueError, TypeError, AttributeError, MessagesError) as error:
                raise DataError(f"{path.name}, line {number}: {error}") from error
            yield messages


def write_jsonl(conversations: Sequence[list[dict]], path: str | Path) -> None:
    """One conversation a line, as `read_jsonl` reads it. Raises WriteError where the file cannot be written."""
    write(path, as_jsonl(conversations))


def as_jsonl(conversations: Sequence[list[dict]]) -> str:
    return "".join(json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in conversations)


# What ShareGPT files call the roles, next to their proper names.
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}


def _messages(row) -> list[dict]:
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
    return system + [{"role": _ROLES.get(role, role), "content": text} for role, text in turns]


def encode_example(messages: Sequence[dict], tokenizer, **options) -> list[dict[str, list]]:
    """A conversation as rows of `input_ids`, `labels` and `replayed`, lists of the same length; `options` are those of
    `encode_rows`. Mostly one row: several where the chat template writes a last answer otherwise than earlier ones.

    replayed: True at the labels of an answer whose message says `"replayed": True`, as `make_conversations`
    marks the base model's own: StepRunner keeps the model there as the base is. Errors as for
    `build_inputs_labels`.
    """
    return [vars(row) for row in encode_rows(messages, tokenizer, **options)]


class DataCollator:
    """Examples of different lengths to one batch, in the order given.

    Pads on the right, whatever `tokenizer.padding_side` says: that side is for generation, while all families
    of the course were trained with their first token at position 0. Raises DataError where there is no pad
    token.
    """

    def __init__(self, tokenizer, pad_to_multiple_of: int | None = None):
        if tokenizer.pad_token_id is None:
            raise DataError(
                "The tokenizer has no pad token. Choose one that is never trained: "
                "tokenizer.pad_token = tokenizer.unk_token"
            )
        self.pad_token, self.pad_token_id = tokenizer.pad_token, tokenizer.pad_token_id
        self.multiple = pad_to_multiple_of or 1

    def __call__(self, examples: Sequence[dict]) -> dict:
        """The examples' `input_ids` and `labels` as int64 tensors of shape (len(examples), length), with -100
        in the labels' padding, and `attention_mask`, 0 there. Raises DataError for an example that trains the
        pad token: whoever masks labels where the id is the pad's would never teach the model to end its
        turn. Examples that have `replayed` give a bool tensor of it too."""
        import torch

        length = max(len(example["input_ids"]) for example in examples)
        shape = len(examples), -(-length // self.multiple) * self.multiple
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "labels": torch.full(shape, -100),
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
