"""What fit refuses before the first step: settings that would train nothing, or not what was meant.

A check is a function of the KerasModel whose fit is about to begin; it returns what is wrong and what to do about it,
or None. They run in the order of CHECKS, before anything is written.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from peft.tuners.tuners_utils import BaseTunerLayer

from ..errors import ChatmagicError
from ..models.parts import trainable
from ..models.quantize import packed_for_inference
from .step import StepRunner

if TYPE_CHECKING:
    from .keras import KerasModel


def no_adapter(run: "KerasModel") -> str | None:
    """A model without an adapter."""
    if not any(isinstance(module, BaseTunerLayer) for module in run.net.modules()):
        return "The model has no adapter on any layer. Wrap it: get_peft_model(model, adalora_config(...))."


def nothing_trainable(run: "KerasModel") -> str | None:
    """An adapter that is frozen."""
    if not any(trainable(run.net)):
        return "No parameter is trainable. PeftModel.from_pretrained wants is_trainable=True to go on training."


def optimizer_of_others(run: "KerasModel") -> str | None:
    """An optimizer of other parameters."""
    params = {id(param) for _, param in trainable(run.net)}
    if not params & {id(param) for group in run.optimizer.param_groups for param in group["params"]}:
        return "The optimizer holds no trainable parameter. Make it after get_peft_model, of its result's."


def no_learning_rate(run: "KerasModel") -> str | None:
    """A learning rate of 0, in all groups."""
    if not any(group.get("initial_lr", group["lr"]) for group in run.optimizer.param_groups):
        return "The learning rate is 0. Try lr=1e-3."


def gradients_that_nobody_adds_up(run: "KerasModel") -> str | None:
    """Several processes and a StepRunner of somebody else's."""
    if run.accelerator.num_processes > 1 and not issubclass(run.StepRunner, StepRunner):
        return (
            "Several processes want chatmagic's StepRunner, or one derived from it, which adds up their gradients: "
            f"this is {run.StepRunner.__module__}.{run.StepRunner.__name__}."
        )


def repacked_weights(run: "KerasModel") -> str | None:
    """A 4-bit model that has answered on the CPU."""
    if packed_for_inference(run.net):
        return (
            "This 4-bit model has answered on the CPU already, for which bitsandbytes repacked its weights into a "
            "form that has no gradients. Load it again, and train before you chat."
        )


def no_steps(run: "KerasModel") -> str | None:
    """No batch, or no epoch."""
    if not run.steps:
        return f"{run.epochs} epochs of {len(run.train_loader)} batches: there is nothing to train on."


def monitor_without_validation(run: "KerasModel") -> str | None:
    """A score to watch that nothing gives."""
    if run.monitor.startswith("val_") and run.val_loader is None:
        return f"monitor={run.monitor!r} needs val_data. Give it, or use monitor='train_loss'."


def ranks_never_final(run: "KerasModel") -> str | None:
    """A run that ends before AdaLoRA's schedule does."""
    if run.allocator and run.steps <= run.allocator.last:
        return (
            f"The run has {run.steps} optimizer steps ({run.epochs} epochs of {run.steps_per_epoch}), but the ranks "
            f"are final only after {run.allocator.last}. Make the adapter with "
            f"adalora_config(total_steps={run.steps}, ...)."
        )


def schedule_too_short(run: "KerasModel") -> str | None:
    """A learning rate schedule that ends before the run."""
    longest = getattr(run.lr_scheduler, "total_steps", run.steps)
    if run.steps > longest:
        return f"The lr_scheduler ends after {longest} of {run.steps} optimizer steps: give it total_steps={run.steps}."


CHECKS: list[Callable[["KerasModel"], str | None]] = [
    no_adapter,
    nothing_trainable,
    optimizer_of_others,
    no_learning_rate,
    gradients_that_nobody_adds_up,
    repacked_weights,
    no_steps,
    monitor_without_validation,
    ranks_never_final,
    schedule_too_short,
]


def refuse_what_cannot_train(run: "KerasModel") -> None:
    """Raise ChatmagicError with what the first of CHECKS that finds something says."""
    for check in CHECKS:
        if problem := check(run):
            raise ChatmagicError(problem)
