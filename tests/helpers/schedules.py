"""Seeded schedules of what befalls a run: kill, Stop, a full disk, a gradient that is none, a wrong setting, the cell
run again. In the end the run is resumed, and must be the one that nothing befell.

    python tests/helpers/schedules.py [COUNT] [FIRST_SEED]

On a GPU, where half of the runs have steps that are captured as CUDA graphs, with three words before that, since what
forks others that use it may not have begun to use it:

    SCHEDULES_GPU=0 CUDA_VISIBLE_DEVICES= PYTORCH_NVML_BASED_CUDA_CHECK=1
"""

import contextlib
import json
import os
import random
import re
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file

from chatmagic import ChatmagicError
from chatmagic.models.parts import trainable
from chatmagic.training import StepRunner, keras
from chatmagic.training.keras import TrainingInterrupted
from chatmagic.training.states import newest_state
from tiny_runs import Drawn, Replayed, adalora, fit, loader, lora, rows, runner_that

GPU = os.environ.get("SCHEDULES_GPU")
COLUMNS = ["epoch", "train_loss", "lr", "grad_norm"]
STEPS = 20
WRONG = {
    "lr": 2e-2,
    "epochs": 9,
    "monitor": "grad_norm",
    "mode": "max",
    "train": loader(rows(6), 1),
    "optimizer": torch.optim.SGD,
}
"""Settings of another run, which a resumed one must not take; of them one is told before."""


def kind_of(seed: int) -> tuple:
    """(adapter, batches a step, validated or not, captured or not) of the run that a seed is about."""
    draw = random.Random(seed)
    accumulated = draw.choice([1, 2])
    return draw.choice(["adalora", "lora"]), accumulated, draw.random() < 0.7, accumulated == 1 and draw.random() < 0.5


def run(kind: tuple, folder: Path, runner: type[StepRunner] = StepRunner, **changed) -> dict:
    """Twenty steps with everything random in them; what it came to."""
    adapter, accumulated, validated, captured = kind
    if GPU:
        keras.why_not = keras.why_not if captured else lambda *_: "this run is one without graphs"
    elif captured:
        keras.why_not, keras.CapturedStep = lambda *_: None, Replayed
    torch.manual_seed(1)
    random.seed(1)
    model = adalora(STEPS, dropout=0.1) if adapter == "adalora" else lora()
    settings = {
        "train": loader(Drawn(8 * accumulated), shuffle=True),
        "val": None if validated else False,
        "monitor": "val_loss" if validated else "train_loss",
        "epochs": STEPS // 4,
        "gradient_accumulation_steps": accumulated,
        "runner": runner,
        "save_every": 3,
        "cpu": not GPU,
    }
    history = fit(model, folder, **settings | changed)
    weights = {name: param.flatten()[:3].tolist() for name, param in trainable(model)}
    return {"history": history[COLUMNS].values.tolist(), "weights": weights}


def kill(runner) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop(runner) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def fill_the_disk(runner) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def spoil_a_gradient(runner) -> None:
    if runner.captured and GPU:  # whose replays ask no hook
        runner.net.get_base_model().model.norm.weight.data.fill_(float("nan"))
    runner.params[1].register_hook(lambda grad: grad * float("nan"))


BEFALLS = {"kill": kill, "stop": stop, "full disk": fill_the_disk, "not finite": spoil_a_gradient}
WORDS = {
    "stop": "Interrupted after step",
    "full": "The disk of .* is full",
    "not": "this step was not taken",
    "wrong": "of another run|is nothing that fit measures",
    "again": "was stopped after step .*resume=True.*resume=False",
}
"""What one is told, by the first word of what befell."""


def forked(function) -> dict:
    """What a function returns, or raises, in a process of its own: {"ended": "done", "told", "killed" or "raised"}."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reading)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if GPU:
            os.environ["CUDA_VISIBLE_DEVICES"] = GPU
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            try:
                result = {"ended": "done", "result": function()}
            except (ChatmagicError, TrainingInterrupted) as error:
                result = {"ended": "told", "words": str(error)}
            except BaseException:
                result = {"ended": "raised", "words": traceback.format_exc()}
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
        with open(writing, "w") as pipe:
            json.dump(result, pipe)
        os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        told = pipe.read()
    os.waitpid(pid, 0)
    return json.loads(told) if told else {"ended": "killed"}


@cache
def unbroken(kind: tuple) -> dict:
    """The run that nothing befalls."""
    with TemporaryDirectory() as folder:
        return forked(lambda: run(kind, Path(folder) / "run"))["result"]


def check_folder(folder: Path, step: int) -> int:
    """No number that is none, no half adapter, no state lost since that of `step`; returns the step of the newest."""
    state = newest_state(folder) if folder.is_dir() else None
    if state is None:
        assert step < 0, f"the state of step {step} is lost"
        return -1
    assert state.step >= step, f"the state went back from step {step} to {state.step}"
    assert all(param.isfinite().all() for param in state.params.values())
    if (folder / "adapter_config.json").is_file():
        json.loads((folder / "adapter_config.json").read_text())
        assert all(factor.isfinite().all() for factor in load_file(folder / "adapter_model.safetensors").values())
    return state.step


def play(seed: int, folder: Path) -> list[str]:
    """Play one schedule; returns what befell. AssertionError where something was lost, or told in others' words."""
    draw, kind, step, befallen = random.Random(seed), kind_of(seed), -1, []
    for _ in range(draw.randint(1, 3)):
        event = draw.choice([*BEFALLS, "wrong setting", "again"])
        befallen.append(event)
        going_on = {"resume": True} if step >= 0 else {}
        if event in BEFALLS:
            runner = runner_that(BEFALLS[event], draw.randint(1, STEPS * kind[1]))
            ended = forked(lambda how=going_on, runner=runner: run(kind, folder, runner, **how))
            expected = {"killed", "done"} if event == "kill" else {"told", "done"}  # done: where it comes too late
        elif event == "wrong setting":
            # More epochs are no other run where nothing goes by them.
            name = draw.choice([name for name in WRONG if name != "epochs" or kind[0] == "adalora"])
            befallen[-1] = f"wrong {name}"
            ended = forked(lambda how=going_on, name=name: run(kind, folder, **how, **{name: WRONG[name]}))
            expected = {"told"} if going_on else None
            if not going_on:  # a run of its own, which takes the place: start over
                step = -1
                for file in sorted(folder.rglob("*"), reverse=True) if folder.exists() else ():
                    file.rmdir() if file.is_dir() else file.unlink()
                continue
        else:
            ended = forked(lambda: run(kind, folder))
            finished = step >= STEPS
            expected = {"done"} if step <= 0 or finished else {"told"}
            step = -1 if expected == {"done"} else step  # a new run, in place of the old
        assert ended["ended"] in expected, (befallen, ended)
        assert ended["ended"] != "told" or re.search(WORDS[befallen[-1].split()[0]], ended["words"]), (befallen, ended)
        step = check_folder(folder, step)
    ended = forked(lambda: run(kind, folder, **({"resume": True} if step >= 0 else {})))
    assert ended["ended"] == "done", (befallen, ended)
    check_folder(folder, STEPS)
    assert ended["result"] == unbroken(kind), (befallen, "the end is another than that of the unbroken run")
    return befallen


def main(count: int = 300, first: int = 0) -> int:
    """Play many, and say how many failed, and of what; returns how many failed."""
    torch.set_num_threads(1)  # what is forked has no thread but its own: it would wait for ever for a second
    counts, failed, begun = Counter(), [], time.monotonic()
    for seed in range(first, first + count):
        with TemporaryDirectory() as folder:
            try:
                counts.update(play(seed, Path(folder) / "run"))
            except AssertionError as error:
                failed.append(seed)
                print(f"seed {seed}, {kind_of(seed)}: {error}", flush=True)
    told = ", ".join(f"{number} x {event}" for event, number in sorted(counts.items()))
    print(f"{count} schedules in {time.monotonic() - begun:.0f} s, {len(failed)} failed {failed or ''}: {told}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(bool(main(*map(int, sys.argv[1:]))))
