"""KerasModel: torchkeras' runners and callbacks under a `fit` that suits an adapter whose ranks shrink."""

import io
import math
import os
import warnings
from copy import deepcopy
from pathlib import Path
from weakref import WeakKeyDictionary

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.data_loader import get_sampler
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import GradScalerKwargs, broadcast, gather_object
from peft.tuners.tuners_utils import BaseTunerLayer
from torchkeras import kerasmodel
from torchkeras.kerascallbacks import VisProgress

from ..accel.allocator import rank_allocator
from ..accel.attention import without_cudnn_attention
from ..accel.captured import CapturedStep, why_not
from ..accel.layers import fast_layers
from ..errors import ChatmagicError
from ..models.parts import trainable
from ..models.quantize import packed_for_inference
from . import functional
from .plots import EpochLines, pictures
from .runtime import Batches, best_precision, get_rng, lost_peer, noted_interrupt, seeded, set_rng
from .states import STATE, load_adapter, newest_state, save_adapter, save_state, state_folder
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

    def __init__(self, net, loss_fn=None, optimizer=None, lr_scheduler=None):
        super().__init__(net, loss_fn, optimizer=optimizer, lr_scheduler=lr_scheduler)

    def save_ckpt(self, ckpt_path=None, accelerator=None):
        save_adapter(self.net, ckpt_path or self.ckpt_path)

    def load_ckpt(self, ckpt_path=None):
        load_adapter(self.net, ckpt_path or self.ckpt_path)

    def fit(
        self,
        train_data,
        val_data=None,
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
    ) -> pd.DataFrame:
        """Train for `epochs`, or until `monitor` has not improved for `patience` of them; returns the history.

        train_data, val_data: DataLoaders of batches as StepRunner wants them. In several processes, each with the
        loader of its own batch size; every epoch's rows are dealt out among them.
        ckpt_path: gets the adapter of the best epoch (which the net has too at the end) and the pictures. With
        AdaLoRA no epoch counts, for the best or for patience, before the ranks are final.
        resume: True goes on from the newest state in ckpt_path, to the same losses as an unbroken run. A state is
        saved at the start, at the end of an epoch, on Ctrl-C, and every `save_every` optimizer steps if that is given.
        False starts anew, also with a model that has made steps already. None is for a model and a ckpt_path where
        there is nothing to choose; where there is, the environment's CHATMAGIC_RESUME (1 or 0) says it for runs that
        nobody watches, and else ChatmagicError asks.
        plot: show the curve and a progress bar while it runs, and save pictures; else print a line an epoch.
        mixed_precision: "auto" is bf16 where the hardware has it, fp16 on older GPUs, else "no".

        The lr_scheduler moves once an optimizer step. Raises ChatmagicError for settings that would train nothing
        and for a full disk, TrainingInterrupted on Ctrl-C.
        """
        self.epochs, self.patience, self.monitor, self.mode = epochs, patience, monitor, mode
        self.ckpt_path, self.save_every = Path(ckpt_path), save_every
        # One process may fit twice, with another precision; accelerate's singletons would refuse.
        AcceleratorState._reset_state()
        GradientState._reset_state()
        self.accelerator = Accelerator(
            mixed_precision=best_precision(cpu) if mixed_precision == "auto" else mixed_precision,
            cpu=cpu,
            gradient_accumulation_steps=gradient_accumulation_steps,
            # fp16: the loss is a sum over the label tokens, some hundred times the mean that 2**16 is meant for.
            kwargs_handlers=[GradScalerKwargs(init_scale=2.0**8)],
        )
        self.allocator = rank_allocator(self.net)
        self.samplers = [seeded(get_sampler(loader)) for loader in (train_data, val_data) if loader is not None]
        self.train_loader, self.val_loader = self.accelerator.prepare(train_data, val_data)
        self.steps_per_epoch = math.ceil(len(self.train_loader) / gradient_accumulation_steps)
        self._check()
        resume = self._resumes(resume)
        self.epoch, self.batch, self.sums, self.history, self.best = 1, 0, None, {}, None
        self.epoch_rng = self.rng = get_rng(self.samplers)
        self.callbacks = [*([*pictures(), VisProgress()] if plot else [EpochLines()]), *(callbacks or [])]
        try:
            self._place()
            if resume:
                self._load_state(newest_state(self.ckpt_path))
            else:
                self._start()
            self.captured = self._capture()
            self._call_back("on_fit_start")
            with noted_interrupt() as self.interrupt, fast_layers(self.net), without_cudnn_attention():
                while self.epoch <= epochs and not self._out_of_patience():
                    self._run_epoch()
            if self.best is None:
                warnings.warn("No epoch ended with final ranks: the adapter is the last one, not the best.")
                self._on_main(self.save_ckpt, ckpt_path, accelerator=self.accelerator)
            self.load_ckpt(ckpt_path)
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
            self.net.eval()
            self.optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return pd.DataFrame(self.history)

    def _check(self):
        """Refuse, before anything is written, what would silently train nothing."""
        params = {id(param) for _, param in trainable(self.net)}
        groups = self.optimizer.param_groups
        steps = self.epochs * self.steps_per_epoch
        final = self.allocator.peft_config.total_step - self.allocator.peft_config.tfinal if self.allocator else 0
        longest = getattr(self.lr_scheduler, "total_steps", steps)
        if not any(isinstance(module, BaseTunerLayer) for module in self.net.modules()):
            problem = "The model has no adapter on any layer. Wrap it: get_peft_model(model, adalora_config(...))."
        elif not params:
            problem = "No parameter is trainable. PeftModel.from_pretrained wants is_trainable=True to go on training."
        elif not params & {id(param) for group in groups for param in group["params"]}:
            problem = "The optimizer holds no trainable parameter. Make it after get_peft_model, of its result's."
        elif not any(group.get("initial_lr", group["lr"]) for group in groups):
            problem = "The learning rate is 0. Try lr=1e-3."
        elif self.accelerator.num_processes > 1 and not issubclass(self.StepRunner, StepRunner):
            problem = (
                "Several processes want chatmagic's StepRunner, or one derived from it, which adds up their gradients: "
                f"this is {self.StepRunner.__module__}.{self.StepRunner.__name__}."
            )
        elif packed_for_inference(self.net):
            problem = (
                "This 4-bit model has answered on the CPU already, for which bitsandbytes repacked its weights into a "
                "form that has no gradients. Load it again, and train before you chat."
            )
        elif not steps:
            problem = f"{self.epochs} epochs of {len(self.train_loader)} batches: there is nothing to train on."
        elif self.monitor.startswith("val_") and self.val_loader is None:
            problem = f"monitor={self.monitor!r} needs val_data. Give it, or use monitor='train_loss'."
        elif steps <= final:
            problem = (
                f"The run has {steps} optimizer steps ({self.epochs} epochs of {self.steps_per_epoch}), but the ranks "
                f"are final only after {final}. Make the adapter with adalora_config(total_steps={steps}, ...)."
            )
        elif steps > longest:
            problem = f"The lr_scheduler ends after {longest} of {steps} optimizer steps: give it total_steps={steps}."
        else:
            return
        raise ChatmagicError(problem)

    def _resumes(self, resume: bool | None) -> bool:
        """Whether to go on from a state; ChatmagicError where that must be said, and is not."""
        state = newest_state(self.ckpt_path, read=False)
        if resume and state is None:
            raise ChatmagicError(f"Nothing to resume in {self.ckpt_path}: no last-*/{STATE}. Start with resume=False.")
        broken_off = (
            state is not None and state["step"] and not state.get("finished", True)
        )  # earlier versions do not say
        if resume is None and (broken_off or self._has_steps()):
            found = "This model has been trained already, and its schedule is spent"
            if broken_off:
                found = f"A run in {self.ckpt_path} was stopped after step {state['step']} of {state['of']}"
            resume = {"1": True, "0": False}.get(os.environ.get("CHATMAGIC_RESUME"))
            if resume is None:
                raise ChatmagicError(
                    f"{found}. Say which it is to be: fit(..., resume=True) goes on with that run, "
                    "fit(..., resume=False) starts anew from step 1, in place of what is there. As a command: "
                    "chatmagic train --resume, or --no-resume."
                )
        return bool(resume) and state is not None

    def _has_steps(self) -> bool:
        """Whether the optimizer has made steps, or the adapter is on its way through its ranks."""
        return bool(self.optimizer.state) or bool(self.allocator and self.allocator.step)

    def _start(self):
        """From the beginning: the model's own, if it has made steps since."""
        if not self._has_steps():
            buffer = io.BytesIO()
            torch.save(self._state(), buffer)
            BEGINNINGS[self.net] = buffer.getvalue()
        elif self.net in BEGINNINGS:
            state = torch.load(io.BytesIO(BEGINNINGS[self.net]), map_location="cpu", weights_only=True)
            if not self.optimizer.state:  # made again since, perhaps with another rate
                state |= {"optimizer": None, "lr_scheduler": None}
            self._load_state(state)
        else:
            raise ChatmagicError("This model was trained elsewhere. To start anew, make it, and its optimizer, again.")
        self._save_state()

    def _place(self):
        """Device, the same adapter in all processes, loss scaling. The net is not given to accelerate, which would wrap
        its forward for good and refuse a 4-bit model on the CPU."""
        device = self.accelerator.device
        if next(self.net.parameters()).device != device:
            self.net.to(device)
        broadcast([param.detach() for _, param in trainable(self.net)])
        if type(self.optimizer) is torch.optim.AdamW:
            for group in self.optimizer.param_groups:
                group |= {"fused": True, "foreach": False}
        self.optimizer = self.accelerator.prepare(self.optimizer)

    def _capture(self) -> CapturedStep | None:
        """The step as CUDA graphs, or None, with the reason told."""
        optimizer, ours = self.optimizer.optimizer, issubclass(self.StepRunner, StepRunner)
        reason = why_not(self.net, optimizer, self.accelerator) if ours else "StepRunner is not chatmagic's"
        if reason:
            self.accelerator.print(f"The training step is not captured as a CUDA graph: {reason}.")
            return None
        return CapturedStep(functional, self.net, optimizer, self.accelerator, self.StepRunner.max_grad_norm)

    def _run_epoch(self):
        set_rng(self.epoch_rng, self.samplers)
        self._run_stage("train", Batches(self.train_loader, self.batch, self._on_skipped, self._after_step))
        self._call_back("on_train_epoch_end")
        if self.val_loader is not None:
            with torch.no_grad():
                self._run_stage("val", self.val_loader)
        score = self.history[self.monitor][-1]
        if math.isnan(score):
            raise ChatmagicError(f"{self.monitor} is not a number. Has val_data any label that is not -100?")
        if (self.allocator is None or self.allocator.final) and self._improves(score):
            self.best = {"epoch": self.epoch, "score": score}
            self._on_main(self.save_ckpt, self.ckpt_path, accelerator=self.accelerator)
        self._call_back("on_validation_epoch_end")
        self.epoch, self.batch = self.epoch + 1, 0
        self.epoch_rng = get_rng(self.samplers)
        self._rest(save=True)

    def _run_stage(self, stage: str, batches):
        training = stage == "train"
        self.runner = self.StepRunner(
            net=self.net,
            loss_fn=self.loss_fn,
            accelerator=self.accelerator,
            stage=stage,
            metrics_dict=deepcopy(self.metrics_dict),
            optimizer=self.optimizer if training else None,
            lr_scheduler=self.lr_scheduler if training else None,
        )
        if training:
            self.runner.captured = self.captured
        if training and self.batch:
            self.runner.sums = self.sums
        log = self.EpochRunner(self.runner, quiet=True)(batches)
        for name, value in (({"epoch": self.epoch} if training else {}) | log).items():
            self.history.setdefault(name, []).append(value)

    def _on_skipped(self):
        set_rng(self.rng, self.samplers)

    def _after_step(self, batch: int):
        self.batch = batch
        if self.accelerator.sync_gradients:
            self._rest(save=self.save_every and self.step % self.save_every == 0)

    def _rest(self, save: bool):
        """Between two steps, with nothing half done: save if it is time or Ctrl-C was pressed; then also stop."""
        asked = torch.tensor(int(self.interrupt.is_set()), device=self.accelerator.device)
        stop = bool(self.accelerator.reduce(asked))
        if save or stop:
            self._save_state()
        if stop:
            raise TrainingInterrupted(
                f"Interrupted after step {self.step} of {self.epochs * self.steps_per_epoch}. The state is in "
                f"{state_folder(self.ckpt_path, self.step)}: to go on, here or in a new kernel that has made the model "
                "again, call fit(..., resume=True), or: chatmagic train --resume."
            )

    @property
    def step(self) -> int:
        """Optimizer steps so far."""
        done = math.ceil(self.batch / self.accelerator.gradient_accumulation_steps)
        return (self.epoch - 1) * self.steps_per_epoch + done

    def _improves(self, score: float) -> bool:
        if self.best is None:
            return True
        return score > self.best["score"] if self.mode == "max" else score < self.best["score"]

    def _out_of_patience(self) -> bool:
        return self.best is not None and self.epoch - 1 - self.best["epoch"] >= self.patience

    def _save_state(self):
        self._on_main(save_state, self.net, self._state(), self.ckpt_path)

    def _state(self) -> dict:
        return {
            "step": self.step,
            "of": self.epochs * self.steps_per_epoch,
            "finished": self.epoch > self.epochs or self._out_of_patience(),
            "epoch": self.epoch,
            "batch": self.batch,
            "sums": getattr(self.runner, "sums", None) if self.batch else None,
            "history": self.history,
            "best": self.best,
            "params": {name: param.detach() for name, param in trainable(self.net)},
            "allocator": self.allocator and self.allocator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler and self.lr_scheduler.state_dict(),
            "scaler": self.accelerator.scaler and self.accelerator.scaler.state_dict(),
            "epoch_rng": gather_object([self.epoch_rng]),  # one of each process, and so the next
            "rng": gather_object([get_rng(self.samplers)]),
        }

    @torch.no_grad()
    def _load_state(self, state: dict):
        processes, params = len(state["rng"]), dict(trainable(self.net))
        if processes != self.accelerator.num_processes:
            raise ChatmagicError(
                f"The state in {self.ckpt_path} is of {processes} processes, this run has "
                f"{self.accelerator.num_processes}. Resume with as many: accelerate launch --num_processes {processes}."
            )
        steps = self.epochs * self.steps_per_epoch
        if state.get("of", steps) != steps:
            raise ChatmagicError(
                f"The state in {self.ckpt_path} is of a run of {state['of']} steps, and this one has {steps}: the "
                "schedule would be another. Give fit the data, the batch size and the epochs of then, or start anew "
                "with fit(..., resume=False)."
            )
        if params.keys() != state["params"].keys():
            raise ChatmagicError(f"The state in {self.ckpt_path} is of an adapter on other layers than this model's.")
        for name, param in params.items():
            param.copy_(state["params"][name])
        for part in ("allocator", "optimizer", "lr_scheduler"):
            if state[part] is not None:
                getattr(self, part).load_state_dict(state[part])
        if state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        for name in ("epoch", "batch", "sums", "history", "best"):
            setattr(self, name, state[name])
        self.epoch_rng, self.rng = (state[name][self.accelerator.process_index] for name in ("epoch_rng", "rng"))
        self.train_loader.iteration = self.epoch - 1  # a dataset or sampler may have a set_epoch

    def _on_main(self, write, *args, **kwargs):
        if self.accelerator.is_main_process:
            write(*args, **kwargs)
        self.accelerator.wait_for_everyone()

    def _call_back(self, event: str):
        if self.accelerator.is_local_main_process:
            for callback in self.callbacks:
                getattr(callback, event, lambda model: None)(model=self)
