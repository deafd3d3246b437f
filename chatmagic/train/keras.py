"""KerasModel: torchkeras' runners and callbacks under a `fit` that suits an adapter whose ranks shrink."""

import contextlib
import math
import signal
import threading
import warnings
from copy import deepcopy
from pathlib import Path

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.data_loader import get_sampler
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import gather_object
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn.parallel import DistributedDataParallel
from torchkeras import kerasmodel
from torchkeras.kerascallbacks import VisProgress

from ..errors import ChatmagicError
from .adalora import rank_allocator
from .checkpoints import get_rng, load_adapter, load_state, save_adapter, save_state, set_rng, state_folder
from .plots import LiveCurve
from .step import StepRunner


class TrainingInterrupted(ChatmagicError):
    """Ctrl-C: the state is saved, the message says how to go on."""


class KerasModel(kerasmodel.KerasModel):
    """torchkeras' KerasModel for a PEFT model, with its own `fit`.

    The library's `fit` counts an epoch 0 without optimizer steps as the best, always starts at that epoch (so it
    cannot resume), saves and stops before AdaLoRA's ranks are final, and leaves the net on the CPU.
    """

    StepRunner = StepRunner

    def __init__(self, net, loss_fn=None, optimizer=None, lr_scheduler=None):
        super().__init__(net, loss_fn, optimizer=optimizer, lr_scheduler=lr_scheduler)

    def save_ckpt(self, ckpt_path=None, accelerator=None):
        save_adapter((accelerator or self.accelerator).unwrap_model(self.net), ckpt_path or self.ckpt_path)

    def load_ckpt(self, ckpt_path=None):
        load_adapter(getattr(self.net, "module", self.net), ckpt_path or self.ckpt_path)

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
        resume: bool = False,
        save_every: int | None = None,
        mixed_precision: str = "auto",
        cpu: bool = False,
        gradient_accumulation_steps: int = 1,
    ) -> pd.DataFrame:
        """Train until `epochs`, or until `monitor` has not improved for `patience` epochs; returns the history.

        The adapter of the best epoch is in `ckpt_path`, and in the net at the end; with AdaLoRA, no epoch before
        the ranks are final counts. `lr_scheduler` moves once an optimizer step. The state is saved there too, at
        the start, at each epoch's end, after every `save_every` optimizer steps if given, and on Ctrl-C:
        `resume=True` goes on from the newest, to the same losses as an unbroken run.
        `mixed_precision` "auto" is bf16 where the hardware has it, fp16 on older GPUs, else "no".

        Raises ChatmagicError for settings that train nothing, for a disk that is full (what was saved stays), and
        TrainingInterrupted on Ctrl-C.
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
        )
        self.allocator = rank_allocator(self.net)
        loaders = [seeded(loader) for loader in (train_data, val_data) if loader is not None]
        self.samplers = [get_sampler(loader) for loader in loaders]
        self.train_loader, self.val_loader = (*self.accelerator.prepare(*loaders, None), None)[:2]
        self.steps_per_epoch = math.ceil(len(self.train_loader) / gradient_accumulation_steps)
        self._check()
        self.epoch, self.batch, self.history, self.best, self.sums = 1, 0, {}, None, None
        self.epoch_rng = self.rng = get_rng(self.samplers)
        self.callbacks = callbacks or []
        if plot:
            self.callbacks = [LiveCurve(), VisProgress(), *self.callbacks]
        try:
            self._place()
            (self._load_state if resume else self._save_state)()
            self._call_back("on_fit_start")
            with noted_interrupt() as self.interrupt:
                while self.epoch <= epochs and not self._out_of_patience():
                    self._run_epoch(quiet=plot)
            if self.best is None:
                warnings.warn("No epoch ended with final ranks: the adapter is the last one, not the best.")
                self._on_main(self.save_ckpt, ckpt_path, accelerator=self.accelerator)
            self.load_ckpt(ckpt_path)
            self._call_back("on_fit_end")
        finally:
            self.net = self.accelerator.unwrap_model(self.net).eval()
            self.optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return pd.DataFrame(self.history)

    def _check(self):
        """Refuse, before anything is touched, what would silently train nothing."""
        trainable = {id(param) for param in self.net.parameters() if param.requires_grad}
        groups = self.optimizer.param_groups
        steps, config = self.epochs * self.steps_per_epoch, self.allocator and self.allocator.peft_config
        if not any(isinstance(module, BaseTunerLayer) for module in self.net.modules()):
            problem = (
                "The model has no adapter on any layer. Wrap it: get_peft_model(model, adalora_config(...))."
            )
        elif not trainable:
            problem = "No parameter is trainable. Load the adapter with PeftModel.from_pretrained(..., is_trainable=True)."
        elif not trainable & {id(param) for group in groups for param in group["params"]}:
            problem = "The optimizer holds none of the trainable parameters. Make it after get_peft_model, on its result."
        elif not any(group.get("initial_lr", group["lr"]) for group in groups):
            problem = "The learning rate is 0. Try lr=1e-3."
        elif not steps:
            problem = (
                f"{self.epochs} epochs of {len(self.train_loader)} batches: there is nothing to train on."
            )
        elif self.monitor.startswith("val_") and self.val_loader is None:
            problem = f"monitor={self.monitor!r} needs val_data. Give it, or use monitor='train_loss'."
        elif config and steps <= config.total_step - config.tfinal:
            problem = (
                f"The run has {steps} optimizer steps ({self.epochs} epochs of {self.steps_per_epoch}), and the ranks "
                f"are final after {config.total_step - config.tfinal} only: adalora_config(total_steps={steps}, ...)."
            )
        elif steps > getattr(self.lr_scheduler, "total_steps", steps):
            problem = f"The lr_scheduler ends after {self.lr_scheduler.total_steps} of {steps} steps: total_steps={steps}."
        else:
            return
        raise ChatmagicError(problem)

    def _place(self):
        """Device, DDP, loss scaling. The net is not given to accelerate, which would wrap its forward for good and
        refuse a 4-bit model on the CPU."""
        device = self.accelerator.device
        if next(self.net.parameters()).device != device:
            self.net.to(device)
        if self.accelerator.num_processes > 1:
            self.net = DistributedDataParallel(
                self.net, device_ids=[device.index] if device.type == "cuda" else None
            )
        self.optimizer = self.accelerator.prepare(self.optimizer)

    def _run_epoch(self, quiet: bool):
        set_rng(self.epoch_rng, self.samplers)
        self._run_stage(
            "train", Batches(self.train_loader, self.batch, self._on_skipped, self._after_step), quiet
        )
        self._call_back("on_train_epoch_end")
        if self.val_loader is not None:
            with torch.no_grad():
                self._run_stage("val", self.val_loader, quiet)
        score = self.history[self.monitor][-1]
        if (self.allocator is None or self.allocator.final) and self._improves(score):
            self.best = {"epoch": self.epoch, "score": score}
            self._on_main(self.save_ckpt, self.ckpt_path, accelerator=self.accelerator)
        self._call_back("on_validation_epoch_end")
        self.epoch, self.batch, self.runner = self.epoch + 1, 0, None
        self.epoch_rng = get_rng(self.samplers)
        self._save_state()
        self._stop_if_asked()

    def _run_stage(self, stage: str, batches, quiet: bool):
        self.runner = self.StepRunner(
            net=self.net,
            loss_fn=self.loss_fn,
            accelerator=self.accelerator,
            stage=stage,
            metrics_dict=deepcopy(self.metrics_dict),
            optimizer=self.optimizer if stage == "train" else None,
            lr_scheduler=self.lr_scheduler if stage == "train" else None,
        )
        if stage == "train" and self.batch:
            self.runner.sums = self.sums
        log = self.EpochRunner(self.runner, quiet)(batches)
        for name, value in ({"epoch": self.epoch} | log if stage == "train" else log).items():
            self.history.setdefault(name, []).append(value)

    def _after_step(self, batch: int):
        """Between two batches of an epoch: everything is at rest, and the loader has drawn one batch ahead."""
        self.batch = batch
        if not self.accelerator.sync_gradients:
            return
        if self.save_every and self.step % self.save_every == 0:
            self._save_state()
        self._stop_if_asked()

    def _on_skipped(self):
        set_rng(self.rng, self.samplers)

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

    def _stop_if_asked(self):
        if not self.accelerator.reduce(
            torch.tensor(self.interrupt.is_set(), device=self.accelerator.device).int()
        ):
            return
        saved = self._save_state()
        raise TrainingInterrupted(
            f"Interrupted after step {self.step} of {self.epochs * self.steps_per_epoch}; the state is in {saved}. "
            "To go on, run the cells that build the model again and call fit(..., resume=True)."
        )

    def _save_state(self) -> Path:
        state = {
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.batch,
            "sums": self.runner.sums if self.batch else None,
            "history": self.history,
            "best": self.best,
            "params": {name: param.detach() for name, param in trainable(self.model)},
            "allocator": self.allocator and self.allocator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler and self.lr_scheduler.state_dict(),
            "scaler": self.accelerator.scaler and self.accelerator.scaler.state_dict(),
            "epoch_rng": gather_object([self.epoch_rng]),  # one of each process, as the next
            "rng": gather_object([get_rng(self.samplers)]),
        }
        self._on_main(save_state, self.model, state, self.ckpt_path)
        return state_folder(self.ckpt_path, self.step)

    @torch.no_grad()
    def _load_state(self):
        state = load_state(self.ckpt_path)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        if len(state["rng"]) != world:
            raise ChatmagicError(
                f"The state in {self.ckpt_path} is of {len(state['rng'])} processes, this run has {world}: start "
                f"as many (accelerate launch --num_processes {len(state['rng'])})."
            )
        params = dict(trainable(self.model))
        if params.keys() != state["params"].keys():
            raise ChatmagicError(
                f"The state in {self.ckpt_path} is of a model with other adapter layers than this one."
            )
        for name, param in params.items():
            param.copy_(state["params"][name])
        if self.allocator:
            self.allocator.load_state_dict(state["allocator"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.lr_scheduler:
            self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.epoch, self.batch, self.sums = state["epoch"], state["batch"], state["sums"]
        self.history, self.best = state["history"], state["best"]
        self.epoch_rng, self.rng = state["epoch_rng"][rank], state["rng"][rank]
        self.train_loader.iteration = self.epoch - 1  # for a dataset or sampler with set_epoch

    @property
    def model(self):
        """The PEFT model, out of DDP."""
        return self.accelerator.unwrap_model(self.net)

    def _on_main(self, write, *args, **kwargs):
        if self.accelerator.is_main_process:
            write(*args, **kwargs)
        self.accelerator.wait_for_everyone()

    def _call_back(self, event: str):
        if self.accelerator.is_local_main_process:
            for callback in self.callbacks:
                getattr(callback, event, lambda model: None)(model=self)


class Batches:
    """An epoch's batches for torchkeras' EpochRunner, of which the first `skip` are drawn and thrown away."""

    def __init__(self, loader, skip: int, on_skipped, after_step):
        self.loader, self.skip, self.on_skipped, self.after_step = loader, skip, on_skipped, after_step

    def __len__(self):
        return len(self.loader) - self.skip

    def __iter__(self):
        for number, batch in enumerate(self.loader, 1):
            if number > self.skip:
                yield batch
                if number < len(self.loader):
                    self.after_step(number)
            elif number == self.skip:
                self.on_skipped()


@contextlib.contextmanager
def noted_interrupt():
    """Ctrl-C sets the event that this yields, for the loop to stop between two steps; a second one interrupts."""
    asked = threading.Event()

    def note(signum, frame):
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
        yield asked
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def seeded(loader):
    """The DataLoader, its sampler with a generator of its own: one that all processes share and a state can keep."""
    sampler = get_sampler(loader)
    if getattr(sampler, "generator", "none needed") is None:
        sampler.generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    return loader


def trainable(model):
    """The (name, parameter) pairs that are trained."""
    return ((name, param) for name, param in model.named_parameters() if param.requires_grad)


def best_precision(cpu: bool = False) -> str:
    """accelerate's mixed_precision for this machine: "bf16", "fp16" (GPUs before Ampere, as T4 and V100) or "no"."""
    if torch.cuda.is_available() and not cpu:
        return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
    return "bf16" if torch.cpu.get_capabilities().get("avx512_bf16") else "no"
