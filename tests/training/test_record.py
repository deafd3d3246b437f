"""What a run was, beside its adapter."""

import json

import accelerate
import pandas as pd
import pytest
import torch

from chatmagic import ChatmagicError
from chatmagic.training import StepRunner
from tiny_runs import Drawn, adalora, fit, loader, lora, rows


def test_run_json_and_history_csv(tmp_path):
    history = fit(adalora(), tmp_path, about={"persona": {"name": "小明"}}, save_every=7)
    assert pd.read_csv(tmp_path / "history.csv").round(6).equals(history.round(6))
    run = json.loads((tmp_path / "run.json").read_text("utf-8"))
    assert run["model"]["class"] == "LlamaForCausalLM" and run["model"]["dtype"] == "float32"
    settings = run["settings"]
    assert (settings["epochs"], settings["batch_size"], settings["save_every"]) == (10, 2, 7)
    assert settings["adapter"]["target_r"] == 3 and settings["learning_rate"] == [0.01]
    assert run["versions"]["torch"] == torch.__version__.split("+")[0] or run["versions"]["torch"] == torch.__version__
    assert run["persona"] == {"name": "小明"}


@pytest.mark.slow
def test_the_data_is_told_by_its_hash(tmp_path):
    hashes = []
    for name, data in {"a": rows(8), "b": rows(8), "other": rows(8, seed=3), "drawn": Drawn(8)}.items():
        fit(lora(), tmp_path / name, epochs=1, train=loader(data))
        hashes.append(json.loads((tmp_path / name / "run.json").read_text())["data"]["train"])
    assert hashes[0] == hashes[1] != hashes[2] and hashes[3] is None


def test_the_history_so_far_is_there_where_a_run_is_broken_off(tmp_path):
    class Stopping(StepRunner):
        def __call__(self, batch):
            if self.epoch == 4:
                raise ChatmagicError("stopped")
            return super().__call__(batch)

    with pytest.raises(ChatmagicError, match="stopped"):
        fit(lora(), tmp_path, runner=Stopping)
    assert pd.read_csv(tmp_path / "history.csv").epoch.tolist() == [1, 2, 3]


class Failing:
    """A tracker of accelerate's that fails where it is told to."""

    def __init__(self, where):
        self.where = where

    def __call__(self, *_, **__):
        return self._fails("init") or self

    def _fails(self, where):
        if where == self.where:
            raise OSError(f"no network at {where}")

    name, requires_logging_directory, main_process_only = "tensorboard", False, True
    start = store_init_configuration = lambda self, *_: None
    tracker = None

    def log(self, *_, **__):
        self._fails("log")

    def finish(self):
        self._fails("finish")


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_tracker_that_fails_costs_no_run(tmp_path, monkeypatch, where):
    """It is refused where nothing is trained yet; later the run goes on without."""
    monkeypatch.setitem(accelerate.accelerator.LOGGER_TYPE_TO_CLASS, "tensorboard", Failing(where))
    if where == "init":
        with pytest.raises(ChatmagicError, match="tensorboard does not start: no network at init.*without log_with"):
            fit(lora(), tmp_path, epochs=3, log_with="tensorboard")
        return
    with pytest.warns(UserWarning, match=f"tensorboard fails.*no network at {where}.*history.csv holds the same"):
        history = fit(lora(), tmp_path, epochs=3, log_with="tensorboard")
    assert len(history) == 3 and (tmp_path / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_a_tracker_is_told_by_one_word(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = fit(lora(), tmp_path, epochs=3, log_with="tensorboard")
    events = EventAccumulator(str(tmp_path / "chatmagic")).Reload()
    told = [event.value for event in events.Scalars("val_loss")]
    assert told == pytest.approx(history.val_loss.tolist(), rel=1e-6)
    assert [event.step for event in events.Scalars("val_loss")] == [1, 2, 3]
