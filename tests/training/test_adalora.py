"""AdaLoRA's schedule; its ranks and penalty against PEFT's own."""

import pytest
import torch

from architectures import published
from chatmagic import ChatmagicError
from chatmagic.models.parts import trainable
from chatmagic.training import adalora_config, adapter_config, find_all_linear_names
from chatmagic.training.adalora import importance_table, rank_table
from chatmagic.training.plots import plot_importance, plot_ranks
from tiny_runs import LAYERS, PROJECTIONS, adalora, fit, loader, lora, rows, tiny_llama

# --- the schedule


def test_schedule_fits_the_run():
    config = adalora_config(120, PROJECTIONS)
    assert (config.tinit, config.tfinal, config.deltaT, config.total_step) == (12, 36, 3, 120)
    assert (config.init_r, config.target_r) == (12, 8)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"total_steps": 9}, "too few"),
        ({"total_steps": 100, "init_r": 8, "target_r": 8}, "LoraConfig"),
        ({"total_steps": 100, "target_r": 0}, "0 < target_r"),
        ({"total_steps": 100, "tinit": 60, "tfinal": 40}, "leaves 0 for shrinking"),
        ({"total_steps": 100, "tfinal": 0}, "tfinal >= 1"),
        ({"total_steps": 100, "deltaT": 0}, "deltaT >= 1"),
        ({"total_steps": 100, "r": 32}, "init_r"),
        ({"total_steps": "100"}, "total_steps='100' is no whole number"),
        ({"total_steps": 100, "init_r": 12.0}, "init_r=12.0 is no whole number"),
        (
            {"total_steps": 100, "use_dora": True},
            "PEFT makes no AdaLoraConfig of these settings.*does not support DoRA",
        ),
        ({"total_steps": 100, "lora_alfa": 8}, "PEFT makes no AdaLoraConfig of these settings.*lora_alfa"),
    ],
)
def test_impossible_schedules_are_refused(settings, words):
    with pytest.raises(ChatmagicError, match=words):
        adalora_config(target_modules=PROJECTIONS, **settings)


def test_the_method_is_one_word():
    sizes = {"init_r": 6, "target_r": 3, "lora_alpha": 16}
    config = adapter_config("adalora", 120, PROJECTIONS, **sizes)
    assert config.to_dict() == adalora_config(120, PROJECTIONS, **sizes).to_dict()
    config = adapter_config("lora", 4, PROJECTIONS, **sizes, lora_dropout=0.1)
    assert (config.peft_type, config.r, config.lora_alpha, config.lora_dropout) == ("LORA", 3, 16, 0.1)
    with pytest.raises(ChatmagicError, match="method='adlora' is neither .*did you mean 'adalora'"):
        adapter_config("adlora", 120, PROJECTIONS)
    with pytest.raises(ChatmagicError, match="target_r=0: a LoRA adapter's rank is 1 or more"):
        adapter_config("lora", 4, PROJECTIONS, target_r=0)
    with pytest.raises(ChatmagicError, match="PEFT makes no LoraConfig of these settings.*lora_alfa"):
        adapter_config("lora", 4, PROJECTIONS, lora_alfa=8)


def test_lora_has_no_ranks_to_show():
    model = lora()
    with pytest.raises(ChatmagicError, match="keeps rank 3: only AdaLoRA"):
        plot_ranks(model)
    with pytest.raises(ChatmagicError, match="only AdaLoRA does"):
        plot_importance(model)


def test_names_of_a_mixture_and_of_a_scan_that_pefts_layers_would_miss():
    """PEFT takes `gate_proj` of a mixture for the experts', and a Mamba's kernel goes past an adapter on `out_proj`."""
    assert find_all_linear_names(published("mixtral", 64)) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    names = find_all_linear_names(published("glm4_moe_lite", 64))
    assert "q_a_proj" in names and not {"gate_proj", "up_proj", "down_proj"} & {*names}
    assert "in_proj" in (names := find_all_linear_names(published("falcon_h1", 64))) and "out_proj" not in names
    assert "out_proj" in find_all_linear_names(published("lfm2", 64))


def test_linear_names():
    assert find_all_linear_names(tiny_llama()) == PROJECTIONS
    with pytest.raises(ChatmagicError, match="already carries an adapter"):
        find_all_linear_names(lora())


# --- ranks and penalty, PEFT's own as the reference


def peft_losses(model, batch, steps, lr=1e-2):
    """The loop of PEFT's documentation: the loss of each step, penalty included."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    model.train()
    losses = []
    for step in range(steps):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([param for _, param in trainable(model)], 1.0)
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
def test_a_run_is_pefts_own(tmp_path):
    """Losses with penalty, budget and kept triplets of 40 steps are those of PEFT's eager loop."""
    ours, theirs = adalora(), adalora()
    data = loader(rows(8), batch_size=8)
    history = fit(ours, tmp_path, epochs=40, train=data)
    expected = peft_losses(theirs, next(iter(data)), 40)
    assert expected[-1] < expected[0] - 0.5
    torch.testing.assert_close((history.train_loss + history.train_penalty).tolist(), expected, rtol=1e-4, atol=1e-4)
    pattern = theirs.peft_config["default"].rank_pattern
    assert ours.peft_config["default"].rank_pattern == pattern
    assert history.rank_budget.iloc[0] == 6 * LAYERS
    assert history.rank_budget.iloc[-1] == 3 * LAYERS == sum(map(sum, pattern.values()))


def test_ranks_and_importance_can_be_read(tmp_path):
    model = adalora()
    fit(model, tmp_path)
    ranks = rank_table(model.peft_config["default"])
    assert list(ranks.index) == [0, 1] and sorted(ranks.columns) == PROJECTIONS
    assert ranks.to_numpy().sum() == 3 * LAYERS
    kept = model.base_model.model.model.layers[1].self_attn.o_proj.lora_E["default"].count_nonzero()
    assert ranks.loc[1, "o_proj"] == kept
    importance = importance_table(model)
    assert list(importance.index) == list(range(5, 29))  # after tinit=4, to total_step - tfinal
    assert set(importance.columns) == {f"{layer}.{name}" for layer in (0, 1) for name in PROJECTIONS}
    assert (importance > 0).all(axis=None)
