"""The training step as a CUDA graph: recorded once a shape, then replayed by a single launch.

A step of a 7B model is some twenty thousand kernels, each shorter than Python takes to start it. What a graph asks
for in return, that every replay has the same shapes and reads nothing back, is done here: batches are padded to a few
lengths, and so is the list of positions that have labels. `benchmarks/train_step.py` measures it.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch.autograd.graph import increment_version
from torch.nn.functional import pad

from ..models.parts import trainable
from .allocator import rank_allocator
from .layers import gathered

NOT_HELD = {"params", "lr", "initial_lr", "capturable"}  # of an optimizer's group: what a graph reads anew, or sets
INPUTS = {"input_ids", "labels", "attention_mask", "replayed"}


def why_not(model: PeftModel, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> str | None:
    """What keeps the step of a PEFT model from being captured, None if nothing does."""
    kinds = {type(module).__name__ for module in model.modules()}
    checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooked = [name for name, module in model.named_modules() for hook in hooks if getattr(module, hook)]
    other = type(optimizer).__name__ if type(optimizer) is not torch.optim.AdamW else None
    narrow = {param.dtype for _, param in trainable(model)} - {torch.float32}
    reasons = {
        "there is no CUDA device": accelerator.device.type != "cuda",
        "the model is not on one device": len({param.device for param in model.parameters()}) > 1,
        "gradients are accumulated over batches": accelerator.gradient_accumulation_steps > 1,
        "fp16 scales the loss by what it finds in the gradients": accelerator.scaler,
        "activations are recomputed to save memory": checkpointing,
        "8-bit layers look for outliers in their input": "Linear8bitLt" in kinds,
        f"trainable parameters are {', '.join(map(str, narrow))}, not torch.float32": narrow,
        f"the optimizer is {other}, not torch.optim.AdamW": other,
        f"{', '.join(hooked[:1])} has hooks": hooked,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


class StepNumbers(NamedTuple):
    """What a step leaves to be told, summed over the processes."""

    loss: float  # summed over label tokens
    label_tokens: float
    tokens: float
    penalty: float
    grad_norm: float
    lr: float


@dataclass
class Recording:
    """A function as a CUDA graph: what it reads its inputs from, and where a replay leaves its result."""

    graph: torch.cuda.CUDAGraph
    inputs: dict[str, torch.Tensor]
    result: torch.Tensor | None
    also_written: object = None  # the importance, which the allocator lets go of


class CapturedStep:
    """StepRunner's step: the same functions, recorded.

    What a batch gives, `backward`, is captured once a shape; what is then done with it, `update`, once. Between the
    two the processes of a run add up what they have, outside of any graph and as StepRunner does it: so each process
    takes each step as it can, captured or not. All graphs share one pool of memory. The optimizer is a fused AdamW;
    its learning rates become tensors.
    functions: chatmagic.training.functional, whose loss and update these are.
    off: why nothing is captured, after a capture failed, else None.
    """

    def __init__(
        self,
        functions: ModuleType,
        model: PeftModel,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        max_grad_norm: float,
    ) -> None:
        self.functions, self.model, self.optimizer, self.accelerator = functions, model, optimizer, accelerator
        self.max_grad_norm, self.off = max_grad_norm, None
        self.allocator = rank_allocator(model)
        self.params = [param for _, param in trainable(model)]
        self.recordings: dict[Hashable, Recording | None] = {}  # None: called once, and so warm
        self.pool = None
        device = accelerator.device
        sizes = [param.numel() for param in self.params]
        self.sums = torch.zeros(sum(sizes) + 3, device=device)  # gradients; loss, label tokens, tokens
        *grads, self.counts = self.sums.split([*sizes, 3])
        self.grads = [grad.view_as(param) for grad, param in zip(grads, self.params)]
        for group in optimizer.param_groups:
            group["lr"] = torch.as_tensor(group["lr"], device=device)
        for state in optimizer.state.values():
            state["step"] = state["step"].to(device)
        self.constants = self._constants()

    def _constants(self) -> list[dict]:
        """What a graph of the update holds as it was when it was captured."""
        groups = self.optimizer.param_groups
        return [{name: value for name, value in group.items() if name not in NOT_HELD} for group in groups]

    def __call__(self, batch: dict) -> StepNumbers | None:
        """A step of all processes on their batches; None if it is none for this step to make: if this process's batch
        is without labels, or has inputs beyond those that StepRunner knows."""
        if self.off:
            return None
        labelled = (batch["labels"][:, 1:] != -100).nonzero()
        if not len(labelled) or batch.keys() - INPUTS:
            return None
        inputs = of_fixed_shape(batch, *labelled.unbind(1))
        shape = (*inputs["input_ids"].shape, *inputs["positions"].shape, "replayed" in inputs)
        self.run(shape, self.backward, inputs)
        self.functions.add_up(self.sums, self.accelerator.num_processes)
        # A schedule may change what a graph holds as it was: OneCycleLR the betas, a callback the weight decay.
        numbers = self.run("update", self.update, {}) if self._constants() == self.constants else self.update({})
        increment_version(self.params)  # as in-place steps do, for whoever keeps what the adapter has computed
        return StepNumbers(*numbers.tolist())

    def run(self, key: Hashable, function: Callable[[dict], torch.Tensor | None], inputs: dict) -> torch.Tensor | None:
        """What a function returns: called at first, as the warm-up that capturing wants, then captured, then
        replayed."""
        if key not in self.recordings or self.off:
            self.recordings.setdefault(key, None)
            return function(inputs)
        recording = self.recordings[key]
        if recording is None:
            try:
                recording = self.recordings[key] = self.capture(function, inputs)
            except RuntimeError as error:  # out of memory is one too
                self.off = str(error).splitlines()[0]
                print(f"Training goes on without CUDA graphs: {self.off}", flush=True)
                return function(inputs)
        for name, tensor in inputs.items():
            recording.inputs[name].copy_(tensor)
        recording.graph.replay()
        return recording.result

    def capture(self, function: Callable[[dict], torch.Tensor | None], inputs: dict) -> Recording:
        """Record what the function does with inputs of these shapes; nothing is run. Raises what CUDA raises."""
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        for group in self.optimizer.param_groups:
            group["capturable"] = True  # only now: AdamW warns of steps without capture
        try:
            # thread_local: NCCL's own thread asks for events meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                result = function(inputs)
        finally:
            for group in self.optimizer.param_groups:
                group["capturable"] = False
        self.pool = graph.pool()
        importance = self.allocator and (self.allocator.exp_avg_ipt, self.allocator.exp_avg_unc)
        return Recording(graph, inputs, result, importance)

    def backward(self, inputs: dict) -> None:
        """Fill `sums` with those of this process. Reads nothing back, as update."""
        with gathered(self.model, torch.bfloat16 if self.accelerator.mixed_precision == "bf16" else torch.float32):
            loss = self.functions.loss_at(self.model, inputs, self.accelerator.autocast)
        torch._foreach_copy_(self.grads, torch.autograd.grad(loss, self.params))
        labelled = (inputs["targets"] != -100).sum()
        if "replayed" in inputs:
            labelled = labelled + inputs["replayed"].sum()
        counts = loss.detach(), labelled, inputs["attention_mask"].sum()
        self.counts.copy_(torch.stack([count.float() for count in counts]))

    def update(self, _: dict) -> torch.Tensor:
        """Step by the `sums` of all processes; float32 (6,), the StepNumbers."""
        for param, grad in zip(self.params, self.grads):
            param.grad = grad
        penalty, norm = self.functions.clip(self.params, 1 / self.counts[1], self.allocator, self.max_grad_norm)
        # A fused AdamW takes no step where this is 1, as for a GradScaler: StepRunner refuses such a step too late.
        self.optimizer.found_inf = 1 - (norm + self.counts[0]).isfinite().float()
        self.functions.take_step(self.optimizer, self.allocator)
        del self.optimizer.found_inf
        penalty = torch.zeros_like(norm) if penalty is None else penalty
        return torch.stack([*self.counts, penalty, norm, self.optimizer.param_groups[0]["lr"].float()])


def of_fixed_shape(batch: dict, rows: torch.Tensor, columns: torch.Tensor) -> dict:
    """The batch at a length that is a multiple of 64, and its label tokens as a list of fixed length: positions (in
    the batch laid flat), targets (-100 where padded or replayed), and replayed if the batch has it.

    rows, columns: int64 (n,), where in the batch the next token is a label.
    """
    ids, labels = batch["input_ids"], batch["labels"]
    length = -(-ids.shape[1] // 64) * 64
    longer, more = (0, length - ids.shape[1]), (0, room_for(len(rows), len(ids) * length) - len(rows))
    targets = labels[rows, columns + 1]
    inputs = {
        "input_ids": pad(ids, longer),
        "attention_mask": pad(batch.get("attention_mask", torch.ones_like(ids)), longer),
        "positions": pad(rows * length + columns, more),
    }
    if "replayed" in batch:
        replayed = batch["replayed"][rows, columns + 1]
        targets = targets.masked_fill(replayed, -100)
        inputs["replayed"] = pad(replayed, more)
    return inputs | {"targets": pad(targets, more, value=-100)}


def room_for(labels: int, tokens: int) -> int:
    """The length of a list of labels in a batch of so many tokens: a quarter, a half or all of them."""
    return next(room for room in (tokens // 4, tokens // 2, tokens) if room >= labels)
