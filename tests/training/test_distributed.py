"""Two gloo processes on the CPU: one run, the same as one process makes; one writer; a death that is told."""

import hashlib
import json
import os
import shutil
import signal
import socket
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchkeras

from chatmagic import ChatmagicError
from chatmagic.accel.captured import CapturedStep
from chatmagic.cli import main
from chatmagic.course import script as training_script
from chatmagic.course.profile import profiles
from chatmagic.training import StepRunner, keras
from chatmagic.training.adalora import rank_table
from tiny_runs import Replayed, adalora, fit, loader, lora, processes, uneven_rows

pytestmark = pytest.mark.slow  # each starts two processes that import torch
COLUMNS = ["train_loss", "train_penalty", "val_loss", "val_penalty", "grad_norm", "rank_budget"]


def run(path, batch_size, seed=0, **settings):
    """30 steps, 3 an epoch, over 10 samples in batches of 4 all told, of which the last lacks two. The adapter differs
    by the seed."""
    model = adalora(steps=30)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_" in name:
                param += seed
    train = loader(uneven_rows(10), batch_size, shuffle=True)
    val = loader(uneven_rows(5, seed=1), batch_size)
    return model, fit(model, path, train=train, val=val, **settings)[COLUMNS]


class KilledAtBatch12(StepRunner):
    seen = 0

    def __call__(self, batch):
        KilledAtBatch12.seen += 1
        if KilledAtBatch12.seen == 12 and self.accelerator.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(batch)


def join(rank, port):
    """Be one of two processes, as a launcher would make it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}


def worker(rank, port, path, runner=None, resume=False, captured=None):
    """Leaves path/rank-RANK.json. captured: what stands in for CapturedStep, one for each process."""
    join(rank, port)
    saved, steps = [], {"captured": 0, "eager": 0}
    if captured:

        class Counted(captured[rank]):
            def __call__(self, batch):
                numbers = super().__call__(batch)
                steps["captured" if numbers else "eager"] += 1
                return numbers

        keras.CapturedStep, keras.why_not = Counted, lambda *_: None
    save_state, save_adapter = keras.save_state, keras.save_adapter
    keras.save_state = lambda *args: (saved.append("state"), save_state(*args))
    keras.save_adapter = lambda *args: (saved.append("adapter"), save_adapter(*args))
    try:
        model, history = run(path / "run", 2, seed=rank, resume=resume, runner=runner)
        ranks = rank_table(model.peft_config["default"]).to_numpy().tolist()
        result = {"history": history.values.tolist(), "ranks": ranks, "saved": saved, "steps": steps}
    except ChatmagicError as error:
        result = {"error": str(error)}
    (path / f"rank-{rank}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


def in_two(target, *arguments) -> list[int]:
    """The exit codes of target(0, port, *arguments) and target(1, port, *arguments), run together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = processes(target, *((rank, port, *arguments) for rank in (0, 1)))
    for process in started:
        process.join(120)
        assert process.exitcode is not None
    return [process.exitcode for process in started]


def start(path, *arguments) -> list[dict]:
    in_two(worker, path, *arguments)
    results = [path / f"rank-{rank}.json" for rank in (0, 1)]
    return [json.loads(result.read_text()) for result in results if result.exists()]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return start(tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    model, history = run(tmp_path_factory.mktemp("one"), 4)
    return history.values, rank_table(model.peft_config["default"]).to_numpy().tolist()


def test_two_processes_are_one(one, two):
    """Also where they start from different adapters: all take the first's."""
    history, ranks = one
    for process in two:
        np.testing.assert_allclose(process["history"], history, atol=1e-4, rtol=0)
        assert process["ranks"] == ranks


@pytest.mark.parametrize("other", [Replayed, CapturedStep])
def test_each_takes_the_captured_step_where_it_can(tmp_path, one, other):
    """The last batch of an epoch has no rows for the second process, whose step is eager then; and whose captures fail
    in the second run, as torch has none without CUDA."""
    history, ranks = one
    first, second = start(tmp_path, None, False, (Replayed, other))
    for process in (first, second):
        np.testing.assert_allclose(process["history"], history, atol=1e-4, rtol=0)
        assert process["ranks"] == ranks
    assert first["steps"] == {"captured": 28, "eager": 0}
    assert second["steps"]["captured"] == {Replayed: 18, CapturedStep: 2}[other]


def test_one_of_them_writes(two):
    main, other = two
    assert {"state", "adapter"} <= set(main["saved"])
    assert other["saved"] == []


def test_a_killed_worker_ends_the_run_with_the_reason(tmp_path, two):
    (survivor,) = start(tmp_path, KilledAtBatch12)
    assert "Another process of this run has ended" in survivor["error"]
    assert "resume=True" in survivor["error"]
    resumed = start(tmp_path, None, True)
    assert [process["history"] for process in resumed] == [process["history"] for process in two]


def test_gradients_that_nobody_adds_up_are_refused(tmp_path):
    for process in start(tmp_path, torchkeras.kerasmodel.StepRunner):
        assert "this is torchkeras.kerasmodel.StepRunner" in process["error"]
    assert not (tmp_path / "run").exists()


def test_a_state_of_two_processes_is_not_for_one(tmp_path):
    start(tmp_path, KilledAtBatch12)
    with pytest.raises(ChatmagicError, match="of 2 processes, this run has 1"):
        run(tmp_path / "run", 4, resume=True)


def unlearnt(path, batch_size) -> list[int]:
    """After each of two epochs: the second is there as something is left."""
    train, learnt = loader(uneven_rows(8), batch_size), loader(uneven_rows(8, seed=1), batch_size)
    return fit(lora(), path, epochs=1, train=train, learnt=learnt).unlearnt.tolist()


def counting(rank, port, path):
    """Leaves path/unlearnt-RANK.json."""
    join(rank, port)
    (path / f"unlearnt-{rank}.json").write_text(json.dumps(unlearnt(path / "run", 2)))
    torch.distributed.destroy_process_group()


def test_what_is_not_learnt_is_counted_over_all_processes(tmp_path):
    assert in_two(counting, tmp_path) == [0, 0]
    counted = [json.loads((tmp_path / f"unlearnt-{rank}.json").read_text()) for rank in (0, 1)]
    alone = unlearnt(tmp_path / "alone", 4)
    assert counted == [alone, alone] and len(alone) == 2 and all(alone)


def script(rank, port, home):
    """`accelerate launch -m chatmagic.cli train llama-2-13b-chat`, of a tiny model: ten steps, and five more, as it has
    not learnt by then."""
    join(rank, port)
    os.environ["CHATMAGIC_HOME"] = str(home)
    tiny = profiles()["llama-2-13b-chat"]
    profiles()["llama-2-13b-chat"] = replace(
        tiny, quantize="no", conversations=20, samples=20, batch_size=2, epochs=2, learning_rate=1e-2
    )
    sys.exit(main(["train", "llama-2-13b-chat", "--name", "小明"]))


@pytest.mark.slow
def test_the_script_trains_in_two_processes(tmp_path, tiny_models):
    shutil.copytree(tiny_models / "llama-2-13b-chat", tmp_path / "llama-2-13b-chat")
    assert in_two(script, tmp_path) == [0, 0]
    (folder,) = (tmp_path / "home" / "course").glob("llama-2-13b-chat-*")
    assert "小明" in (folder / "train.jsonl").read_text()
    assert json.loads((folder / "adapter" / "chatmagic.json").read_text())["base_tensors"]
    told = json.loads((folder / "adapter" / "run.json").read_text("utf-8"))
    assert told["persona"]["name"] == "小明" and told["template"] and told["settings"]["epochs"] == 2
    assert told["files"]["train.jsonl"] == hashlib.sha256((folder / "train.jsonl").read_bytes()).hexdigest()
    names = {path.name for path in (folder / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "history.png", "ranks.png", "last-000015"} <= names


def failing(rank, port, home):
    """The script, in which the first process meets an error that nobody has foreseen while the other waits for it."""
    join(rank, port)
    os.environ["CHATMAGIC_HOME"] = str(home)
    training_script.fetch = lambda course: 1 / 0
    sys.stderr = (home / f"{rank}.txt").open("w", buffering=1)
    sys.exit(main(["train", "llama-2-13b-chat"]))


def test_an_error_in_one_process_ends_the_others(tmp_path):
    assert in_two(failing, tmp_path) == [1, 1]
    assert "ZeroDivisionError" in (tmp_path / "0.txt").read_text()
    *_, last = (tmp_path / "1.txt").read_text().splitlines()  # before it accelerate may warn of OMP_NUM_THREADS
    assert last == "chatmagic: Another process of this run has ended. Its own message says why."
