"""What a run was, beside its adapter."""

import json

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


def test_a_tracker_is_told_by_one_word(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = fit(lora(), tmp_path, epochs=3, log_with="tensorboard")
    events = EventAccumulator(str(tmp_path / "chatmagic")).Reload()
    told = [event.value for event in events.Scalars("val_loss")]
    assert told == pytest.approx(history.val_loss.tolist(), rel=1e-6)
    assert [event.step for event in events.Scalars("val_loss")] == [1, 2, 3]
