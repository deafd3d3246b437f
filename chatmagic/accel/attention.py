"""Attention of our own, under names of our own: a model has it set for a while, nobody else's is replaced.

ROWS: rows of different lengths in one, each of which attends to itself alone. CAPTURED: what decode.py has in place of
attention while it captures a forward.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.nn.functional import dropout as torch_dropout
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from .patched import patched

ROWS, CAPTURED = "chatmagic_rows", "chatmagic_captured"


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Leave attention to torch's own kernels.

    cuDNN's, which torch 2.11 prefers on Hopper, return NaN gradients under an explicit mask at lengths of 64 modulo 128
    where a head's logits are very low, as real models' are (pytorch/pytorch#196678, huggingface/trl#7181). And they
    make a new plan for every length of the keys, in some 60 ms: a conversation has a new length every token.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def attending_by(name: str, model: torch.nn.Module) -> AbstractContextManager[None]:
    """A context in which `model` attends by the function registered as `name`, in all its parts."""
    configs = {id(module.config): module.config for module in model.modules() if isinstance(module, PreTrainedModel)}
    return patched((config, "_attn_implementation_internal", name) for config in configs.values())


def rows_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    rows: tuple[list[int], torch.Tensor] | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention in a batch of one that `layers.flattened` made. rows: the rows' lengths, and float32 (longest,
    longest), -inf where a token is ahead; without it the plain attention of any other batch."""
    if rows is None:
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **options)
    lengths, future = rows
    each = zip(*(tensor[0].split(lengths, dim=1) for tensor in (query * scaling, key, value)))
    return torch.cat([attend(*row, future.to(query.dtype), dropout) for row in each])[None], None


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, future: torch.Tensor, dropout: float
) -> torch.Tensor:
    """Causal attention of n tokens, (n, heads, size), from query (heads, n, size) and key and value (fewer heads, n,
    size). torch's flash attention takes twice the time on the CPU, most of it in its backward; its plain one looks for
    rows that see nothing, and copies the keys for each head of a group."""
    heads, n, size = query.shape
    scores = query.reshape(len(key), -1, size) @ key.mT
    weights = (scores.view(heads, n, n) + future[:n, :n]).softmax(-1)
    if dropout:
        weights = torch_dropout(weights, dropout)
    return (weights.view(len(key), -1, n) @ value).view(heads, n, size).transpose(0, 1)


def register_attention(name: str, function: Callable) -> None:
    """Let models be set to attend by `function`, which is given the masks of sdpa."""
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)


register_attention(ROWS, rows_attention)
