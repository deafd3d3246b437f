"""The faster forward of layers with an adapter against PEFT's own, its dropout, and batches without padding."""

import bitsandbytes
import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from architectures import published
from chatmagic import find_all_linear_names
from chatmagic.accel.attention import attend
from chatmagic.accel.layers import FLATTENED, drop, fast_layers, flattened, gathered, takes_rows, why_padded
from tiny_runs import lora


@pytest.mark.parametrize("precision, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("linear", [torch.nn.Linear, bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt])
@pytest.mark.parametrize("bias", [True, False])
def test_the_fast_forward_is_pefts(linear, bias, precision, tolerance):
    torch.manual_seed(0)
    base = torch.nn.ModuleDict({"layer": linear(64, 64, bias=bias)})
    base.is_loaded_in_4bit, base.is_loaded_in_8bit = "4bit" in linear.__name__, "8bit" in linear.__name__
    model = get_peft_model(base, AdaLoraConfig(target_modules=["layer"], init_r=6, target_r=3, total_step=10))
    layer = model.base_model.model["layer"]
    torch.nn.init.normal_(layer.lora_E["default"])
    model.to("cpu").train()  # which quantises bitsandbytes' layers
    x = torch.randn(2, 5, 64, requires_grad=True)

    def outputs():
        with torch.autocast("cpu", precision, enabled=precision is not torch.float32):
            y = layer(x)
        return y, *torch.autograd.grad(y.float().square().sum(), [x, *layer.lora_A.values(), *layer.lora_E.values()])

    expected = outputs()
    with fast_layers(model):
        assert layer.forward.func.__module__ == "chatmagic.accel.layers"
        found = outputs()
        with gathered(model, precision):
            assert [factor.shape for factor in layer.gathered] == [(8, 64), (64, 8), (8,)]
            once = outputs()
        with model.disable_adapter():
            assert torch.equal(layer(x), layer.base_layer(x))
    assert not {"forward", "update_scale", "gathered"} & vars(layer).keys()
    for ours, too, theirs in zip(found, once, expected):
        assert (ours - theirs).norm() < tolerance * theirs.norm()
        assert (too - theirs).norm() < tolerance * theirs.norm()


def test_an_update_below_half_of_the_last_place_is_not_lost():
    torch.manual_seed(0)
    base = torch.nn.ModuleDict({"layer": torch.nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)})
    torch.nn.init.constant_(base["layer"].weight, 1.0)
    model = get_peft_model(
        base, AdaLoraConfig(target_modules=["layer"], init_r=4, target_r=4, total_step=10, lora_alpha=4)
    )
    layer, x = model.base_model.model["layer"], (1 + torch.rand(4000, 64)).bfloat16()
    for factor in layer.lora_A, layer.lora_B:
        torch.nn.init.constant_(factor["default"], 1.0)
    torch.nn.init.constant_(layer.lora_E["default"], 1e-3 / 4)  # adds a thousandth, where bfloat16 has steps of 1/256
    with torch.no_grad(), fast_layers(model), torch.autocast("cpu", torch.bfloat16):
        added = layer(x).float() / (x.float().sum(1, keepdim=True)) - 1
    assert added.mean().item() == pytest.approx(1e-3, rel=0.05)


def test_hooks_of_the_base_layer_are_called():
    """accelerate's bring the weight of an offloaded layer."""
    base = torch.nn.ModuleDict({"layer": torch.nn.Linear(64, 64, bias=False)})
    model = get_peft_model(base, AdaLoraConfig(target_modules=["layer"], init_r=4, target_r=4, total_step=10))
    layer, x = model.base_model.model["layer"], torch.randn(3, 64)
    with torch.no_grad(), fast_layers(model):
        expected = layer(x)
        layer.base_layer.register_forward_hook(lambda module, args, output: output + 1)
        torch.testing.assert_close(layer(x), expected + 1)


def test_dropout_by_bytes():
    x = torch.full((100, 1001), 2.0, requires_grad=True)
    torch.manual_seed(0)
    y = drop(x, 0.25)
    assert y.unique().tolist() == pytest.approx([0.0, 2 / 0.75])
    assert (y == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    y.sum().backward()
    assert torch.equal(x.grad * 2, y)
    assert not torch.equal(drop(x, 0.25), y)


def padded(vocabulary: int) -> dict:
    torch.manual_seed(0)
    mask = (torch.arange(12) < torch.tensor([[5], [12], [8]])).long()
    return {"input_ids": torch.randint(vocabulary, mask.shape) * mask, "attention_mask": mask}


def test_a_flattened_batch_has_the_logits_of_the_padded_one(family):
    base, *_ = family
    settings = {"task_type": "CAUSAL_LM", "target_modules": find_all_linear_names(base)}
    model, inputs = get_peft_model(base, LoraConfig(**settings)).eval(), padded(base.config.vocab_size)
    there, plain = inputs["attention_mask"].bool(), ALL_ATTENTION_FUNCTIONS["sdpa"]
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
        with fast_layers(model):
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is plain
            if base.config.model_type == "baichuan_alibi":
                assert not takes_rows(model)
                return
            one, places = flattened(inputs)
            logits = model(**one, use_cache=False).logits
            as_ever = model(**inputs, use_cache=False).logits
    assert one["input_ids"].shape == (1, 25)
    assert one["position_ids"].tolist() == [[*range(5), *range(12), *range(8)]]
    torch.testing.assert_close(logits[0, places[there]], expected[there], rtol=1e-4, atol=1e-5)
    assert torch.equal(as_ever, expected) and base.config._attn_implementation == "sdpa" and not takes_rows(model)


@pytest.mark.parametrize("name", FLATTENED)
def test_a_flattened_batch_of_every_architecture_that_may_be(name):
    base = published(name, 300, sliding_window=None)
    model, inputs = get_peft_model(base, LoraConfig(target_modules=find_all_linear_names(base))).eval(), padded(300)
    with torch.no_grad(), fast_layers(model):
        one, places = flattened(inputs)
        logits = model(**one, use_cache=False).logits
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
    there = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits[0, places[there]], expected[there], rtol=1e-4, atol=1e-4)


def test_what_keeps_a_batch_as_it_is():
    model = lora()
    assert why_padded(model) is None
    reasons = {
        "model_type": ("falcon", "nobody has compared a falcon without"),
        "_attn_implementation": ("eager", "its attention is eager, not sdpa"),
        "sliding_window": (4, "it attends to windows of 4 tokens"),
    }
    for name, (value, reason) in reasons.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model.get_base_model().config, name, value, raising=False)
            assert why_padded(model) == reason
    assert why_padded(model) is None
    model.gradient_checkpointing_enable()
    assert why_padded(model) == "activations are recomputed to save memory"


def test_only_norms_of_llamas_own_code_are_replaced(monkeypatch):
    """Qwen3.5's gated one has its epsilon under the same name, and multiplies by a gate."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    for name in ("llama", "qwen3", "qwen3_5", "gemma3_text", "gpt_oss"):
        base = published(name, 300)
        model = get_peft_model(base, LoraConfig(target_modules=["o_proj"]))
        norms = [module for module in model.modules() if type(module).__name__.endswith(("RMSNorm", "RMSNormGated"))]
        with fast_layers(model):
            replaced = {type(norm).__name__ for norm in norms if "forward" in vars(norm)}
        assert replaced == {"llama": {"LlamaRMSNorm"}, "qwen3": {"Qwen3RMSNorm"}}.get(name, set())


def test_attention_of_grouped_heads():
    torch.manual_seed(0)
    query, key, value = torch.randn(4, 6, 8), torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    expected = scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.0, enable_gqa=True).transpose(
        0, 1
    )
    future = torch.full((9, 9), -torch.inf).triu(1)
    torch.testing.assert_close(attend(query, key, value, future, 0.0), expected)
    dropped = torch.stack([attend(query, key, value, future, 0.5) for _ in range(4000)])
    assert (dropped[:, 0] == 0).all(-1).float().mean() == pytest.approx(
        0.5, abs=0.03
    )  # the first token sees but itself
    assert (dropped.mean(0) - expected).abs().max() < 0.15
