"""The training step as a CUDA graph: recorded once a shape, then replayed by a single launch.

A step of a 7B model is some twenty thousand kernels, each shorter than Python takes to start it. What a graph asks
for in return, that every replay has the same shapes and reads nothing back, is done here: batches are padded to a few
lengths, and so is the list of positions that have labels. `benchmarks/train_step.py` measures it.
"""

import torch
from torch.autograd.graph import increment_version
from torch.distributed import all_reduce
from torch.nn.functional import cross_entropy, kl_div, pad

from ..models.parts import trainable
from .allocator import rank_allocator
from .fast import gathered

INPUTS = {"input_ids", "labels", "attention_mask", "replayed"}


def why_not(model, optimizer, accelerator) -> str | None:
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


class CapturedStep:
    """Forward, backward, penalty, clipping, AdamW and AdaLoRA's importance of StepRunner's step.

    What a batch gives, `backward`, is captured once a shape; what is then done with it, `update`, once. Between the
    two the processes of a run add up what they have, outside of any graph and as StepRunner does it: so each process
    takes each step as it can, captured or not. All graphs share one pool of memory. The optimizer is a fused AdamW;
    its learning rates become tensors.
    off: why nothing is captured, after a capture failed, else None.
    """

    def __init__(self, model, optimizer, accelerator, max_grad_norm: float):
        self.model, self.optimizer, self.accelerator = model, optimizer, accelerator
        self.max_grad_norm, self.off = max_grad_norm, None
        self.allocator = rank_allocator(model)
        self.params = [param for _, param in trainable(model)]
        self.graphs, self.pool = {}, None
        device = accelerator.device
        sizes = [param.numel() for param in self.params]
        self.sums = torch.zeros(sum(sizes) + 3, device=device)  # gradients; loss, label tokens, tokens
        *grads, self.counts = self.sums.split([*sizes, 3])
        self.grads = [grad.view_as(param) for grad, param in zip(grads, self.params)]
        for group in optimizer.param_groups:
            group["lr"] = torch.as_tensor(group["lr"], device=device)
        for state in optimizer.state.values():
            state["step"] = state["step"].to(device)

    def __call__(self, batch: dict) -> list[float] | None:
        """Loss (summed), label tokens, tokens, penalty, gradient norm and learning rate of a step of all processes on
        their batches; None if it is none for this step to make: if this process's batch is without labels, or has
        inputs beyond those that StepRunner knows."""
        if self.off:
            return None
        labelled = (batch["labels"][:, 1:] != -100).nonzero()
        if not len(labelled) or batch.keys() - INPUTS:
            return None
        inputs = padded(batch, *labelled.unbind(1))
        shape = (*inputs["input_ids"].shape, *inputs["positions"].shape, "replayed" in inputs)
        self.run(shape, self.backward, inputs)
        if self.accelerator.num_processes > 1:
            all_reduce(self.sums)
        numbers = self.run("update", self.update, {})
        increment_version(self.params)  # as in-place steps do, for whoever keeps what the adapter has computed
        return numbers.tolist()

    def run(self, key, function, inputs: dict) -> torch.Tensor | None:
        """What a function returns: called at first, as the warm-up that capturing wants, then captured, then
        replayed."""
        if key not in self.graphs or self.off:
            self.graphs.setdefault(key, None)
            return function(inputs)
        if self.graphs[key] is None:
            try:
                self.graphs[key] = self.capture(function, inputs)
            except RuntimeError as error:  # out of memory is one too
                self.off = str(error).splitlines()[0]
                print(f"Training goes on without CUDA graphs: {self.off}", flush=True)
                return function(inputs)
        graph, recorded, result, _ = self.graphs[key]
        for name, tensor in inputs.items():
            recorded[name].copy_(tensor)
        graph.replay()
        return result

    def capture(self, function, inputs: dict) -> tuple:
        """(graph, its inputs, its result, what else it writes to: the importance, which the allocator lets go of)"""
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
        return graph, inputs, result, importance

    def backward(self, inputs: dict) -> None:
        """Fill `sums` with those of this process. Reads nothing back, as update."""
        with gathered(self.model, torch.bfloat16 if self.accelerator.mixed_precision == "bf16" else torch.float32):
            loss = self.loss(inputs)
        torch._foreach_copy_(self.grads, torch.autograd.grad(loss, self.params))
        counts = loss.detach(), inputs["weights"].sum(), inputs["attention_mask"].sum()
        self.counts.copy_(torch.stack([count.float() for count in counts]))

    def update(self, _) -> torch.Tensor:
        """Step by the `sums` of all processes; float32 (6,), as __call__ returns it."""
        for param, grad in zip(self.params, self.grads):
            param.grad = grad
        torch._foreach_mul_(self.grads, 1 / self.counts[1])
        penalty = self.allocator.penalty(add_gradients=True) if self.allocator else torch.zeros_like(self.counts[0])
        norm = torch.nn.utils.clip_grad_norm_(self.params, self.max_grad_norm)
        # A fused AdamW takes no step where this is 1, as for a GradScaler: StepRunner refuses such a step too late.
        self.optimizer.found_inf = 1 - (norm + self.counts[0]).isfinite().float()
        self.optimizer.step()
        del self.optimizer.found_inf
        if self.allocator and self.allocator.scoring:
            self.allocator.update_ipt(self.model)
        self.optimizer.zero_grad()
        return torch.stack([*self.counts, penalty, norm, self.optimizer.param_groups[0]["lr"].float()])

    def loss(self, inputs: dict) -> torch.Tensor:
        """StepRunner's loss, float32 ()."""
        logits = self.logits(inputs)
        if "replayed" not in inputs:
            losses = cross_entropy(logits, inputs["targets"], reduction="none")
        else:
            with torch.no_grad(), self.model.disable_adapter():
                base = self.logits(inputs).log_softmax(-1)
            ours = logits.log_softmax(-1)
            divergence = kl_div(ours, base, reduction="none", log_target=True).sum(-1)
            surprise = -ours.gather(-1, inputs["targets"][:, None])[:, 0]
            losses = torch.where(inputs["replayed"], divergence, surprise)
        return losses @ inputs["weights"]

    def logits(self, inputs: dict) -> torch.Tensor:
        """float32 (positions, vocabulary)"""

        def select(_, args):
            return (args[0].flatten(0, 1).index_select(0, inputs["positions"])[None],)

        handle = self.model.get_output_embeddings().register_forward_pre_hook(select)
        try:
            with self.accelerator.autocast():
                names = ("input_ids", "attention_mask")
                output = self.model(**{name: inputs[name] for name in names}, use_cache=False)
        finally:
            handle.remove()
        return output.logits[0].float()


def padded(batch: dict, rows: torch.Tensor, columns: torch.Tensor) -> dict:
    """The batch at a length that is a multiple of 64, and its labels as a list, padded to a quarter, a half or all of
    its tokens: positions (in the flattened batch), targets, weights (0 for padding), and replayed if the batch has it.
    """
    ids, labels = batch["input_ids"], batch["labels"]
    length = -(-ids.shape[1] // 64) * 64
    size = len(ids) * length
    longer = (0, length - ids.shape[1])
    more = (0, next(room for room in (size // 4, size // 2, size) if room >= len(rows)) - len(rows))
    inputs = {
        "input_ids": pad(ids, longer),
        "attention_mask": pad(batch.get("attention_mask", torch.ones_like(ids)), longer),
        "positions": pad(rows * length + columns, more),
        "targets": pad(labels[rows, columns + 1], more),
        "weights": pad(torch.ones(len(rows), device=ids.device), more),
    }
    if "replayed" in batch:
        inputs["replayed"] = pad(batch["replayed"][rows, columns + 1], more)
    return inputs
