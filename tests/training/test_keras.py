"""KerasModel's fit: which epochs count, its history, and the plain way."""

import math
import warnings

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from chatmagic import ChatmagicError
from chatmagic.training import KerasModel, StepRunner
from chatmagic.training.keras import TrainingInterrupted
from chatmagic.training.states import newest_state
from quick import first
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


def padded(samples):
    """The samples, every other one with a padded end."""
    for number, sample in enumerate(samples):
        sample["attention_mask"] = torch.ones_like(sample["input_ids"])
        sample["attention_mask"][len(sample["input_ids"]) - 3 * (number % 2) :] = 0
        sample["labels"] = sample["labels"].where(sample["attention_mask"].bool(), -100)
    return samples


@pytest.mark.slow
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


# --- it ends when it has learnt


def counted(monkeypatch, counts):
    """Let these be the tokens that are not learnt, an epoch end each."""
    left = iter(counts)
    monkeypatch.setattr(KerasModel, "_count_unlearnt", lambda self: next(left))


def falling(optimizer):
    return get_cosine_with_min_lr_schedule_with_warmup(optimizer, 1, 16, min_lr_rate=0.1)


LEARNT = {"epochs": 4, "learnt": loader(rows(2)), "scheduler": falling}


@pytest.mark.parametrize(
    "counts, epochs, kept",
    first(
        2,
        [
            ([5, 0, 0], 3, 3),  # learnt, and still: the later is better by its val_loss
            ([0, 3, 0, 0], 4, 4),
            ([9, 8, 7, 0], 4, 4),  # the schedule's end is an end
            ([9, 8, 7, 6, 0], 5, 5),  # goes on, and ends as soon as it is learnt
            ([9, 8, 7, 6, 5, 5], 6, 6),  # at the bound, with the epoch that has fewest left
            ([9, 2, 7, 6, 5, 4], 6, 2),
        ],
    ),
)
def test_it_ends_when_it_has_learnt_and_at_the_bound(tmp_path, monkeypatch, counts, epochs, kept):
    counted(monkeypatch, counts)
    monkeypatch.setattr(StepRunner, "__call__", scored(StepRunner.__call__, iter(range(9, 0, -1))))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        history = fit(lora(), tmp_path, **LEARNT, val=loader(rows(2)))
    assert history.unlearnt.tolist() == counts and len(history) == epochs
    told = [str(each.message) for each in said if "Not all is learnt" in str(each.message)]
    if left := counts[kept - 1]:
        curve = " → ".join(map(str, counts))
        assert told == [
            f"Not all is learnt: {left} tokens of the answers are not, or hardly, the likeliest ({curve}, by "
            "epoch). Try more epochs, another learning rate, more data, or a smaller share of replay."
        ]
    else:
        assert not told
    if epochs > 4:
        assert history.lr.tolist()[4:] == [pytest.approx(1e-3)] * (epochs - 4), "the lowest rate"


def scored(step, losses):
    """The step, whose validation losses are these."""

    def call(self, batch):
        result, log = step(self, batch)
        return result, log | ({"val_loss": float(next(losses))} if self.stage == "val" else {})

    return call


@pytest.mark.parametrize("mode, kept", [("min", 3), ("max", 2)])
def test_the_best_epoch_is_by_the_mode_where_nothing_is_to_be_learnt(tmp_path, monkeypatch, mode, kept):
    monkeypatch.setattr(StepRunner, "__call__", scored(StepRunner.__call__, iter([5, 9, 3])))
    fit(lora(), tmp_path, epochs=3, val=loader(rows(2)), mode=mode)
    assert newest_state(tmp_path).best["epoch"] == kept


def test_nothing_is_asked_before_the_ranks_are_final(tmp_path, monkeypatch):
    """As above: epoch 8 is the first of final ranks; learnt in it and the next is learnt."""
    counted(monkeypatch, [0, 0])
    history = fit(adalora(), tmp_path, learnt=loader(rows(2)))
    assert [math.isnan(count) for count in history.unlearnt] == [True] * 7 + [False] * 2


def greedy(model, sample):
    """How many labels of a sample the model would not choose, or not surely, asked one after another."""
    ids, labels, wrong = sample["input_ids"], sample["labels"], 0
    for at in range(1, len(ids)):
        if labels[at] != -100 and not sample.get("replayed", torch.zeros(len(ids), dtype=bool))[at]:
            logits = model(ids[None, :at]).logits[0, -1].tolist()
            right = logits.pop(labels[at])
            wrong += right - max(logits) <= abs(right) / 64
    return wrong


@torch.no_grad()
def test_what_is_counted_are_the_tokens_that_greedy_decoding_would_miss(tmp_path):
    samples = [sample | {"replayed": torch.arange(12) % 5 == 0} for sample in rows(3, length=12)]
    model = adalora()
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        history = fit(model, tmp_path, learnt=loader(samples), patience=20)
    kept = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    wrong = sum(greedy(kept, sample) for sample in samples)
    best = history.unlearnt.min()
    assert wrong == best > 0
    asked = sum(int(((s["labels"][1:] != -100) & ~s["replayed"][1:]).sum()) for s in samples)
    assert best <= asked < sum(int((s["labels"][1:] != -100).sum()) for s in samples)


@pytest.mark.parametrize(
    "right, rival, left",
    [
        (26, 25.979, 1),  # as measured: so it was in float32, and in bfloat16 not ahead
        (26, 26, 1),
        (26, 27, 1),
        (26, 25.7, 1),  # in bfloat16 two steps at that size
        (26, 25.5, 0),
        (-26, -26.3, 1),
        (-26, -26.5, 0),
        (0.001, 0, 0),  # small ones are rounded less
    ],
)
def test_a_lead_that_rounding_takes_is_not_learnt(monkeypatch, right, rival, left):
    """Of two tokens asked for one is far ahead; the other's logit is `right`, and `rival` the next."""
    logits = torch.full((2, 128), -99.0)
    logits[0, 5], logits[1, 7], logits[1, 9] = 50, right, rival
    monkeypatch.setattr("chatmagic.training.step.logits_at", lambda *_: logits)
    batch = {"input_ids": torch.tensor([[1, 5, 7]]), "labels": torch.tensor([[-100, 5, 7]])}
    assert StepRunner(lora(), None, Accelerator(cpu=True), "val").unlearnt(batch) == left


def test_a_run_stopped_in_its_extension_goes_on_in_it(tmp_path):
    """And has the history of one that was not stopped."""
    settings = LEARNT | {"learnt": loader(rows(2, seed=5)), "patience": 9}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = fit(lora(), tmp_path / "whole", **settings)
        assert len(whole) == 6

        class Stopping(StepRunner):
            def __call__(self, batch):
                if self.stage == "train" and self.epoch == 5:
                    raise KeyboardInterrupt
                return super().__call__(batch)

        with pytest.raises((TrainingInterrupted, KeyboardInterrupt)):
            fit(lora(), tmp_path / "stopped", runner=Stopping, **settings)
        with pytest.raises(ChatmagicError, match="stopped after step 16 of 24"):  # 6 epochs of 4 steps
            fit(lora(), tmp_path / "stopped", **settings)
        resumed = fit(lora(), tmp_path / "stopped", resume=True, **settings)
    columns = ["train_loss", "val_loss", "lr", "unlearnt"]
    assert resumed[columns].equals(whole[columns])


def test_a_step_runner_need_not_know_how(tmp_path):
    class Without(StepRunner):
        unlearnt = None

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        history = fit(lora(), tmp_path, epochs=2, runner=Without, learnt=loader(rows(2)))
    assert history.unlearnt.notna().all()
