"""KerasModel's fit: which epochs count, its history, and the settings that would train nothing."""

import pytest
import torch

from chatmagic import ChatmagicError
from chatmagic.training import KerasModel, StepRunner
from tiny_runs import LAYERS, adalora, fit, loader, lora, rows, tiny_llama


class Worsening(StepRunner):
    """Validation that gets worse from the first epoch on."""

    epochs = 0.0

    def __call__(self, batch):
        result, log = super().__call__(batch)
        if self.stage == "val":
            Worsening.epochs += 1
            log["val_loss"] = Worsening.epochs
        return result, log


def test_nothing_counts_before_the_ranks_are_final(tmp_path):
    """40 steps, 4 an epoch: the ranks are final after step 29, so epoch 8 is the first that may be best or last."""
    history = fit(adalora(), tmp_path, runner=Worsening, patience=1)
    assert history.epoch.iloc[-1] == 9
    assert history.rank_budget[7] == 3 * LAYERS
    saved = (tmp_path / "adapter_model.safetensors").stat().st_mtime_ns
    assert saved < (tmp_path / "last-000036" / "state.pt").stat().st_mtime_ns


def test_history_has_its_columns(tmp_path):
    history = fit(lora(), tmp_path, epochs=2)
    assert list(history) == [
        "epoch",
        "train_loss",
        "lr",
        "grad_norm",
        "tokens_per_s",
        "peak_memory",
        "val_loss",
    ]
    history = fit(adalora(), tmp_path)
    assert {"train_penalty", "val_penalty", "rank_budget"} <= set(history)
    assert (history.tokens_per_s > 0).all() and (history.peak_memory > 0.1).all()


def test_lora_learns_too(tmp_path):
    history = fit(lora(), tmp_path, epochs=5)
    assert history.train_loss.iloc[-1] < history.train_loss.iloc[0] - 0.02


# --- settings that would train nothing


def untaught():
    samples = rows(8)
    for sample in samples:
        sample["labels"].fill_(-100)
    return loader(samples)


def frozen():
    model = adalora()
    model.requires_grad_(False)
    return model


def silent():
    """A model whose logits do not depend on its layers."""
    model = adalora()
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    return model


class Short(torch.optim.lr_scheduler.OneCycleLR):
    def __init__(self, optimizer):
        super().__init__(optimizer, 1e-2, total_steps=20)


@pytest.mark.parametrize(
    "model, settings, words",
    [
        (tiny_llama, {}, "no adapter on any layer"),
        (frozen, {}, "No parameter is trainable"),
        (adalora, {"lr": 0.0}, "learning rate is 0"),
        (adalora, {"epochs": 0}, "nothing to train on"),
        (adalora, {"epochs": 7}, "final only after 28.*total_steps=28"),
        (adalora, {"scheduler": Short}, "ends after 20 of 40"),
        (adalora, {"train": untaught()}, "All labels of this batch are -100"),
        (adalora, {"val": untaught()}, "val_loss is not a number"),
        (adalora, {"lr": float("inf")}, "loss is nan"),
        (silent, {}, "All gradients of the first step are zero"),
    ],
)
def test_runs_that_train_nothing_are_refused(tmp_path, model, settings, words):
    with pytest.raises(ChatmagicError, match=words):
        fit(model(), tmp_path, **settings)
    assert not (tmp_path / "adapter_config.json").exists()


def test_an_optimizer_of_other_parameters_is_refused(tmp_path):
    base = tiny_llama()
    optimizer = torch.optim.AdamW(base.model.norm.parameters(), lr=1e-2)
    with pytest.raises(ChatmagicError, match="optimizer holds no trainable parameter"):
        KerasModel(adalora(base=base), optimizer=optimizer).fit(loader(rows(8)), monitor="train_loss", plot=False)


def test_a_missing_gradient_is_named(tmp_path):
    model = adalora()
    model.base_model.model.register_parameter("unused", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(ChatmagicError, match="1 trainable parameters get no gradient.*unused"):
        fit(model, tmp_path)


def test_validation_needs_data(tmp_path):
    model = adalora()
    keras_model = KerasModel(model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2))
    with pytest.raises(ChatmagicError, match="needs val_data"):
        keras_model.fit(loader(rows(8)), ckpt_path=tmp_path, plot=False)
