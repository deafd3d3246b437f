"""What fit refuses before the first step, one test a check, and what only the first step can tell."""

from types import SimpleNamespace

import bitsandbytes
import pytest
import torch

from chatmagic import ChatmagicError
from chatmagic.training import checks
from tiny_runs import adalora, fit, loader, rows, tiny_llama


def frozen():
    model = adalora()
    model.requires_grad_(False)
    return model


def repacked():
    """A model with a layer as bitsandbytes leaves it that has answered on the CPU."""
    base = tiny_llama()
    model = adalora(base=base)
    weight = torch.nn.Parameter(torch.zeros(64, 1, dtype=torch.uint8), requires_grad=False)
    weight.quant_state = SimpleNamespace(packing_format_for_cpu=True)
    base.packed = bitsandbytes.nn.Linear4bit(2, 2)
    base.packed.weight = weight
    return model


class Short(torch.optim.lr_scheduler.OneCycleLR):
    def __init__(self, optimizer):
        super().__init__(optimizer, 1e-2, total_steps=20)


class OfOthers(torch.optim.AdamW):
    """Of parameters of its own, whatever it is given."""

    def __init__(self, params, **settings):
        super().__init__([torch.nn.Parameter(torch.zeros(1))], **settings)


CASES = {
    "no_adapter": (tiny_llama, {}, "no adapter on any layer"),
    "nothing_trainable": (frozen, {}, "No parameter is trainable"),
    "optimizer_of_others": (adalora, {"optimizer": OfOthers}, "optimizer holds no trainable parameter"),
    "no_learning_rate": (adalora, {"lr": 0.0}, "learning rate is 0"),
    "repacked_weights": (repacked, {}, "Load it again"),
    "no_steps": (adalora, {"epochs": 0}, "nothing to train on"),
    "monitor_without_validation": (adalora, {"val": False}, "needs val_data"),
    "ranks_never_final": (adalora, {"epochs": 7}, "final only after 28.*total_steps=28"),
    "schedule_too_short": (adalora, {"scheduler": Short}, "ends after 20 of 40"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_refused_before_anything_is_written(tmp_path, name):
    model, settings, words = CASES[name]
    with pytest.raises(ChatmagicError, match=words):
        fit(model(), tmp_path / "adapter", **settings)
    assert not (tmp_path / "adapter").exists()


def test_each_check_has_its_case():
    elsewhere = {"gradients_that_nobody_adds_up"}  # of several processes: test_distributed.py
    assert {check.__name__ for check in checks.CHECKS} == CASES.keys() | elsewhere


# --- what only a step can tell


def untaught():
    samples = rows(8)
    for sample in samples:
        sample["labels"].fill_(-100)
    return loader(samples)


def silent():
    """A model whose logits do not depend on its layers."""
    model = adalora()
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    return model


@pytest.mark.parametrize(
    "model, settings, words",
    [
        (adalora, {"train": untaught()}, "All labels of this batch are -100"),
        (adalora, {"val": untaught()}, "val_loss is not a number"),
        (adalora, {"lr": float("inf")}, "loss is nan"),
        (silent, {}, "All gradients of the first step are zero"),
    ],
)
def test_runs_that_train_nothing_are_stopped(tmp_path, model, settings, words):
    with pytest.raises(ChatmagicError, match=words):
        fit(model(), tmp_path, **settings)
    assert not (tmp_path / "adapter_config.json").exists()


def test_a_missing_gradient_is_named(tmp_path):
    model = adalora()
    model.base_model.model.register_parameter("unused", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(ChatmagicError, match="1 trainable parameters get no gradient.*unused"):
        fit(model, tmp_path)
