"""The loss and the update of a step, once: functions that the eager step and the captured one both run.

None reads a number back from the device, and none has shapes of its own making, as CUDA graphs want it.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from peft import PeftModel
from torch.distributed import all_reduce
from torch.nn.functional import nll_loss

from ..accel.allocator import RankAllocator

Autocast = Callable[[], AbstractContextManager]


def logits_at(model: PeftModel, inputs: dict, positions: torch.Tensor, autocast: Autocast) -> torch.Tensor:
    """The logits at n positions of the batch, float32 (n, vocabulary); the head computes no others.

    positions: int64 (n,), in the batch laid flat, row after row."""

    def select(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        return (args[0].flatten(0, 1).index_select(0, positions)[None],)

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        with autocast():
            return model(**inputs, use_cache=False).logits[0].float()
    finally:
        handle.remove()


@torch.no_grad()
def base_at(
    model: PeftModel, inputs: dict, positions: torch.Tensor, autocast: Autocast, counted: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The base model's probabilities of the next token at n positions, float32 (n, vocabulary), and their entropy,
    summed over the positions. counted, bool (n,): the others' are zero.

    To match them where the base spoke is learning without forgetting (Li & Hoiem, 2016,
    https://arxiv.org/abs/1606.09282); cross-entropy on its words would make the model ever surer of them.
    """
    with model.disable_adapter():
        logits = logits_at(model, inputs, positions, autocast)
    probabilities = logits.softmax(-1)
    entropy = logits.logsumexp(-1) - (probabilities * logits).sum(-1)
    if counted is not None:
        probabilities, entropy = probabilities * counted[:, None], entropy * counted
    return probabilities, entropy.sum()


def summed_loss(
    ours: torch.Tensor,
    targets: torch.Tensor,
    replays: torch.Tensor | None = None,
    base: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """The loss summed over label tokens, float32 (): cross-entropy, and where the base spoke the divergence from it.

    ours, replays: log-probabilities, float32 (n, vocabulary), of what is learnt and of what is replayed.
    targets: int64 (n,), -100 where nothing is learnt. base: as `base_at` returns it, at the positions of `replays`.
    """
    loss = nll_loss(ours, targets, reduction="sum")
    if base is None:
        return loss
    probabilities, entropy = base
    return loss - (probabilities * replays).sum() - entropy


def loss_at(model: PeftModel, inputs: dict, autocast: Autocast) -> torch.Tensor:
    """`summed_loss` where which positions are replayed is known to the device alone.

    inputs: as `accel.captured.of_fixed_shape` returns them."""
    batch = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    ours = logits_at(model, batch, inputs["positions"], autocast).log_softmax(-1)
    if "replayed" not in inputs:
        return summed_loss(ours, inputs["targets"])
    base = base_at(model, batch, inputs["positions"], autocast, counted=inputs["replayed"])
    return summed_loss(ours, inputs["targets"], ours, base)


def add_up(sums: torch.Tensor, processes: int) -> None:
    """Sum gradients and counts, laid in one tensor, over the processes of a run, in place and in one all-reduce.

    DDP starts during the backward pass, which would save little (the gradients of a 7B model's adapter are 120 MB;
    `benchmarks/train_ddp.py` has all that a second GPU costs), and holds on to autograd's nodes, which CUDA graphs want
    made anew.
    """
    if processes > 1:
        all_reduce(sums)


def clip(
    params: list, scale: float | torch.Tensor, allocator: RankAllocator | None, max_norm: float
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Make gradients of a sum those of a mean, times `scale`, let the penalty's join them, and clip them all. Returns
    the penalty, None without an allocator, and the norm before clipping, both float32 ()."""
    torch._foreach_mul_([param.grad for param in params], scale)
    penalty = allocator.penalty(add_gradients=True) if allocator else None
    return penalty, torch.nn.utils.clip_grad_norm_(params, max_norm)


def take_step(optimizer: torch.optim.Optimizer, allocator: RankAllocator | None) -> None:
    """The optimizer's step, and what AdaLoRA learns from it, unless fp16 overflowed: then gradients say nothing."""
    optimizer.step()
    if allocator and allocator.scoring and not getattr(optimizer, "step_was_skipped", False):
        # After the step and before zero_grad (importance reads the gradients): the one right place.
        allocator.update_ipt(None)
    optimizer.zero_grad()
