"""KerasModel's fit: which epochs count, its history, and the plain way."""

import torch

from chatmagic.training import StepRunner
from tiny_runs import LAYERS, adalora, fit, loader, lora, rows


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


def padded(samples):
    """The samples, every other one with a padded end."""
    for number, sample in enumerate(samples):
        sample["attention_mask"] = torch.ones_like(sample["input_ids"])
        sample["attention_mask"][len(sample["input_ids"]) - 3 * (number % 2) :] = 0
        sample["labels"] = sample["labels"].where(sample["attention_mask"].bool(), -100)
    return samples


def test_fast_false_trains_plainly_and_to_the_same(tmp_path, capsys):
    """Nothing of ours stands in a layer, an attention or the optimizer during a step; the losses are the fast way's."""
    seen = []

    class Watching(StepRunner):
        def __call__(self, batch):
            changed = [module for module in self.net.modules() if "forward" in vars(module)]
            attention = self.net.get_base_model().config._attn_implementation
            seen.append((len(changed), attention, bool(self.optimizer and self.optimizer.param_groups[0]["fused"])))
            return super().__call__(batch)

    train = loader(padded(rows(8)))
    plain = fit(adalora(), tmp_path / "plain", train=train, runner=Watching, fast=False)
    assert set(seen) == {(0, "sdpa", False)} and "CUDA graph" not in capsys.readouterr().out
    seen.clear()
    quick = fit(adalora(), tmp_path / "quick", train=train, runner=Watching)
    assert {each[:2] for each in seen} == {(LAYERS, "chatmagic_rows")} and any(fused for *_, fused in seen)
    for name in ("train_loss", "val_loss", "grad_norm", "rank_budget"):
        torch.testing.assert_close(plain[name].tolist(), quick[name].tolist(), rtol=1e-3, atol=1e-4)
