"""From files of conversations to padded batches."""

from collections.abc import Sequence
from dataclasses import dataclass

from .errors import ChatmagicError


class DataError(ChatmagicError):
    """Data that cannot be trained on."""


@dataclass
class DataCollator:
    """Examples of differing lengths to one batch, in the order given.

    Pads on the right, whatever `tokenizer.padding_side` says: that side is for generation, while every family
    of the course was trained with position 0 at the first token.
    """

    tokenizer: object
    pad_to_multiple_of: int | None = None

    def __call__(self, examples: Sequence[dict]) -> dict:
        """`input_ids` and `labels` of each example to int64 tensors `input_ids`, `labels` (-100 in the padding) and
        `attention_mask` (0 in the padding), all of shape (len(examples), length)."""
        import torch

        length = max(len(example["input_ids"]) for example in examples)
        if self.pad_to_multiple_of:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        shape = len(examples), length
        batch = {
            "input_ids": torch.full(shape, self.tokenizer.pad_token_id),
            "labels": torch.full(shape, -100),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
        }
        for row, example in enumerate(examples):
            filled = slice(len(example["input_ids"]))
            batch["input_ids"][row, filled] = torch.as_tensor(example["input_ids"])
            batch["labels"][row, filled] = torch.as_tensor(example["labels"])
            batch["attention_mask"][row, filled] = 1
        return batch
