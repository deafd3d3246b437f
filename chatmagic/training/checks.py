"""What fit refuses before the first step: settings that would train nothing, or not what was meant.

A check is a function of the KerasModel whose fit is about to begin; it returns what is wrong and what to do about it,
or None. They run before anything is written: those of what fit was given, of the model alone, then of the run.
"""

import hashlib
import inspect
import json
import os
from collections import Counter
from collections.abc import Callable
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch
from accelerate.tracking import get_available_trackers
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader

from ..errors import ChatmagicError
from ..models.load import context_limit
from ..models.parts import trainable
from ..models.quantize import packed_for_inference
from ..text import did_you_mean
from .states import RunState, peft_tensors, saved_names
from .step import StepRunner

if TYPE_CHECKING:
    from .keras import KerasModel


def setting_of_another_kind(run: "KerasModel") -> str | None:
    """A number that counts nothing, and what is none."""
    wholes = {"epochs": run.epochs, "gradient_accumulation_steps": run.accumulation}
    wholes |= {} if run.save_every is None else {"save_every": run.save_every}
    for name, value in wholes.items():
        if not isinstance(value, Integral) or value < 1:
            return f"{name}={value!r}: there is nothing to train on so. Give a whole number from 1 on."
    if not isinstance(run.patience, Real) or not run.patience >= 1:
        return f"patience={run.patience!r}: give the epochs to wait for a better one, from 1 on."
    known = ("auto", "no", "bf16", "fp16")
    if run.precision not in (*known, None):
        return f"mixed_precision={run.precision!r} is none of {', '.join(known)}."
    for name, value in {"monitor": run.monitor, "mode": run.mode}.items():
        if not isinstance(value, str):
            return f"{name}={value!r} is no name. Leave it out, or give monitor='train_loss', mode='min'."
    if not isinstance(run.ckpt_path, str | os.PathLike):
        return f"ckpt_path={run.ckpt_path!r} is no folder. Leave it out, or give ckpt_path='checkpoint'."
    if not isinstance(run.callbacks, list | tuple):
        return f"callbacks is a {type(run.callbacks).__name__}; expected a list: callbacks=[...]."
    try:
        json.dumps(dict(run.about), default=str)
    except (TypeError, ValueError) as error:
        return f"about is nothing that run.json could hold ({error}): give a dict of plain values by their names."


def no_loader(run: "KerasModel") -> str | None:
    """Data that is no DataLoader of batches whose number is known."""
    for name, loader in {"train_data": run.train_loader, "val_data": run.val_loader, "learnt": run.learnt}.items():
        if loader is None and name != "train_data":
            continue
        if not isinstance(loader, DataLoader):
            return (
                f"{name} is a {type(loader).__name__}; expected a DataLoader: DataLoader({name}, batch_size=2, "
                "collate_fn=DataCollator(tokenizer))."
            )
        if not hasattr(loader.dataset, "__len__"):
            return f"{name} has no length, by which epochs and schedules are counted. Give its dataset a __len__."
        if loader.batch_size is None and loader.batch_sampler is None:
            return f"{name} makes no batches (batch_size=None). Give it a batch_size."


def no_adapter(run: "KerasModel") -> str | None:
    """A model without an adapter."""
    if not any(isinstance(module, BaseTunerLayer) for module in run.net.modules()):
        return "The model has no adapter on any layer. Wrap it: get_peft_model(model, adalora_config(...))."


def nothing_trainable(run: "KerasModel") -> str | None:
    """An adapter that is frozen."""
    if not any(trainable(run.net)):
        return "No parameter is trainable. PeftModel.from_pretrained wants is_trainable=True to go on training."


def too_coarse_to_train(run: "KerasModel") -> str | None:
    """Parameters in float16, as PEFT copies modules_to_save from a base of it: Adam's numbers vanish there, and torch
    unscales no gradients of theirs."""
    if coarse := [name for name, param in trainable(run.net) if param.dtype == torch.float16]:
        return (
            f"{len(coarse)} trainable parameters are float16, the first is {coarse[0]}, and fp16 wants those in "
            "float32: for p in model.parameters(): p.data = p.data.float() if p.requires_grad else p.data"
        )


def optimizer_of_others(run: "KerasModel") -> str | None:
    """An optimizer of other parameters."""
    params = {id(param) for _, param in trainable(run.net)}
    if not params & {id(param) for group in run.optimizer.param_groups for param in group["params"]}:
        return "The optimizer holds no trainable parameter. Make it after get_peft_model, of its result's."


def no_learning_rate(run: "KerasModel") -> str | None:
    """A learning rate of 0, in all groups; or none, where an optimizer finds its own."""
    if any(group["lr"] is None for group in run.optimizer.param_groups):
        return f"This {type(run.optimizer).__name__} has no learning rate (lr=None). Give it one, or use AdamW."
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


def adapter_on_an_adapter(run: "KerasModel") -> str | None:
    """get_peft_model called twice."""
    wrapped = sum(isinstance(module, PeftModel) for module in run.net.modules())
    if wrapped > 1 or any(isinstance(getattr(each, "base_layer", None), BaseTunerLayer) for each in run.net.modules()):
        return (
            "The model had an adapter already when get_peft_model gave it another: what is saved would fit no base. "
            "Load the model again and call get_peft_model once, or model = model.unload() before."
        )


def not_saved(run: "KerasModel") -> str | None:
    """Parameters that would be trained and lost."""
    try:
        ours, theirs = saved_names(run.net).keys(), peft_tensors(run.net).keys()
    except (ValueError, KeyError) as error:
        return f"PEFT cannot save this adapter ({error}): it would be trained and lost. Use adapter_config(...)."
    if lost := sorted(ours ^ theirs):
        return (
            f"{len(lost)} trainable parameters would not be in the saved adapter by the name that they have, the first "
            f"is {lost[0]}: they would be trained and lost. Freeze them: param.requires_grad_(False)."
        )


def no_steps(run: "KerasModel") -> str | None:
    """No batch, or no epoch."""
    if not len(run.train_loader) and (rows := row_count(run.train_loader)):
        return (
            f"{rows} rows are fewer than a batch of {run.settings['batch_size']}, and drop_last leaves such a batch "
            "out: there is nothing to train on. Give a smaller batch_size, or drop_last=False."
        )
    if not run.steps:
        return f"{run.epochs} epochs of {len(run.train_loader)} batches: there is nothing to train on."


def nothing_to_validate_on(run: "KerasModel") -> str | None:
    """Validation data without a batch."""
    if run.val_loader is not None and not len(run.val_loader):
        rows = row_count(run.val_loader)
        why = f"fewer than a batch, which drop_last leaves out: {rows} rows" if rows else "empty"
        return f"val_data is {why}. Give it rows, or leave it out and use monitor='train_loss'."
    if run.val_loader is not None and all_masked(run.val_loader):
        return "val_loss is not a number so. Has val_data any label that is not -100? Each of its rows has none."


def nothing_to_know_by_heart(run: "KerasModel") -> str | None:
    """What is to be learnt without a batch, of which nothing would ever be unlearnt."""
    if run.learnt is not None and not len(run.learnt):
        return "learnt is empty: it would be learnt at once. Give it rows, or leave it out."
    if run.learnt is not None and all_masked(run.learnt):
        return "learnt has no label that is not -100: it would be learnt at once. Give it answers, or leave it out."


def rows_of(loader: DataLoader, *names: str) -> list[dict]:
    """The rows of a dataset that is a list, if they have what is named; others make them as they are asked for."""
    rows = getattr(loader, "dataset", None)
    known = isinstance(rows, list) and all(
        isinstance(row, dict) and all(isinstance(row.get(name), list | torch.Tensor) for name in names) for row in rows
    )
    return rows if known else []


def all_masked(loader: DataLoader) -> bool:
    """Whether no row of a dataset that is a list has anything to predict."""
    rows = rows_of(loader, "labels")
    return bool(rows) and all(label == -100 for row in rows for label in torch.as_tensor(row["labels"])[1:].tolist())


def row_count(loader: DataLoader) -> int:
    """The rows of a loader's dataset, 0 where it cannot tell."""
    return len(loader.dataset) if hasattr(loader.dataset, "__len__") else 0


def unknown_mode(run: "KerasModel") -> str | None:
    """A mode that is none."""
    if run.mode not in ("min", "max"):
        return f"mode={run.mode!r} is neither 'min' nor 'max'{did_you_mean(run.mode, ('min', 'max'))}"


def unknown_monitor(run: "KerasModel") -> str | None:
    """Where it can be known: a StepRunner of somebody's may report more."""
    columns = ["train_loss", "val_loss", "lr", "grad_norm", "tokens_per_s", "peak_memory"]
    columns += ["train_penalty", "val_penalty", "rank_budget"] if run.allocator else []
    if run.StepRunner is StepRunner and run.monitor not in columns:
        return f"monitor={run.monitor!r} is nothing that fit measures{did_you_mean(run.monitor, columns)}"


def rows_beyond_the_context(run: "KerasModel") -> str | None:
    """Of datasets that are lists; others make their rows as they are asked for, and the step looks at each."""
    limit, reason = context_limit(run.net)
    for name, loader in {"train_data": run.train_loader, "val_data": run.val_loader}.items():
        lengths = [len(row["input_ids"]) for row in rows_of(loader, "input_ids")] if limit else []
        if too_long := [row for row, length in enumerate(lengths) if length > limit]:
            return (
                f"{len(too_long)} rows of {name} are longer than the model's context of {limit} tokens ({reason}): the "
                f"first is row {too_long[0]}, of {lengths[too_long[0]]}. Shorten them, or leave them out."
            )


def tracker_not_there(run: "KerasModel") -> str | None:
    """A tracker that is not installed."""
    if run.log_with and run.log_with not in (here := [str(tracker) for tracker in get_available_trackers()]):
        installed = f"Installed are: {', '.join(here)}." if here else "None is installed."
        return f"log_with={run.log_with!r}: there is no such tracker here. {installed} pip install {run.log_with}"


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


def scheduler_of_others(run: "KerasModel") -> str | None:
    """A schedule that moves another optimizer's rate, or moves by a measurement."""
    if isinstance(run.lr_scheduler, ReduceLROnPlateau):
        return (
            "ReduceLROnPlateau moves by a measurement, and fit moves a schedule by its steps. Use patience=, and a "
            "schedule of steps, as OneCycleLR."
        )
    if getattr(run.lr_scheduler, "optimizer", run.optimizer) is not run.optimizer:
        return "The lr_scheduler moves the rate of another optimizer than this run's. Make it of this one's."


def optimizer_that_asks(run: "KerasModel") -> str | None:
    """An optimizer that computes the loss itself, again and again, or is for gradients that no adapter has."""
    if isinstance(run.optimizer, torch.optim.SparseAdam):
        return "SparseAdam is for sparse gradients, and an adapter's are dense. Use AdamW."
    closure = inspect.signature(run.optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        return f"{type(run.optimizer).__name__} asks for the loss again and again, which fit cannot give. Use AdamW."


def schedule_too_short(run: "KerasModel") -> str | None:
    """A learning rate schedule that ends before the run."""
    made_with = getattr(run.lr_scheduler, "__dict__", {}) | (run.settings["lr_scheduler"] or {})
    for name in ("total_steps", "num_training_steps"):
        if run.steps > (longest := made_with.get(name, run.steps)):
            return f"The lr_scheduler ends after {longest} of {run.steps} optimizer steps: give it {name}={run.steps}."


OF_THE_ARGUMENTS: list[Callable[..., str | None]] = [setting_of_another_kind, no_loader]
OF_THE_MODEL: list[Callable[..., str | None]] = [no_adapter, adapter_on_an_adapter, nothing_trainable, repacked_weights]
OF_THE_RUN: list[Callable[..., str | None]] = [
    not_saved,
    too_coarse_to_train,
    optimizer_of_others,
    no_learning_rate,
    optimizer_that_asks,
    scheduler_of_others,
    gradients_that_nobody_adds_up,
    no_steps,
    nothing_to_validate_on,
    nothing_to_know_by_heart,
    unknown_mode,
    unknown_monitor,
    monitor_without_validation,
    rows_beyond_the_context,
    ranks_never_final,
    schedule_too_short,
    tracker_not_there,
]


def refuse(checks: list[Callable[..., str | None]], run: "KerasModel") -> None:
    """Raise ChatmagicError with what the first of the checks that finds something says."""
    for check in checks:
        if problem := check(run):
            raise ChatmagicError(problem)


# --- whether a state is of this run

# Of an optimizer: its rate, which is told by itself, and what makes it faster.
HOW_IT_STEPS = ("lr", "fused", "foreach", "capturable", "differentiable")


def run_settings(run: "KerasModel", train_data: DataLoader) -> dict:
    """What makes a run the one that it is: plain values by their names."""
    config = run.net.peft_config[run.net.active_adapter].to_dict()
    adapter = {name: value for name, value in config.items() if type(value) in (int, float, bool)}
    optimizer, scheduler = run.optimizer, run.lr_scheduler
    loaders = {"train": run.train_loader, "val": run.val_loader, "learnt": run.learnt}
    return {
        "data": {name: data_hash(loader) for name, loader in loaders.items()},
        "rows": len(train_data.dataset) if hasattr(train_data.dataset, "__len__") else None,
        "sampler": type(run.samplers[0]).__name__,
        "batch_size": train_data.batch_size,
        "batches": len(run.train_loader),
        "gradient_accumulation_steps": run.accelerator.gradient_accumulation_steps,
        "epochs": run.epochs,
        "learnt": None if run.learnt is None else row_count(run.learnt),
        "monitor": run.monitor,
        "mode": run.mode,
        "optimizer": type(optimizer).__name__,
        "optimizer_settings": {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in optimizer.defaults.items()
            if name not in HOW_IT_STEPS and isinstance(value, int | float | str | tuple)
        },
        "learning_rate": [float(group.get("initial_lr", group["lr"]) or 0) for group in optimizer.param_groups],
        "lr_scheduler": scheduler and schedule_settings(scheduler, run.steps),
        "adapter": {name: value for name, value in adapter.items() if name != "inference_mode"},
    }


def data_hash(loader: DataLoader | None) -> str | None:
    """A SHA-256 of the ids and labels of a dataset that is a list, or what another says of itself, as Examples; None
    where it says nothing, and may draw its rows."""
    if callable(digest := getattr(getattr(loader, "dataset", None), "digest", None)):
        return digest()
    rows = rows_of(loader, "input_ids", "labels") if loader else []
    if not rows:
        return None
    digest = hashlib.sha256()
    for row in rows:
        for name in ("input_ids", "labels"):
            digest.update(json.dumps(torch.as_tensor(row[name]).tolist()).encode())
    return digest.hexdigest()


def schedule_settings(scheduler: LRScheduler, steps: int) -> dict:
    """The class of a torch scheduler and the plain values that it was made with; of functions those that they hold, as
    transformers' do, or what they give at the start, in the middle and at the end of so many steps."""
    names = {name.removesuffix("s") for name in inspect.signature(type(scheduler).__init__).parameters}
    settings: dict[str, Any] = {"class": type(scheduler).__name__}
    for name, value in vars(scheduler).items():
        name = name.strip("_")
        if name == "lr_lambdas":
            for function in value:
                gives = {"factors": [float(function(step)) for step in (0, steps // 2, steps)]}
                settings |= getattr(function, "keywords", gives)
        elif name == "schedulers":
            settings |= {f"{number}": schedule_settings(part, steps) for number, part in enumerate(value)}
        elif name.removesuffix("s") in names - {"last_epoch", "optimizer"}:
            settings[name] = sorted(value.elements()) if isinstance(value, Counter) else value
    return {name: value for name, value in settings.items() if is_plain(value)}


def is_plain(value: object) -> bool:
    """Whether it is a number, a word, or a list or dict."""
    return type(value) in (int, float, bool, str, list, dict)


def refuse_another_run(state: RunState, run: "KerasModel") -> None:
    """Raise ChatmagicError if `run` cannot go on with the state. It may have another patience, precision or device;
    and more or fewer epochs where no schedule goes by them."""
    processes, params = len(state.rng), dict(trainable(run.net))
    where = f"The state in {run.ckpt_path} is"
    if processes != run.accelerator.num_processes:
        raise ChatmagicError(
            f"{where} of {processes} processes, this run has {run.accelerator.num_processes}. Resume with as many: "
            f"accelerate launch --num_processes {processes}."
        )
    if {name: param.shape for name, param in params.items()} != {n: param.shape for n, param in state.params.items()}:
        raise ChatmagicError(f"{where} of an adapter on other layers than this model's, or of other ranks.")
    now, then = flat(run.settings), flat(state.settings or {})
    if not state.settings and state.of not in (None, run.steps):  # of an earlier version
        now, then = {"steps": run.steps}, {"steps": state.of}
    free = {"epochs"} if run.allocator is None and run.lr_scheduler is None else set()
    free |= set() if run.monitor.startswith("val_") else {"data.val"}
    names = dict.fromkeys([*now, *then] if then else [])
    others = [name for name in names if name not in free and now.get(name) != then.get(name)]
    if others:
        told = ", ".join(f"{name} {_short(then.get(name))}, now {_short(now.get(name))}" for name in others)
        raise ChatmagicError(
            f"{where} of another run: {told}. Give fit what it had then, or start anew with fit(..., resume=False)."
        )


def _short(value: object) -> str:
    """A value in words; of a hash as much as tells it from another."""
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)


def flat(settings: dict) -> dict:
    """Settings within settings by names with dots."""
    parts = (
        {f"{n}.{k}": v for k, v in flat(s).items()} if isinstance(s, dict) else {n: s} for n, s in settings.items()
    )
    return {name: value for part in parts for name, value in part.items()}
