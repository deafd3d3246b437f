"""The faster forward of layers with an adapter against PEFT's own, and its dropout."""

import bitsandbytes
import pytest
import torch
from peft import AdaLoraConfig, get_peft_model

from chatmagic.train.fast import drop, fast_layers, gathered


@pytest.mark.parametrize("precision, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("linear", [torch.nn.Linear, bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt])
def test_the_fast_forward_is_pefts(linear, precision, tolerance):
    torch.manual_seed(0)
    base = torch.nn.ModuleDict({"layer": linear(64, 64, bias=True)})
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
        assert layer.forward.func.__module__ == "chatmagic.train.fast"
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


def test_dropout_by_bytes():
    x = torch.full((100, 1001), 2.0, requires_grad=True)
    torch.manual_seed(0)
    y = drop(x, 0.25)
    assert y.unique().tolist() == pytest.approx([0.0, 2 / 0.75])
    assert (y == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    y.sum().backward()
    assert torch.equal(x.grad * 2, y)
    assert not torch.equal(drop(x, 0.25), y)
