"""AdaLoRA's schedule, ranks and penalty against PEFT's own; the step; fit's guards."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from chatmagic import ChatmagicError
from chatmagic.train import KerasModel, adalora_config, find_all_linear_names
from chatmagic.train.adalora import rank_allocator

PROJECTIONS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def tiny_llama():
    torch.manual_seed(0)
    shape = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape)).eval()


def adalora(steps=40, dropout=0.0, **kwargs):
    config = adalora_config(
        steps, PROJECTIONS, init_r=6, target_r=3, lora_alpha=16, lora_dropout=dropout, **kwargs
    )
    return get_peft_model(tiny_llama(), config)


def rows(n, seed=0, length=12):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(64, (n, length), generator=generator)
    labels = ids.clone()
    labels[:, : length // 3] = -100
    return [{"input_ids": i, "labels": label} for i, label in zip(ids, labels)]


def fit(model, path, epochs=10, lr=1e-2, train=None, **kwargs):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    keras_model = KerasModel(model, optimizer=optimizer)
    settings = {"val_data": DataLoader(rows(4, seed=1), batch_size=2), "plot": False, "cpu": True} | kwargs
    train = train or DataLoader(rows(8), batch_size=2)
    return keras_model.fit(train, epochs=epochs, ckpt_path=path, mixed_precision="no", **settings)


# --- the schedule


def test_schedule_fits_the_run():
    config = adalora_config(120, PROJECTIONS)
    assert (config.tinit, config.tfinal, config.deltaT, config.total_step) == (12, 36, 3, 120)
    assert (config.init_r, config.target_r) == (12, 8)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(total_steps=9), "too few"),
        (dict(total_steps=100, init_r=8, target_r=8), "LoraConfig"),
        (dict(total_steps=100, target_r=0), "0 < target_r"),
        (dict(total_steps=100, tinit=60, tfinal=40), "leaves 0 for shrinking"),
        (dict(total_steps=100, tfinal=0), "tfinal >= 1"),
        (dict(total_steps=100, r=32), "init_r"),
    ],
)
def test_impossible_schedules_are_refused(settings, words):
    with pytest.raises(ChatmagicError, match=words):
        adalora_config(target_modules=PROJECTIONS, **settings)


def test_linear_names():
    model = tiny_llama()
    assert find_all_linear_names(model) == PROJECTIONS
    with pytest.raises(ChatmagicError, match="already carries an adapter"):
        find_all_linear_names(get_peft_model(model, LoraConfig(target_modules=PROJECTIONS)))


@pytest.mark.parametrize("linear", ["Linear4bit", "Linear8bitLt"])
def test_linear_names_of_quantised_models(linear):
    import bitsandbytes as bnb

    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp.up_proj = getattr(bnb.nn, linear)(32, 64)
    assert find_all_linear_names(model) == PROJECTIONS


# --- ranks and penalty, PEFT's own as the reference


def peft_losses(model, batch, steps, lr=1e-2):
    """The loop of PEFT's documentation: the loss of each step, penalty included."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    model.train()
    losses = []
    for step in range(steps):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([param for param in model.parameters() if param.requires_grad], 1.0)
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_a_run_is_pefts_own(tmp_path):
    """Losses with penalty, budget and kept triplets of 40 steps are those of PEFT's eager loop."""
    ours, theirs = adalora(), adalora()
    data = DataLoader(rows(8), batch_size=8)
    history = fit(ours, tmp_path, epochs=40, patience=40, train=data, val_data=None, monitor="train_loss")
    expected = peft_losses(theirs, next(iter(data)), 40)
    assert expected[-1] < expected[0] - 0.5
    torch.testing.assert_close(
        (history.train_loss + history.train_penalty).tolist(), expected, rtol=1e-4, atol=1e-4
    )
    pattern = theirs.peft_config["default"].rank_pattern
    assert ours.peft_config["default"].rank_pattern == pattern
    assert history.rank_budget.iloc[0] == 6 * 14
    assert history.rank_budget.iloc[-1] == 3 * 14 == sum(map(sum, pattern.values()))


def test_validation_reports_cross_entropy_alone(tmp_path):
    model = adalora()
    history = fit(model, tmp_path, epochs=10, patience=10)
    batch = next(iter(DataLoader(rows(4, seed=1), batch_size=4)))
    assert (history.val_penalty > 0.01).all()
    best = history.val_loss[7:].min()  # the ranks are final in the eighth epoch
    loss_with_penalty = model(**batch).loss.item()
    penalty = rank_allocator(model).penalty(add_gradients=False).item()
    assert best == pytest.approx(loss_with_penalty - penalty, abs=1e-4)
