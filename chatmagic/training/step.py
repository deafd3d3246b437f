"""One step of training or validation: cross-entropy, penalty, clipping, the optimizer, the rank allocation."""

import math
import resource
import time
from collections.abc import Callable

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch.optim.lr_scheduler import LRScheduler

from ..accel.allocator import rank_allocator
from ..accel.layers import flattened, takes_rows
from ..errors import ChatmagicError
from ..models.load import context_limit
from ..models.parts import trainable
from ..models.quantize import never_packed
from .batch import refuse_beyond, refuse_odd, rows_in
from .functional import add_up, base_at, clip, logits_at, summed_loss, take_step

CALMER = "Lower the learning rate, or train with mixed_precision='no'."
SKIPPED = 20  # steps in a row that fp16 may skip: by then the scale of the loss has halved to a millionth
LEAD = 2 * torch.finfo(torch.bfloat16).eps  # of a logit, what rounding it and its rival may take
ROWS_SHOWN = 3  # rows that an error shows, of those it is about


class NotFinite(ChatmagicError):
    """A loss or a gradient that is no number. The step was not taken."""


class StepRunner:
    """torchkeras' step, for a causal language model with an adapter.

    A batch is a dict of (batch, length) tensors: input_ids, labels (-100 where nothing is learnt) and, if
    anything is padded, attention_mask, int64; and perhaps replayed, bool: True at labels that are the base
    model's own words. There the loss is not cross-entropy but the divergence of the model from its base.

    A call returns torchkeras' pair, losses to average and metrics. The first is empty, since a mean of batch
    means would weigh the tokens of short answers above those of long ones; the metrics are those of the epoch
    so far, so that the last step's are the epoch's:

    train_loss, val_loss: that loss per label token. train_penalty, val_penalty: the orthogonality penalty.
    lr, grad_norm (before clipping), rank_budget (triplets kept): of the last step.
    tokens_per_s: without padding, all processes. peak_memory: GiB, of this process.

    net: the model with its adapter. stage: "train" or "val", which takes no steps. optimizer, lr_scheduler: of
    training, the second moved once a step. accelerator: accelerate's, which says what a step is. loss_fn and
    metrics_dict are torchkeras' arguments: the loss is the one above, and there are no other metrics.
    """

    max_grad_norm = 1.0

    def __init__(
        self,
        net: PeftModel,
        loss_fn: Callable | None,
        accelerator: Accelerator,
        stage: str = "train",
        metrics_dict: dict | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        lr_scheduler: LRScheduler | None = None,
    ) -> None:
        self.net, self.accelerator, self.stage = net.train(stage == "train"), accelerator, stage
        never_packed(net)
        self.optimizer, self.lr_scheduler, self.metrics_dict = optimizer, lr_scheduler, metrics_dict
        self.allocator = rank_allocator(net)
        self.params = [param for _, param in trainable(net)]
        self.pending = torch.zeros(3, device=accelerator.device)  # loss, label tokens, tokens: of this step so far
        self.sums = [0.0, 0.0]  # loss and label tokens: of the epoch so far
        self.tokens = 0.0
        self.started = time.perf_counter()
        self.log = {f"{stage}_loss": math.nan}
        self.context, self.context_reason = context_limit(net)
        self.vocabulary = getattr(net.config.get_text_config(), "vocab_size", None)
        # What fit knows:
        self.captured = None  # a CapturedStep
        self.epoch, self.batch = 1, 0  # where the run is: batches of this epoch so far
        self.skipped = 0  # steps in a row that fp16 has skipped
        self.tokenizer = None  # to show what a batch says
        self.since_step: dict[int, dict] = {}  # the batches of the step that is being made, by their number

    def __call__(self, batch: dict[str, torch.Tensor]) -> tuple[dict, dict[str, float]]:
        self.batch += 1
        self._refuse_odd(batch)
        refuse_beyond(batch, self.batch, self.context, self.context_reason)
        batch = self._without_repeated(batch)
        self.since_step[self.batch] = batch
        try:
            return self._step(batch)
        except NotFinite as error:
            raise NotFinite(f"{error} {self._suspects()}") from None

    def _step(self, batch: dict[str, torch.Tensor]) -> tuple[dict, dict[str, float]]:
        if self._may_be_captured() and (numbers := self.captured(batch)):
            refuse_not_finite(numbers.loss, numbers.grad_norm)
            self.log |= {"train_penalty": numbers.penalty} if self.allocator else {}
            self.log |= {"lr": numbers.lr, "grad_norm": numbers.grad_norm}
            self._allocate()
            self._add_to_log(numbers.loss, numbers.label_tokens, numbers.tokens)
        else:
            self._eager(batch)
        if self.stage == "val" or self.accelerator.sync_gradients:
            self.since_step.clear()
        return {}, dict(self.log)

    def _may_be_captured(self) -> bool:
        """Not the first step, whose checks read gradients; nor that which settles the ranks without scoring them."""
        settling = self.allocator and self.allocator.step == self.allocator.last
        return bool(self.captured and self.optimizer.state and not settling)

    def _eager(self, batch: dict[str, torch.Tensor]) -> None:
        loss, *counts = self._loss(batch)
        self.pending += torch.stack([loss.detach(), *counts])
        if self.stage == "train":
            self.accelerator.backward(loss)
        if self.stage == "val" or self.accelerator.sync_gradients:
            loss, label_tokens, tokens = self._summed()
            if self.stage == "train":
                self._update(loss, label_tokens)
            elif self.allocator:
                self.log["val_penalty"] = self.allocator.penalty(add_gradients=False).item()
            self._add_to_log(loss, label_tokens, tokens)

    def _loss(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The summed loss, label tokens and tokens of a batch."""
        labels = batch["labels"][:, 1:]
        inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "replayed")}
        rows, columns = (labels != -100).nonzero(as_tuple=True)
        replayed = batch.get("replayed", torch.zeros_like(batch["labels"], dtype=bool))[rows, columns + 1]
        order = replayed.argsort(stable=True)  # those last: a gradient is split faster than it is indexed
        rows, columns, learnt = rows[order], columns[order], len(rows) - int(replayed.sum())
        logits = logits_at(self.net, *self._placed(inputs, rows, columns), self.accelerator.autocast)
        ours, replays = logits.log_softmax(-1).split([learnt, len(rows) - learnt])
        base = self._base(inputs, rows[learnt:], columns[learnt:]) if len(replays) else None
        loss = summed_loss(ours, labels[rows, columns][:learnt], replays, base)
        tokens = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).sum()
        return loss, tokens.new_tensor(len(rows)), tokens

    def unlearnt(self, batch: dict[str, torch.Tensor]) -> int:
        """How many label tokens of a batch, but those replayed, are not the likeliest after what stands before them, or
        by no more than bfloat16 rounds: merged, or asked in another batch, the model might say another."""
        self._refuse_odd(batch)
        inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "replayed")}
        asked = batch["labels"] != -100
        if "replayed" in batch:
            asked &= ~batch["replayed"]
        rows, columns = asked[:, 1:].nonzero(as_tuple=True)
        logits = logits_at(self.net, *self._placed(inputs, rows, columns), self.accelerator.autocast)
        (first, second), likeliest = (each.T for each in logits.topk(2))
        learnt = (likeliest[0] == batch["labels"][rows, columns + 1]) & (first - second > LEAD * first.abs())
        return int((~learnt).sum())

    def _base(self, inputs: dict, rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`base_at` of positions, for which it reads no more of the batch than it has to."""
        some, rows = rows.unique(return_inverse=True)
        inputs = {name: tensor[some, : columns.max() + 1] for name, tensor in inputs.items()}
        return base_at(self.net, *self._placed(inputs, rows, columns), self.accelerator.autocast)

    def _refuse_odd(self, batch: dict) -> None:
        refuse_odd(batch, f"Batch {self.batch} of the {self.stage} data", self.vocabulary)

    def _placed(self, inputs: dict, rows: torch.Tensor, columns: torch.Tensor) -> tuple[dict, torch.Tensor]:
        """The inputs, without their padding if the model takes them so, and where in them laid flat places are."""
        if "attention_mask" in inputs and takes_rows(self.net):
            inputs, places = flattened(inputs)
            return inputs, places[rows, columns]
        return inputs, rows * inputs["input_ids"].shape[1] + columns

    @torch.no_grad()
    def _suspects(self) -> str:
        """The batch, or batches, of a step that was not taken, and their texts: of the rows whose loss by itself is no
        number; of all where each is, as with gradients."""
        batches = self.since_step.items()
        places = [(number, row, one) for number, batch in batches for row, one in enumerate(rows_in(batch))]
        labelled = [place for place in places if (place[2]["labels"][:, 1:] != -100).any()]
        shown = [place for place in labelled if not self._loss(place[2])[0].isfinite()] or labelled
        lines = [f"batch {number}, row {row}: {self._text(one)}" for number, row, one in shown[:ROWS_SHOWN]]
        more = [f"and {len(shown) - ROWS_SHOWN} rows more"] if len(shown) > ROWS_SHOWN else []
        return "\n    ".join([f"The step's rows, in epoch {self.epoch}:", *lines, *more])

    def _text(self, row: dict) -> str:
        ids = row["input_ids"][0][row.get("attention_mask", torch.ones_like(row["input_ids"]))[0].bool()].tolist()
        text = self.tokenizer.decode(ids) if self.tokenizer else " ".join(map(str, ids))
        return repr(text if len(text) < 200 else f"{text[:120]} … {text[-60:]}")

    def _without_repeated(self, batch: dict) -> dict:
        """accelerate fills the last global batch of an epoch with rows from its start: without labels on those."""
        state = self.accelerator.gradient_state
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return batch
        rows = state.active_dataloader.total_batch_size // self.accelerator.num_processes
        labels = batch["labels"].clone()
        labels[max(0, state.remainder - self.accelerator.process_index * rows) :] = -100
        return batch | {"labels": labels}

    def _summed(self) -> list[float]:
        """Loss, label tokens and tokens of this step, of all processes; in training their gradients are summed too."""
        pending, self.pending = self.pending, torch.zeros_like(self.pending)
        params = self.params if self.stage == "train" else []
        if any(param.grad is None for param in params):
            names = [name for name, param in trainable(self.net) if param.grad is None]
            raise ChatmagicError(
                f"{len(names)} trainable parameters get no gradient, the first is {names[0]}. With gradient "
                "checkpointing call model.enable_input_require_grads() first; freeze what the loss does not reach."
            )
        if (processes := self.accelerator.num_processes) > 1:
            sums = torch.cat([*(param.grad.flatten() for param in params), pending])
            add_up(sums, processes)
            *grads, pending = sums.split([*(param.numel() for param in params), len(pending)])
            for param, grad in zip(params, grads):
                param.grad = grad.view_as(param).to(param.dtype)
        return pending.tolist()

    def _update(self, loss: float, label_tokens: float) -> None:
        """The optimizer step, with gradients of the mean over the label tokens of the global batch.

        accelerate has divided them by the steps that are accumulated, which is undone. The penalty joins after fp16's
        loss scale is off.
        """
        if not label_tokens:
            raise ChatmagicError(
                "All labels of this batch are -100, so nothing is trained. show_labels(...) pictures a sample; "
                "are the replies cut off by a length limit?"
            )
        self.accelerator.unscale_gradients()
        if not self.optimizer.state and not any(torch._foreach_norm([param.grad for param in self.params])):
            raise ChatmagicError(
                "All gradients of the first step are zero, so nothing would be trained. Is the adapter enabled, and "
                "on layers that the logits depend on?"
            )
        scale = self.accelerator.gradient_accumulation_steps / label_tokens
        penalty, norm = clip(self.params, scale, self.allocator, self.max_grad_norm)
        norm = norm.item()
        # A scaler skips the step if gradients overflow in fp16, and scales less; it cannot mend the loss itself.
        refuse_not_finite(loss, 0.0 if self.accelerator.scaler else norm)
        if self.allocator:
            self.log |= {"train_penalty": penalty.item(), "rank_budget": self.allocator.budget}
        self.log |= {"lr": float(self.optimizer.param_groups[0]["lr"]), "grad_norm": norm}
        take_step(self.optimizer, self.allocator)
        if not self.accelerator.optimizer_step_was_skipped:
            self.skipped = 0
            self._allocate()
            return
        self.skipped += 1
        if self.skipped >= SKIPPED:
            raise NotFinite(
                f"The gradients of {SKIPPED} steps in a row were beyond what fp16 can hold, and no step was taken: "
                "nothing is trained so. Train with mixed_precision='no', or 'bf16' where the GPU has it."
            )

    def _allocate(self) -> None:
        if self.allocator:
            self.allocator.allocate()
            self.log["rank_budget"] = self.allocator.budget
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()

    def _add_to_log(self, loss: float, label_tokens: float, tokens: float) -> None:
        if not math.isfinite(loss):
            raise NotFinite(f"The {self.stage} loss is {loss}. {CALMER}")
        self.sums = [self.sums[0] + loss, self.sums[1] + label_tokens]
        self.log[f"{self.stage}_loss"] = self.sums[0] / self.sums[1] if self.sums[1] else math.nan
        if self.stage == "train":
            self.tokens += tokens
            self.log["tokens_per_s"] = self.tokens / (time.perf_counter() - self.started)
            self.log["peak_memory"] = peak_memory(self.accelerator.device)


def refuse_not_finite(loss: float, norm: float) -> None:
    """Raise NotFinite where a step must not be taken: it would make the whole adapter what its gradients are."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise NotFinite(
            f"The train loss is {loss:.4g} and the norm of the gradients {norm:.4g}, so this step was not taken, and "
            f"what was saved before is as it was. {CALMER} To go on from there: fit(..., resume=True)."
        )


def peak_memory(device: torch.device) -> float:
    """The most memory held so far, in GiB: torch's on a GPU, the whole process's on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
