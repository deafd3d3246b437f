"""KerasModel: torchkeras' runners and callbacks under a `fit` that suits an adapter whose ranks shrink."""

import io
import math
import os
import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.data_loader import get_sampler
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import filter_trackers
from accelerate.utils import GradScalerKwargs, broadcast, gather_object
from peft import PeftModel
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from torchkeras import kerasmodel

from ..accel.allocator import rank_allocator
from ..accel.attention import without_cudnn_attention
from ..accel.captured import CapturedStep, why_not
from ..accel.layers import fast_layers, why_padded
from ..errors import ChatmagicError
from ..files import alone_in
from ..models.parts import experts, has_stepped, trainable
from ..text import did_you_mean
from . import functional
from .checks import OF_THE_ARGUMENTS, OF_THE_MODEL, OF_THE_RUN, flat, refuse, refuse_another_run, run_settings
from .plots import EpochLines, StepBar, pictures
from .record import HISTORY, write_history, write_run
from .runtime import Batches, best_precision, get_rng, lost_peer, noted_interrupt, seeded, set_rng
from .states import STATE, RunState, load_adapter, newest_state, save_adapter, save_state, state_folder
from .step import StepRunner

# What a model was before its first step: a model that was stopped on its way can start anew.
BEGINNINGS: WeakKeyDictionary[torch.nn.Module, bytes] = WeakKeyDictionary()


class TrainingInterrupted(ChatmagicError):
    """Ctrl-C: the state is saved, and the message says how to go on."""


class KerasModel(kerasmodel.KerasModel):
    """torchkeras' KerasModel for a PEFT model, with its own `fit`.

    The library's `fit` counts an epoch 0 without optimizer steps as the best, always starts there (so it cannot
    resume), saves and stops before AdaLoRA's ranks are final, and leaves the net on the CPU.
    """

    StepRunner = StepRunner

    def __init__(
        self,
        net: PeftModel,
        loss_fn: Callable | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        lr_scheduler: LRScheduler | None = None,
    ) -> None:
        super().__init__(net, loss_fn, optimizer=optimizer, lr_scheduler=lr_scheduler)
        self.ckpt_path = Path("checkpoint")  # until fit says another

    def fit_ddp(self, *args: object, **kwargs: object) -> None:
        """Refused with a ChatmagicError, which names the ways there are."""
        raise ChatmagicError(
            "torchkeras' fit_ddp would train on another way than fit, and save what no one can load. Several GPUs: "
            "accelerate launch --multi_gpu --num_processes N -m chatmagic.cli train PROFILE, or fit in a script of "
            "your own under accelerate launch."
        )

    def save_ckpt(self, ckpt_path: str | Path | None = None, accelerator: Accelerator | None = None) -> None:
        """Write the adapter to `ckpt_path`, by default fit's: see `states.save_adapter`. torchkeras passes its
        `accelerator`, which is not needed."""
        save_adapter(self.net, ckpt_path or self.ckpt_path)

    def load_ckpt(self, ckpt_path: str | Path | None = None) -> None:
        """Take up the adapter that is saved in `ckpt_path`, by default fit's: its factors, and its ranks for as long
        as it is trained on. What the model was before counts no more: the next fit is of a run of its own."""
        pattern = load_adapter(self.net, ckpt_path or self.ckpt_path)
        if pattern and (allocator := rank_allocator(self.net)):
            allocator.settle(pattern)
        BEGINNINGS.pop(self.net, None)

    def fit(
        self,
        train_data: DataLoader,
        val_data: DataLoader | None = None,
        epochs: int = 10,
        ckpt_path: str | Path = "checkpoint",
        patience: int = 5,
        monitor: str = "val_loss",
        mode: str = "min",
        callbacks: list | None = None,
        plot: bool = True,
        resume: bool | None = None,
        save_every: int | None = None,
        mixed_precision: str = "auto",
        cpu: bool = False,
        gradient_accumulation_steps: int = 1,
        fast: bool = True,
        log_with: str | None = None,
        about: dict | None = None,
        learnt: DataLoader | None = None,
    ) -> pd.DataFrame:
        """Train for `epochs`, or until `monitor` has not improved for `patience` of them; returns the history.

        train_data, val_data: DataLoaders of batches as StepRunner wants them. In several processes, each with the
        loader of its own batch size; every epoch's rows are dealt out among them.
        ckpt_path: gets the adapter of the best epoch (which the net has too at the end) and the pictures. With
        AdaLoRA no epoch counts, for the best or for patience, before the ranks are final.
        monitor: a column of the history; mode: "min" where less of it is better, else "max".
        callbacks: torchkeras' further ones, whose `on_train_epoch_end(model)` and the like are called.
        resume: True goes on from the newest state in ckpt_path, to the same losses as an unbroken run. A state is
        saved at the start, at the end of an epoch, on Ctrl-C, and every `save_every` optimizer steps if that is given.
        False starts anew, also with a model that has made steps already. None is for a model and a ckpt_path where
        there is nothing to choose; where there is, the environment's CHATMAGIC_RESUME (1 or 0) says it for runs that
        nobody watches, and else ChatmagicError asks.
        plot: show the curve and a progress bar while it runs, and save pictures; else print a line an epoch.
        mixed_precision: "auto" is bf16 where the hardware has it, fp16 on older GPUs, else "no".
        cpu: train on the CPU though there is a GPU. gradient_accumulation_steps: batches an optimizer step.

        fast: False trains plainly, with the layers, the attention and the optimizer as PEFT, transformers and torch
        have them, and without CUDA graphs: slower, and the same but for rounding.

        log_with: a tracker of accelerate's that is installed ("tensorboard", "swanlab", "wandb", ...): it is told the
        settings, and the history as it grows.
        about: what else run.json is to say of the run, plain values: that file, beside the adapter, says what the run
        was; history.csv is the history.
        learnt: a DataLoader of what is to be known by heart. At an epoch's end, once the ranks are final, one pass asks
        whether each of its label tokens that are not replayed is the likeliest, by more than bfloat16 rounds;
        `unlearnt` in the history counts those that are not, and fewer of them make an epoch a better one. Training ends
        when there is none for two epochs in a row. Where some are left at the end it goes on, at the rate that the
        schedule ended with, for at most half as many epochs again, and then says what to try.

        The lr_scheduler moves once an optimizer step. Raises ChatmagicError for settings that would train nothing
        and for a full disk, TrainingInterrupted on Ctrl-C.
        """
        self.epochs, self.patience, self.monitor, self.mode = epochs, patience, monitor, mode
        self.ckpt_path, self.save_every, self.fast, self.log_with = ckpt_path, save_every, fast, log_with
        self.callbacks, self.about = callbacks or [], about or {}
        self.train_loader, self.val_loader, self.learnt = train_data, val_data, learnt
        self.accumulation, self.precision = gradient_accumulation_steps, mixed_precision
        refuse(OF_THE_ARGUMENTS, self)
        self.ckpt_path = Path(ckpt_path)
        # One process may fit twice, with another precision; accelerate's singletons would refuse.
        AcceleratorState._reset_state()
        GradientState._reset_state()
        model_type = getattr(getattr(self.net, "config", None), "model_type", None)
        self.accelerator = Accelerator(
            mixed_precision=best_precision(cpu, model_type) if mixed_precision == "auto" else mixed_precision,
            cpu=cpu,
            gradient_accumulation_steps=gradient_accumulation_steps,
            # fp16: the loss is a sum over the label tokens, some hundred times the mean that 2**16 is meant for.
            kwargs_handlers=[GradScalerKwargs(init_scale=2.0**8)],
            project_dir=self.ckpt_path,
        )
        refuse(OF_THE_MODEL, self)
        self.allocator = rank_allocator(self.net)
        self.samplers = [seeded(get_sampler(loader)) for loader in (train_data, val_data) if loader is not None]
        self.train_loader, self.val_loader, self.learnt = self.accelerator.prepare(train_data, val_data, learnt)
        self.scheduled, self.most_epochs = epochs, epochs + (0 if learnt is None else math.ceil(epochs / 2))
        self.steps_per_epoch = math.ceil(len(self.train_loader) / gradient_accumulation_steps)
        self.steps = epochs * self.steps_per_epoch
        self.settings = run_settings(self, train_data)
        refuse(OF_THE_RUN, self)
        resume = self._resumes(resume)
        rng = gather_object([get_rng(self.samplers)])
        self.state = RunState(settings=self.settings, epoch_rng=rng, rng=rng)
        self.trackers = []
        self.callbacks = [*(pictures() if plot else [EpochLines()]), StepBar(), *self.callbacks]
        with alone_in(self.ckpt_path) if self.accelerator.is_main_process else nullcontext():
            return self._train(resume)

    def _train(self, resume: bool) -> pd.DataFrame:
        try:
            self._place()
            if resume:
                state = newest_state(self.ckpt_path)
                refuse_another_run(state, self)
                self._restore(replace(state, settings=self.settings))
            else:
                self._start()
            self.captured = self._capture()
            self._say_what_is_left_out()
            self._on_main(write_run, self, self.about)
            self.trackers = self._trackers()
            self._call_back("on_fit_start")
            with ExitStack() as stack:
                self.interrupt = stack.enter_context(noted_interrupt())
                stack.enter_context(without_cudnn_attention())
                if self.fast:
                    stack.enter_context(fast_layers(self.net))
                while not self._finished():
                    self._run_epoch()
            if self.best is None:
                warnings.warn("No epoch ended with final ranks: the adapter is the last one, not the best.")
                self._on_main(self.save_ckpt, self.ckpt_path, accelerator=self.accelerator)
            load_adapter(self.net, self.ckpt_path)
            if left := self.best and self.best.get("unlearnt"):
                curve = " → ".join(f"{count:.0f}" for count in self.history["unlearnt"] if not math.isnan(count))
                warnings.warn(
                    f"Not all is learnt: {left} tokens of the answers are not, or hardly, the likeliest ({curve}, by "
                    "epoch). Try more epochs, another learning rate, more data, or a smaller share of replay."
                )
            self._call_back("on_fit_end")
        except RuntimeError as error:
            if not lost_peer(error, self.accelerator.num_processes):
                raise
            raise ChatmagicError(
                f"Another process of this run has ended: {str(error).splitlines()[0]}. Its own message says why. The "
                f"newest state is in {self.ckpt_path}: start all processes again, with fit(..., resume=True), or "
                "--resume."
            ) from error
        finally:
            self.captured = self.runner = None  # the graphs hold memory
            self._tell(lambda: [tracker.finish() for tracker in self.trackers])
            self.net.eval()
            self.optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return pd.DataFrame(self.history)

    @property
    def history(self) -> dict[str, list]:
        """What was measured, a list a column, a number an epoch: what the callbacks draw."""
        return self.state.history

    @property
    def best(self) -> dict | None:
        """The epoch whose adapter was kept, and its score; None before there is one."""
        return self.state.best

    def _resumes(self, resume: bool | None) -> bool:
        """Whether to go on from a state; ChatmagicError where that must be said, and is not."""
        state = newest_state(self.ckpt_path, read=False)
        if resume and state is None:
            raise ChatmagicError(f"Nothing to resume in {self.ckpt_path}: no last-*/{STATE}. Start with resume=False.")
        broken_off = state is not None and state.step and not state.finished
        if resume is None and (broken_off or self._has_steps()):
            found = "This model has been trained already, and its schedule is spent"
            if broken_off:
                found = f"A run in {self.ckpt_path} was stopped after step {state.step} of {state.of}"
            resume = {"1": True, "0": False}.get(os.environ.get("CHATMAGIC_RESUME"))
            if resume is None:
                raise ChatmagicError(
                    f"{found}. Say which it is to be: fit(..., resume=True) goes on with that run, "
                    "fit(..., resume=False) starts anew from step 1, in place of what is there. As a command: "
                    "chatmagic train --resume, or --no-resume."
                )
        return bool(resume) and state is not None

    def _has_steps(self) -> bool:
        """Whether the optimizer has made steps, the adapter is on its way through its ranks, or it is not what it was
        when a fit began with it."""
        if has_stepped(self.optimizer) or (self.allocator and self.allocator.step):
            return True
        if self.net not in BEGINNINGS:
            return False
        params = RunState.read(io.BytesIO(BEGINNINGS[self.net])).params
        return any(not torch.equal(param.cpu(), params[name]) for name, param in trainable(self.net))

    def _start(self) -> None:
        """From the beginning: the model's own, if it has made steps since."""
        if not self._has_steps():
            BEGINNINGS[self.net] = self._snapshot().to_bytes()
        elif self.net in BEGINNINGS:
            state = RunState.read(io.BytesIO(BEGINNINGS[self.net]))
            if not has_stepped(self.optimizer):  # made again since, perhaps with another rate
                state = replace(state, optimizer=None, lr_scheduler=None)
            self._restore(replace(state, settings=self.settings))
        else:
            raise ChatmagicError("This model was trained elsewhere. To start anew, make it, and its optimizer, again.")
        self._save_state()

    def _place(self) -> None:
        """Device, the same adapter in all processes, loss scaling. The net is not given to accelerate, which would wrap
        its forward for good and refuse a 4-bit model on the CPU."""
        device = self.accelerator.device
        if next(self.net.parameters()).device != device:
            self.net.to(device)
        broadcast([param.detach() for _, param in trainable(self.net)])
        self._fuse(self.optimizer)
        self.optimizer = self.accelerator.prepare(self.optimizer)

    def _fuse(self, optimizer: torch.optim.Optimizer) -> None:
        """AdamW's step as one kernel, if this run is to be fast; else as it was made. A state that was loaded says how
        the run before it had it."""
        if type(optimizer) is torch.optim.AdamW:
            plainly = {name: optimizer.defaults[name] for name in ("fused", "foreach")}
            for group in optimizer.param_groups:
                group |= {"fused": True, "foreach": False} if self.fast else plainly

    def _trackers(self) -> list:
        """accelerate's, told what the run is. They are ended one by one: `end_training` ends the processes too."""
        if not self.log_with:
            return []
        self.accelerator.log_with = filter_trackers(self.log_with, self.ckpt_path)
        plain = {name: str(value) for name, value in flat(self.settings).items()}
        try:
            self.accelerator.init_trackers("chatmagic", config=plain)
        except Exception as error:  # whatever its library raises: no key, no network, a full disk
            raise ChatmagicError(
                f"{self.log_with} does not start: {str(error) or type(error).__name__}. Set it up, or train without "
                "log_with: history.csv holds the same."
            ) from error
        return self.accelerator.trackers

    def _tell(self, act: Callable[[], object]) -> None:
        """Let the trackers be told something; one that fails costs no run."""
        try:
            act()
        except Exception as error:
            self.trackers = []
            warnings.warn(
                f"{self.log_with} fails, and is told no more: {str(error) or type(error).__name__}. The run goes on, "
                f"and {self.ckpt_path / HISTORY} holds the same."
            )

    def _capture(self) -> CapturedStep | None:
        """The step as CUDA graphs, or None, with the reason told where that is not that nobody wants it."""
        if not self.fast:
            return None
        optimizer, ours = self.optimizer.optimizer, issubclass(self.StepRunner, StepRunner)
        reason = why_not(self.net, optimizer, self.accelerator) if ours else "StepRunner is not chatmagic's"
        if reason:
            if self.accelerator.device.type == "cuda":  # where there is none, nobody waits for that
                self.accelerator.print(f"The training step is not captured as a CUDA graph: {reason}.")
            return None
        return CapturedStep(functional, self.net, optimizer, self.accelerator, self.StepRunner.max_grad_norm)

    def _say_what_is_left_out(self) -> None:
        """Of the model, and of what would make it faster."""
        if experts(self.net):
            self.accelerator.print("The experts of this mixture get no adapter: the layers between them learn.")
        if self.fast and self.accelerator.device.type == "cpu" and (reason := why_padded(self.net)):
            self.accelerator.print(f"Batches are computed with their padding: {reason}.")

    def _run_epoch(self) -> None:
        state = self.state
        set_rng(state.epoch_rng[self.accelerator.process_index], self.samplers)
        self._run_stage("train", Batches(self.train_loader, state.batch, self._on_skipped, self._after_step))
        self._call_back("on_train_epoch_end")
        if self.val_loader is not None:
            with torch.no_grad():
                self._run_stage("val", Batches(self.val_loader))
        if self.monitor not in state.history:  # a StepRunner of somebody's: what it reports, none can know before
            raise ChatmagicError(
                f"monitor={self.monitor!r} is nothing that {self.StepRunner.__name__} reports, which is "
                f"{', '.join(state.history)}{did_you_mean(self.monitor, state.history)}"
            )
        for column in state.history.values():
            column += [math.nan] * (state.epoch - len(column))
        score = state.history[self.monitor][-1]
        if math.isnan(score):
            raise ChatmagicError(f"{self.monitor} is not a number. Has val_data any label that is not -100?")
        final = self.allocator is None or self.allocator.final
        if self.learnt is not None:
            self._note({"unlearnt": self._count_unlearnt() if final else math.nan})
        if final and self._improves(score):
            state.best = {"epoch": state.epoch, "score": score, "unlearnt": self._unlearnt()}
            self._on_main(self.save_ckpt, self.ckpt_path, accelerator=self.accelerator)
        self._call_back("on_validation_epoch_end")
        self._on_main(write_history, state.history, self.ckpt_path)
        if self.trackers:
            log = {name: values[-1] for name, values in state.history.items()}
            self._tell(lambda: self.accelerator.log(log, step=state.epoch))
        state.epoch, state.batch, state.sums = state.epoch + 1, 0, None
        self._extend()
        state.epoch_rng = gather_object([get_rng(self.samplers)])
        self._between_steps(save_due=True)

    def _note(self, measured: dict) -> None:
        """Add to the history of this epoch. A column has a number for each epoch: NaN where nothing was measured, as
        by another StepRunner, or before val_data was given."""
        for name, value in measured.items():
            column = self.history.setdefault(name, [])
            column += [math.nan] * (self.state.epoch - 1 - len(column))
            column[self.state.epoch - 1 :] = [value]

    def _run_stage(self, stage: str, batches: Iterable[dict]) -> None:
        training = stage == "train"
        self.runner = self.StepRunner(
            net=self.net,
            loss_fn=self.loss_fn,
            accelerator=self.accelerator,
            stage=stage,
            metrics_dict=deepcopy(self.metrics_dict),
            optimizer=self.optimizer if training else None,
            lr_scheduler=self.lr_scheduler if training and self.state.epoch <= self.scheduled else None,
        )
        loader = self.train_loader if training else self.val_loader
        self.runner.tokenizer = getattr(loader.collate_fn, "tokenizer", None)
        self.runner.epoch = self.state.epoch
        if training:
            self.runner.captured, self.runner.batch = self.captured, self.state.batch
            self.runner.sums, self.runner.skipped = self.state.sums or [0.0, 0.0], self.state.skipped
        log = self.EpochRunner(self.runner, quiet=True)(batches)
        self.state.skipped = getattr(self.runner, "skipped", 0) if training else self.state.skipped
        self._note(({"epoch": self.state.epoch} if training else {}) | log)

    def _on_skipped(self) -> None:
        set_rng(self.state.rng[self.accelerator.process_index], self.samplers)

    def _after_step(self, batch: int) -> None:
        self.state.batch, self.state.sums = batch, getattr(self.runner, "sums", None)
        self.state.skipped = getattr(self.runner, "skipped", 0)
        self._call_back("on_train_step_end")
        if self.accelerator.sync_gradients:
            self._between_steps(save_due=bool(self.save_every) and self.step % self.save_every == 0)

    def _between_steps(self, save_due: bool) -> None:
        """With nothing half done: save if it is time or Ctrl-C was pressed; then also stop."""
        asked = torch.tensor(int(self.interrupt.is_set()), device=self.accelerator.device)
        stop = bool(self.accelerator.reduce(asked))
        if save_due or stop:
            self._save_state()
        if stop:
            raise TrainingInterrupted(
                f"Interrupted after step {self.step} of {self.steps}. The state is in "
                f"{state_folder(self.ckpt_path, self.step)}: to go on, here or in a new kernel that has made the model "
                "again, call fit(..., resume=True), or: chatmagic train --resume."
            )

    @property
    def step(self) -> int:
        """Optimizer steps so far."""
        done = math.ceil(self.state.batch / self.accelerator.gradient_accumulation_steps)
        return (self.state.epoch - 1) * self.steps_per_epoch + done

    @torch.no_grad()
    def _count_unlearnt(self) -> int:
        runner = StepRunner(self.net, self.loss_fn, self.accelerator, "val")  # ours: another's need not know how
        counts = torch.tensor(
            [runner.unlearnt(batch) for batch in Batches(self.learnt)], device=self.accelerator.device
        )
        return int(self.accelerator.reduce(counts.sum()))

    def _unlearnt(self) -> int | None:
        """How many tokens were not learnt at the end of the last epoch; None where nobody asked."""
        last = self.history.get("unlearnt", [math.nan])[-1]
        return None if math.isnan(last) else last

    def _improves(self, score: float) -> bool:
        if self.best is None:
            return True
        if (fewest := self.best.get("unlearnt")) != self._unlearnt():
            return self._unlearnt() < fewest
        return score > self.best["score"] if self.mode == "max" else score < self.best["score"]

    def _finished(self) -> bool:
        """Whether all epochs are through, or patience is, or everything is learnt."""
        waited = self.best is not None and self.state.epoch - 1 - self.best["epoch"] >= self.patience
        most = self.most_epochs if self._unlearnt() else self.scheduled
        return waited or self.history.get("unlearnt", [])[-2:] == [0, 0] or self.state.epoch > most

    def _extend(self) -> None:
        """Let what is told of the run be as long as it now may be, where its schedule is through and it goes on."""
        if self.state.epoch > self.scheduled and not self._finished():
            self.epochs, self.steps = self.most_epochs, self.most_epochs * self.steps_per_epoch

    def _save_state(self) -> None:
        self._on_main(save_state, self.net, self._snapshot(), self.ckpt_path)

    def _snapshot(self) -> RunState:
        """The state, with all that changes by itself as it is now."""
        return replace(
            self.state,
            step=self.step,
            of=self.steps,
            finished=self._finished(),
            rng=gather_object([get_rng(self.samplers)]),
            params={name: param.detach() for name, param in trainable(self.net)},
            allocator=self.allocator and self.allocator.state_dict(),
            optimizer=self.optimizer.state_dict(),
            lr_scheduler=self.lr_scheduler and self.lr_scheduler.state_dict(),
            scaler=self.accelerator.scaler and self.accelerator.scaler.state_dict(),
        )

    @torch.no_grad()
    def _restore(self, state: RunState) -> None:
        for name, param in trainable(self.net):
            param.copy_(state.params[name])
        for part in ("allocator", "optimizer", "lr_scheduler"):
            if (its_state := getattr(state, part)) is not None:
                getattr(self, part).load_state_dict(its_state)
        self._fuse(self.optimizer.optimizer)
        if state.scaler and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state.scaler)
        self.state = state
        self._extend()
        self.train_loader.iteration = state.epoch - 1  # a dataset or sampler may have a set_epoch

    def _on_main(self, write: Callable, *args: Any, **kwargs: Any) -> None:
        if self.accelerator.is_main_process:
            write(*args, **kwargs)
        self.accelerator.wait_for_everyone()

    def _call_back(self, event: str) -> None:
        if self.accelerator.is_local_main_process:
            for callback in self.callbacks:
                getattr(callback, event, lambda model: None)(model=self)
