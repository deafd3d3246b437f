"""The captured step against the eager one, and why a step is not captured."""

from types import SimpleNamespace

import bitsandbytes
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from chatmagic.accel.captured import CapturedStep, why_not
from chatmagic.accel.layers import fast_layers
from chatmagic.models.parts import trainable
from chatmagic.training import KerasModel, StepRunner, functional, keras
from quick import first
from tiny_runs import Replayed, adalora, fit, loader, lora, rows, tiny_llama, uneven_rows


def forty_steps(batches, captured=None):
    """The log of each step, and the model."""
    model, logs = adalora(), []
    AcceleratorState._reset_state()  # another test's fit may have left one of another precision
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=40)
    runner = StepRunner(model, None, accelerator, "train", {}, accelerator.prepare(optimizer), scheduler)
    if captured:
        runner.captured = captured(functional, model, optimizer, accelerator, StepRunner.max_grad_norm)
    with fast_layers(model):
        for step in range(40):
            runner.sums = [0.0, 0.0]
            logs.append(runner(batches[step % len(batches)])[1])
    return logs, model, runner


@pytest.mark.parametrize("replayed", first(1, [True, False]))
def test_the_captured_step_is_the_eager_one(replayed):
    """Losses, penalties, gradient norms, rates, ranks and factors of forty steps on three batches of two shapes."""
    first, second, longer = (next(iter(loader(data, 4))) for data in (uneven_rows(4), rows(4, 2), rows(4, 1, 70)))
    batches = [first, longer, first, second]
    batches[0]["attention_mask"] = torch.ones(4, 12, dtype=int)
    batches[0]["attention_mask"][:2, 10:] = 0
    batches[0]["labels"][:2, 10:] = -100
    for batch in batches if replayed else ():
        batch["replayed"] = torch.zeros_like(batch["labels"], dtype=bool)
        batch["replayed"][1:3, 6:9] = True
    expected, plain, eager = forty_steps(batches)
    found, model, runner = forty_steps(batches, Replayed)
    captured = [key for key, recording in runner.captured.recordings.items() if recording]
    assert {key[:2] for key in captured if key != "update"} == {(4, 128), (4, 64)} and len(captured) == 3
    assert runner.tokens == eager.tokens
    assert found[-2]["train_loss"] < found[0]["train_loss"] - 0.1
    for name in ("train_loss", "train_penalty", "grad_norm", "lr", "rank_budget"):
        assert [log[name] for log in found] == pytest.approx([log[name] for log in expected], rel=1e-3), name
    assert model.peft_config["default"].rank_pattern == plain.peft_config["default"].rank_pattern
    for (_, param), (_, other) in zip(trainable(model), trainable(plain)):
        torch.testing.assert_close(param, other, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(
    "scheduler",
    [
        pytest.param(lambda optimizer: OneCycleLR(optimizer, 1e-2, total_steps=40), id="betas"),
        pytest.param(lambda optimizer: Decaying(optimizer), id="weight decay", marks=pytest.mark.slow),
    ],
)
def test_what_a_schedule_changes_beside_the_rate_is_heard(tmp_path, monkeypatch, scheduler):
    """A graph holds such numbers as they were."""
    expected = fit(adalora(), tmp_path / "eager", scheduler=scheduler)
    monkeypatch.setattr(keras, "why_not", lambda *_: None)
    monkeypatch.setattr(keras, "CapturedStep", Replayed)
    found = fit(adalora(), tmp_path / "captured", scheduler=scheduler)
    assert found["train_loss"].tolist() == pytest.approx(expected["train_loss"].tolist(), rel=1e-4)


class Decaying(LRScheduler):
    """More weight decay with every step."""

    def get_lr(self):
        for group in self.optimizer.param_groups:
            group["weight_decay"] = self.last_epoch / 2
        return [group["lr"] for group in self.optimizer.param_groups]


def test_a_replay_is_seen_as_a_step():
    """ChatLLM keeps what it has computed for as long as the parameters' versions stay."""
    batch = next(iter(loader(rows(4), 4)))
    *_, runner = forty_steps([batch], Replayed)
    for recording in runner.captured.recordings.values():
        recording.graph = SimpleNamespace(replay=int)
    versions = [param._version for param in runner.params]
    runner.captured(batch)
    assert all(param._version > before for param, before in zip(runner.params, versions))


def test_a_failed_capture_is_told_and_training_goes_on(capsys):
    batch = next(iter(loader(rows(4), 4)))
    expected, *_ = forty_steps([batch])
    found, _, runner = forty_steps([batch], CapturedStep)  # torch without CUDA has no graphs
    assert capsys.readouterr().out.count("without CUDA graphs: ") == 1 and runner.captured.off
    assert found[-1]["train_loss"] == pytest.approx(expected[-1]["train_loss"], rel=1e-4)


def test_batches_that_only_the_eager_step_knows():
    batch = next(iter(loader(rows(4), 4)))
    *_, runner = forty_steps([batch], Replayed)
    assert runner.captured(batch | {"position_ids": torch.arange(12)[None]}) is None
    assert runner.captured(batch | {"labels": torch.full((4, 12), -100)}) is None


def int8():
    base = tiny_llama()
    base.extra = bitsandbytes.nn.Linear8bitLt(2, 2)
    return adalora(base=base)


def checkpointing():
    base = tiny_llama()
    base.gradient_checkpointing_enable()
    return adalora(base=base)


def hooked():
    model = adalora()
    model.get_input_embeddings().register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    "model, settings, optimizer, reason",
    [
        (adalora, {}, torch.optim.AdamW, None),
        (lora, {}, torch.optim.AdamW, None),
        (adalora, {"device": torch.device("cpu")}, torch.optim.AdamW, "no CUDA device"),
        (lambda: adalora().bfloat16(), {}, torch.optim.AdamW, "parameters are torch.bfloat16"),
        (adalora, {"gradient_accumulation_steps": 2}, torch.optim.AdamW, "accumulated"),
        (adalora, {"scaler": object()}, torch.optim.AdamW, "fp16"),
        (adalora, {}, torch.optim.SGD, "the optimizer is SGD"),
        (checkpointing, {}, torch.optim.AdamW, "recomputed"),
        (int8, {}, torch.optim.AdamW, "8-bit"),
        (hooked, {}, torch.optim.AdamW, "embed_tokens has hooks"),
    ],
)
def test_why_a_step_is_not_captured(model, settings, optimizer, reason):
    normal = {"device": torch.device("cuda"), "gradient_accumulation_steps": 1, "scaler": None}
    model = model()
    found = why_not(model, optimizer(model.parameters(), lr=1e-2), SimpleNamespace(**normal | settings))
    assert found is reason is None or reason in found


def test_fit_says_why_not_where_there_is_a_gpu(tmp_path, capsys):
    """Who trains on the CPU has not waited for a CUDA graph."""
    fit(adalora(), tmp_path)
    assert "CUDA" not in capsys.readouterr().out
    of_one = SimpleNamespace(device=torch.device("cuda"), gradient_accumulation_steps=2, scaler=None, print=print)
    optimizer = SimpleNamespace(optimizer=torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]))
    run = SimpleNamespace(fast=True, net=adalora(), optimizer=optimizer, accelerator=of_one, StepRunner=StepRunner)
    assert KerasModel._capture(run) is None
    assert "not captured as a CUDA graph: " in capsys.readouterr().out
