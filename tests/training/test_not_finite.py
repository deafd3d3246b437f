"""A gradient that is no number any more is not stepped by; and nothing that is not finite is saved, merged or
exported."""

import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from chatmagic import ChatmagicError, adalora_to_lora, merge_adapter
from chatmagic.models.parts import trainable
from chatmagic.training import keras
from chatmagic.training.states import RunState, newest_state, save_adapter, save_state
from disk import contents
from quick import first
from tiny_runs import Replayed, adalora, fit, loader, lora, rows, runner_that, tiny_llama

BAD = pytest.mark.parametrize("bad", first(1, [float("nan"), float("inf"), -float("inf")]))


def spoiling(batch, bad):
    """A StepRunner in whose `batch`-th training batch the gradient of one number is `bad`."""

    def spoil(runner):
        type(runner).before = [param.detach().clone() for param in runner.params]
        hook = runner.params[3].register_hook(
            lambda grad: (hook.remove(), grad.index_fill(0, torch.tensor([0]), bad))[1]
        )

    return runner_that(spoil, batch)


@BAD
@pytest.mark.parametrize(
    "make, settings",
    first(
        1,
        [
            (adalora, {}),
            (lora, {}),
            (adalora, {"gradient_accumulation_steps": 2}),
            (lora, {"monitor": "train_loss", "val": False}),
            (adalora, {"captured": True}),
            (lora, {"captured": True}),
        ],
        of=lambda case: "captured" in case[1],
    ),
)
def test_the_step_is_not_taken_and_what_was_saved_stays(tmp_path, monkeypatch, make, settings, bad):
    settings = dict(settings)
    if settings.pop("captured", False):
        monkeypatch.setattr(keras, "why_not", lambda *_: None)
        monkeypatch.setattr(keras, "CapturedStep", Replayed)
    accumulated = settings.get("gradient_accumulation_steps", 1)
    epochs = 10 * accumulated
    runner, model = spoiling(38 * accumulated, bad), make()
    with pytest.raises(ChatmagicError, match="norm of the gradients (nan|inf).*this step was not taken.*resume=True"):
        fit(model, tmp_path, epochs=epochs, runner=runner, **settings)
    assert all(map(torch.equal, runner.before, (param for _, param in trainable(model))))
    state = newest_state(tmp_path)
    assert state.step == 36 and all(param.isfinite().all() for param in state.params.values())
    assert all(factor.isfinite().all() for factor in load_file(tmp_path / "adapter_model.safetensors").values())


def poisoned(model):
    """One row of the embedding, that of token 63, is no number: so is the loss of whoever says it."""
    embedding = model.get_input_embeddings()
    embedding.weight.requires_grad_(False)[63] = float("nan")
    return model


class Tokens:
    """Decodes a token as its number between angle brackets."""

    @staticmethod
    def decode(ids):
        return "".join(f"<{number}>" for number in ids)


def collate(samples):
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


@pytest.mark.parametrize("make", first(1, [adalora, lora]))
@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 4}, {"tokenizer": Tokens}])
def test_the_batch_and_the_row_are_named(tmp_path, make, settings):
    """Of eight rows in batches of two, the sixth, also where four batches make a step."""
    data = rows(8)
    for number, row in enumerate(data):
        row["input_ids"] = row["input_ids"] % 63
        row["input_ids"][3] = 63 if number == 5 else 7
    tokenizer = settings.pop("tokenizer", None) if "tokenizer" in (settings := dict(settings)) else None
    collator = type("Collator", (), {"tokenizer": tokenizer, "__call__": staticmethod(collate)})()
    with pytest.raises(ChatmagicError, match="loss is nan") as error:
        fit(poisoned(make()), tmp_path, epochs=40, train=loader(data, collate_fn=collator), **settings)
    *_, first, line = str(error.value).split("\n")
    assert first.endswith("in epoch 1:")
    text = "".join(f"<{number}>" if tokenizer else f"{number} " for number in data[5]["input_ids"].tolist()).strip()
    assert line.strip() == f"batch 3, row 1: {text!r}"
    assert not (tmp_path / "adapter_config.json").exists()


def overflowing(monkeypatch, steps):
    """Let fp16 overflow in the first `steps` steps of a run, on the CPU too, where accelerate has no scaler."""
    count = iter(range(10**6))

    class Skipping(torch.optim.AdamW):
        step_was_skipped = False

        def step(self, closure=None):
            self.step_was_skipped = next(count) < steps
            if not self.step_was_skipped:
                super().step(closure)

    monkeypatch.setattr(
        "accelerate.Accelerator.optimizer_step_was_skipped",
        property(lambda self: self._optimizers[-1].optimizer.step_was_skipped),
    )
    monkeypatch.setattr(
        "accelerate.optimizer.AcceleratedOptimizer.step_was_skipped",
        property(lambda self: self.optimizer.step_was_skipped),
    )
    return Skipping


@pytest.mark.parametrize("make", first(1, [lora, adalora]))
def test_fp16_that_skips_every_step_is_stopped_and_named(tmp_path, monkeypatch, make):
    """Twenty steps are five epochs of this run; the count is not an epoch's."""
    with pytest.raises(ChatmagicError, match="(?s)20 steps in a row .* fp16.*mixed_precision='no'.*batch 4, row 0"):
        fit(make(), tmp_path, optimizer=overflowing(monkeypatch, 10**6))
    assert newest_state(tmp_path).step == 16


@pytest.mark.parametrize("make", [lora, adalora])
@pytest.mark.slow
def test_fp16_that_skips_an_epoch_has_its_row_in_the_history(tmp_path, monkeypatch, make):
    """The first steps of fp16 find its scale; with few steps an epoch that is a whole one."""
    history = fit(make(), tmp_path, optimizer=overflowing(monkeypatch, 6))
    assert history.epoch.tolist() == list(range(1, 11)) and not history.isna().any(axis=None)


def test_fp16_that_finds_its_scale_goes_on(tmp_path, monkeypatch):
    history = fit(lora(), tmp_path, optimizer=overflowing(monkeypatch, 19))
    assert len(history) == 10 and history.train_loss.iloc[-1] < history.train_loss.iloc[0] - 0.02


@BAD
def test_neither_adapter_nor_state_is_saved(tmp_path, bad):
    model = lora()
    fit(model, tmp_path, epochs=2)
    before = contents(tmp_path)
    next(param for _, param in trainable(model)).data[0, 0] = bad
    with pytest.raises(ChatmagicError, match="lora_A.*not finite any more, so it is not saved"):
        save_adapter(model, tmp_path)
    with pytest.raises(ChatmagicError, match="not finite any more"):
        save_state(model, RunState(step=9), tmp_path)
    good = lora()
    with pytest.raises(ChatmagicError, match="of the state is not finite"):
        save_state(good, RunState(step=9, optimizer={"state": {0: {"exp_avg": torch.tensor([1.0, bad])}}}), tmp_path)
    assert contents(tmp_path) == before


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A base folder and an AdaLoRA adapter for it."""
    folder = tmp_path_factory.mktemp("trained")
    tiny_llama().save_pretrained(folder / "base")
    model = adalora(base=type(tiny_llama()).from_pretrained(folder / "base"))
    fit(model, folder / "adapter")
    return folder


@BAD
@pytest.mark.parametrize("factor", ["lora_A", "lora_B", "lora_E"])
def test_neither_merged_nor_exported(tmp_path, trained, factor, bad):
    shutil.copytree(trained / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    factors = load_file(file)
    name = next(name for name, tensor in factors.items() if factor in name and tensor.numel())
    factors[name].view(-1)[0] = bad
    save_file(factors, file, metadata={"format": "pt"})
    for make in (lambda: merge_adapter(trained / "base", tmp_path / "adapter", tmp_path / "out"),
                 lambda: adalora_to_lora(tmp_path / "adapter", tmp_path / "out")):  # fmt: skip
        with pytest.raises(ChatmagicError, match=f"not finite, first in .*{factor}"):
            make()
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_merge_that_overflows_the_bases_dtype_is_refused(tmp_path):
    base = tiny_llama().half()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj"]))
    for name, param in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.constant_(param, 200.0)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ChatmagicError, match="q_proj.weight is not finite in torch.float16"):
        merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
