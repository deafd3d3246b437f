"""What a batch must be, and its rows."""

from collections.abc import Mapping

import torch

from ..errors import ChatmagicError


def refuse_odd(batch: object, place: str, vocabulary: int | None) -> None:
    """Raise ChatmagicError for what is no batch, see `StepRunner`; for ids that the model has no row for, which would
    end in an index error of the device; and for labels where nobody reads, which would be compared with what the model
    says elsewhere. place: which batch it is, as the error begins. vocabulary: the model's rows, None if unknown."""
    if not isinstance(batch, Mapping) or {"input_ids", "labels"} - batch.keys():
        found = ", ".join(batch) if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
        raise ChatmagicError(
            f"{place} must be a dict with input_ids and labels; found {found}. DataLoader(..., "
            "collate_fn=DataCollator(tokenizer)) makes such of encode_example's rows."
        )
    ids, labels = batch["input_ids"], batch["labels"]
    if not all(isinstance(each, torch.Tensor) and each.dtype == torch.int64 for each in (ids, labels)):
        raise ChatmagicError(f"{place}: input_ids and labels must be tensors of torch.int64.")
    if ids.dim() != 2 or ids.shape != labels.shape or not ids.numel():
        shapes = f"{tuple(ids.shape)} and {tuple(labels.shape)}"
        raise ChatmagicError(f"{place}: input_ids and labels are of shapes {shapes}; expected (rows, tokens) both.")
    for name in ("attention_mask", "replayed"):
        each = batch.get(name, ids)
        if not isinstance(each, torch.Tensor) or each.shape != ids.shape:
            found = (
                f"a tensor of shape {tuple(each.shape)}"
                if isinstance(each, torch.Tensor)
                else f"a {type(each).__name__}"
            )
            raise ChatmagicError(f"{place}: {name} is {found}; expected a tensor of shape {tuple(ids.shape)}.")
    if (kind := batch["replayed"].dtype if "replayed" in batch else torch.bool) is not torch.bool:
        raise ChatmagicError(f"{place}: replayed is of {kind}; expected torch.bool, True at labels that are.")
    there, asked = batch.get("attention_mask", torch.ones_like(ids)) != 0, labels != -100
    numbers = [ids.amin(), ids.amax(), labels.amax(), labels.masked_fill(~asked, 0).amin(), there.sum()]
    least, most, label, lowest, read, unread = torch.stack([*numbers, (asked & ~there).sum()]).tolist()
    if unread or not read:
        what = f"{unread} labels where" if unread else "no token but such as"
        raise ChatmagicError(
            f"{place} has {what} its attention_mask is 0, which is padding that nobody reads. Labels there are "
            "-100; DataCollator(tokenizer) makes both."
        )
    if lowest < 0:
        raise ChatmagicError(f"{place} has the label {lowest}. What is not to be learnt is -100, all else a token.")
    if vocabulary and (least < 0 or max(most, label) >= vocabulary):
        odd = least if least < 0 else max(most, label)
        raise ChatmagicError(
            f"{place} has the token {odd}, and the model's vocabulary goes from 0 to {vocabulary - 1}. Is the "
            "tokenizer this model's? For one with tokens added: model.resize_token_embeddings(len(tokenizer)) "
            "before get_peft_model."
        )


def refuse_beyond(batch: dict, number: int, context: int | None, reason: str) -> None:
    """Raise ChatmagicError where a row is longer than the model's context, of so many tokens for that reason (None: it
    has no end): it would be trained on noise, or end in an index error of the device. number: the batch's."""
    if context is None or batch["input_ids"].shape[1] <= context:
        return
    lengths = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum(1).tolist()
    if (longest := max(lengths)) > context:
        raise ChatmagicError(
            f"Row {lengths.index(longest)} of batch {number} has {longest} tokens, and the model's context "
            f"ends at {context}, since {reason}. Shorten such rows, or leave them out."
        )


def rows_in(batch: dict) -> list[dict]:
    """The batch row by row, each a batch of one."""
    count = len(batch["labels"])
    return [
        {name: tensor[row : row + 1] if len(tensor) == count else tensor for name, tensor in batch.items()}
        for row in range(count)
    ]
