"""What a run takes from its surroundings: precision, random numbers, signals, other processes."""

import contextlib
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel

from ..errors import ChatmagicError
from ..models.parts import BEYOND_FLOAT16, activations, free_memory

S = TypeVar("S", bound=Sampler)


def best_precision(cpu: bool = False, model_type: str | None = None) -> str:
    """accelerate's mixed_precision for this machine: "bf16", "fp16" (GPUs before Ampere, as T4 and V100) or "no"."""
    if torch.cuda.is_available() and not cpu:
        older = "no" if model_type in BEYOND_FLOAT16 else "fp16"
        return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else older
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # PyTorch 2.6 has none: float32 is right there, too
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "no"


def prepare(model: PreTrainedModel) -> bool:
    """Freeze a model for training an adapter. On a GPU that is short of memory, also have activations recomputed in
    the backward pass instead of kept (gradient checkpointing), and say so; returns whether it is short.

    PEFT's `prepare_model_for_kbit_training` would turn embeddings, head and norms into float32: 1.9 GiB of a 7B model.
    """
    model.requires_grad_(False)
    model.config.use_cache = False
    free, wanted = free_memory(model), activations(model)
    lean = 0 < free < wanted
    if lean:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        print(
            f"{free / 2**30:.1f} GiB of GPU memory are free, {wanted / 2**30:.1f} would be wanted to keep all "
            "activations: they are recomputed. Use a paged optimizer."
        )
    return lean


class Batches:
    """An epoch's batches for torchkeras' EpochRunner, the first `skip` of them drawn and thrown away.

    They are drawn so that a dataset that makes its samples up goes through the same random numbers again.
    `on_skipped` is called after the last of them; `after_step(number)` after each step but the epoch's last.
    Raises ChatmagicError where there are fewer than the loader says, and for rows that make no batch.
    """

    def __init__(
        self,
        loader: DataLoader,
        skip: int = 0,
        on_skipped: Callable[[], None] = lambda: None,
        after_step: Callable[[int], None] = lambda number: None,
    ) -> None:
        self.loader, self.skip, self.on_skipped, self.after_step = loader, skip, on_skipped, after_step

    def __len__(self) -> int:
        return len(self.loader) - self.skip

    def __iter__(self) -> Iterator[dict]:
        number = 0
        for number, batch in enumerate(self._drawn(), 1):
            if number > self.skip:
                yield batch
                if number < len(self.loader):
                    self.after_step(number)
            elif number == self.skip:
                self.on_skipped()
        if number < len(self.loader):
            raise ChatmagicError(
                f"The data ended after {number} of {len(self.loader)} batches: its dataset is shorter than its len() "
                "says, or gives its rows only once. Give a list of the rows."
            )

    def _drawn(self) -> Iterator[dict]:
        batches = iter(self.loader)
        while True:
            try:
                batch = next(batches, None)
            except (RuntimeError, ValueError) as error:
                if "does not contain any data" in str(error):  # accelerate's, of an epoch without a row
                    return
                if "stack expects each tensor to be equal size" not in str(error):
                    raise
                raise ChatmagicError(
                    "The rows of a batch are of different lengths, and torch's own collate_fn pads none. "
                    "DataLoader(..., collate_fn=DataCollator(tokenizer)) does."
                ) from error
            if batch is None:
                return
            yield batch


def seeded(sampler: S) -> S:
    """The sampler, with a generator of its own if it draws: one that processes share and a state can hold."""
    if getattr(sampler, "generator", "draws nothing") is None:
        sampler.generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    return sampler


def get_rng(samplers: list) -> dict:
    """The state of all random number generators of this process, and of the samplers' own."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "samplers": [sampler.generator.get_state() for sampler in samplers if hasattr(sampler, "generator")],
    }


def set_rng(state: dict, samplers: list) -> None:
    """Back to a state of `get_rng`."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    drawing = (sampler for sampler in samplers if hasattr(sampler, "generator"))
    for sampler, generator in zip(drawing, state["samplers"]):
        sampler.generator.set_state(generator)


@contextlib.contextmanager
def noted_interrupt() -> Iterator[threading.Event]:
    """Ctrl-C sets the event that this yields, for the loop to stop between two steps; a later second one interrupts."""
    asked, first = threading.Event(), 0.0
    if threading.current_thread() is not threading.main_thread():  # Python allows no handlers elsewhere
        yield asked
        return

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal first
        if asked.is_set() and time.monotonic() - first > 1:  # a launcher in the terminal hands the first one on
            raise KeyboardInterrupt
        first = time.monotonic()
        asked.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def lost_peer(error: RuntimeError, processes: int) -> bool:
    """Whether an error means that another process of the run is gone."""
    known = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
    return processes > 1 and known
