"""`chatmagic train` and `chatmagic evaluate`: the notebooks' own run, broken off and gone on with, and asked."""

import json
import os
import re
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
import torch

from chatmagic import cli, merge_adapter
from chatmagic.course import profile, script
from chatmagic.course import thread as course
from chatmagic.course.profile import profiles
from chatmagic.training.step import StepRunner
from tiny_runs import processes

NAME = "llama-2-13b-chat"
SMALL = {"quantize": "no", "conversations": 24, "samples": 16, "batch_size": 2, "epochs": 2, "learning_rate": 1e-2}
NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "04-train-adalora.ipynb"


def train(home, *arguments, runner=None) -> int:
    """`chatmagic train` of a tiny model in sixteen steps, eight an epoch."""
    os.environ |= {"CHATMAGIC_HOME": str(home), "CHATMAGIC_COURSE": str(home / "course")}
    profiles()[NAME] = replace(profiles()[NAME], **SMALL)
    if runner:
        script.KerasModel.StepRunner = runner
    return cli.main(["train", NAME, *arguments])


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """What `train` sets in this process is undone."""
    monkeypatch.setenv("CHATMAGIC_HOME", "")
    monkeypatch.setitem(profiles(), NAME, profiles()[NAME])
    monkeypatch.setattr(script.KerasModel, "StepRunner", StepRunner)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def home(tmp_path, tiny_models):
    """A CHATMAGIC_HOME with the base model."""
    shutil.copytree(tiny_models / NAME, tmp_path / "home" / NAME)
    return tmp_path / "home"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_models):
    """A home where the script has run."""
    home = tmp_path_factory.mktemp("trained")
    shutil.copytree(tiny_models / NAME, home / NAME)
    (process,) = processes(train, (home,))
    process.join(120)
    return home


def adapter_of(home) -> Path:
    (folder,) = (home / "course").glob("*/adapter")
    return folder


def weights(home) -> bytes:
    return (adapter_of(home) / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
def test_the_script_is_the_notebooks_run(trained, tmp_path, monkeypatch):
    """The cells of 04 as far as `fit`, on the same data, leave the same adapter."""
    shutil.copytree(trained, tmp_path / "home")
    monkeypatch.setenv("CHATMAGIC_HOME", str(tmp_path / "home"))
    shutil.rmtree(adapter_of(tmp_path / "home"))
    profiles()[NAME] = replace(profiles()[NAME], **SMALL)
    cells = {}
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if cell.cell_type == "code" and "history" not in cells:
            exec(cell.source, cells)
    assert weights(tmp_path / "home") == weights(trained)
    assert json.loads((adapter_of(trained).parent / "replies.json").read_text())


def killed_at(batch, number):
    class Killed(StepRunner):
        seen = 0

        def __call__(self, inputs):
            Killed.seen += 1
            if Killed.seen == batch:
                os.kill(os.getpid(), number)
            return super().__call__(inputs)

    return Killed


def train_until(home, batch, number):
    sys.exit(train(home, runner=killed_at(batch, number)))


@pytest.mark.parametrize("number, code, saved", [(signal.SIGKILL, -9, 8), (signal.SIGTERM, 1, 14)])
@pytest.mark.slow
def test_a_run_that_was_ended_goes_on_to_the_same_adapter(home, trained, number, code, saved):
    """SIGTERM is a batch system's and a launcher's: the step is finished and the state saved. The 14th training batch
    is the 20th of all: the first epoch ended with six of validation."""
    (process,) = processes(train_until, (home, 20, number))
    process.join(120)
    assert process.exitcode == code
    assert [folder.name for folder in adapter_of(home).glob("last-*")] == [f"last-{saved:06d}"]
    assert train(home, "--resume") == 0
    assert weights(home) == weights(trained)


def test_sigterm_outside_the_steps_ends_the_run(home, monkeypatch, capsys):
    monkeypatch.setattr(script, "make_data", lambda course: os.kill(os.getpid(), signal.SIGTERM))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a job in the background
    assert train(home) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_process_that_is_lost_while_they_join_is_told(home, monkeypatch, capsys):
    def joins(**_):
        raise torch.distributed.DistNetworkError("Connection reset by peer")

    monkeypatch.setattr(script, "PartialState", joins)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train(home) == 1
    assert "Another process of this run has ended" in capsys.readouterr().err


def test_nothing_to_resume_is_told(home, capsys):
    assert train(home, "--resume") == 1
    assert "Nothing to resume" in capsys.readouterr().err


@pytest.mark.parametrize("gpu, where", [(0, "RAM"), (2 * 10**9, "GPU memory")])
def test_the_machine_is_measured_where_the_model_is_there_too(home, capsys, monkeypatch, gpu, where):
    """It may have been brought from another machine; without memory the process would be killed, in silence."""
    monkeypatch.setattr(profile, "ram", lambda: 2 * 10**9)
    monkeypatch.setattr(profile, "gpu_memory", lambda: gpu)
    monkeypatch.setattr(script, "fetch", lambda course: pytest.fail("the run began"))
    assert train(home) == 1
    assert f"needs 3.0 GB of {where}, and there are 2.0" in capsys.readouterr().err
    assert not (home / "course").exists()


def test_each_process_loads_the_quantised_base_to_its_own_device(monkeypatch, home):
    monkeypatch.setenv("CHATMAGIC_HOME", str(home))
    monkeypatch.setattr(script.PartialState(), "device", torch.device("cuda", 3))
    monkeypatch.setattr(script, "load_model", lambda folder, **settings: settings)
    assert script.load(course.start(NAME)) == {"quantize": "nf4", "device_map": {"": torch.device("cuda", 3)}}


@pytest.mark.slow
def test_what_changed_is_asked_of_the_newest(trained, tmp_path, capsys, monkeypatch):
    """The adapter, then the merged model: as good as one another."""
    shutil.copytree(trained, tmp_path / "home")
    monkeypatch.setenv("CHATMAGIC_HOME", str(tmp_path / "home"))
    run = course.resume()
    profiles()[NAME] = replace(profiles()[NAME], quantize="no")
    results = []
    for folder in (run.adapter, run.merged):
        assert cli.main(["evaluate"]) == 0
        said = capsys.readouterr().out
        results.append(json.loads((run.folder / "evaluation.json").read_text()))
        assert f"{folder.name}: " in said and re.search(r"^alone +\d/9 +\d/9$", said, re.MULTILINE)
        if folder == run.adapter:
            merge_adapter(run.model, run.adapter, run.merged)
    adapter, merged = results
    assert adapter["before"] == merged["before"] != adapter["after"]
    for language in ("zh", "en"):
        first, second = adapter["after"][language], merged["after"][language]
        assert first["perplexity"] == pytest.approx(second["perplexity"], rel=1e-2)
        assert adapter["table"]["after"][language]["perplexity"] != adapter["table"]["before"][language]["perplexity"]
        assert len(first["replies"]) > 150


def of_ones_own(home, *names) -> Path:
    """The course's folder, with data that the reader put there under these names."""
    folder = course.start(NAME).folder
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "ja"}]} for n in range(24)
    ]
    for name in names:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.mark.parametrize("names", [("train.jsonl",), ("val.jsonl",), ("train.jsonl", "val.jsonl")])
def test_data_of_ones_own_is_never_overwritten(home, monkeypatch, names):
    """What is missing is made, or a tenth of one's own is kept out of training."""
    monkeypatch.setenv("CHATMAGIC_HOME", str(home))
    monkeypatch.setattr(script, "own_replies", lambda model, tokenizer: [("What is an atom?", "Small.")])
    folder = of_ones_own(home, *names)
    before = {name: (folder / name).read_bytes() for name in names}
    script.make_data(course.resume())
    assert {name: (folder / name).read_bytes() for name in names} == before
    train, val = ((folder / name).read_text().splitlines() for name in ("train.jsonl", "val.jsonl"))
    if names == ("train.jsonl",):
        assert len(val) == 2 and set(val) < set(train)
        assert "replies.json" not in {path.name for path in folder.iterdir()}, "nothing is made for it"


def test_what_is_held_out_of_ones_own_data_is_not_trained(home, monkeypatch):
    monkeypatch.setenv("CHATMAGIC_HOME", str(home))
    of_ones_own(home, "train.jsonl")
    lengths = []
    monkeypatch.setattr(script, "RandomSampler", lambda data, num_samples: lengths.append(len(data)) or range(16))
    assert train(home) == 0
    assert lengths == [22]


def test_one_conversation_is_too_few_to_hold_one_out(home, monkeypatch, capsys):
    monkeypatch.setenv("CHATMAGIC_HOME", str(home))
    data = of_ones_own(home, "train.jsonl") / "train.jsonl"
    data.write_text(data.read_text().splitlines()[0])
    assert train(home) == 1
    assert (
        "has 1 conversations: two are the least" in capsys.readouterr().err and not data.with_name("val.jsonl").exists()
    )


def test_before_any_training_the_way_to_it_is_told(home, capsys, monkeypatch):
    monkeypatch.setenv("CHATMAGIC_HOME", str(home))
    assert cli.main(["evaluate", NAME]) == 1
    assert f"chatmagic train {NAME}" in capsys.readouterr().err


@pytest.mark.slow
def test_the_run_tells_how_it_was_trained_to_think(trained, tmp_path, monkeypatch):
    """What was decided by the rows, not only what a profile says."""
    shutil.copytree(trained, tmp_path / "home")
    monkeypatch.setenv("CHATMAGIC_HOME", str(tmp_path / "home"))
    profiles()[NAME] = replace(profiles()[NAME], quantize="no")
    told = {}
    monkeypatch.setattr(course.Course, "thinking", lambda *_: False)
    monkeypatch.setattr(script.KerasModel, "fit", lambda self, *_, **settings: told.update(settings, net=self.net))
    script.train(course.resume())
    assert told["about"]["thinking"] is False and told["net"].chat_thinking is False


@pytest.mark.slow
@pytest.mark.parametrize("method, kind, rate", [("adalora", "ADALORA", 1e-2), ("lora", "LORA", 2e-3)])
def test_the_method_is_one_word(trained, tmp_path, method, kind, rate):
    """LoRA is trained at a rate of its own."""
    shutil.copytree(trained, tmp_path / "home")
    assert train(tmp_path / "home", "--method", method, "--no-resume") == 0
    told = adapter_of(tmp_path / "home")
    assert json.loads((told / "adapter_config.json").read_text())["peft_type"] == kind
    assert json.loads((told / "run.json").read_text())["settings"]["learning_rate"] == [rate]
