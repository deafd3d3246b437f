"""What a run takes from its machine: the precision that it has, the memory that is free."""

import pytest
import torch

from chatmagic.training import runtime
from chatmagic.training.runtime import best_precision, prepare
from tiny_runs import tiny_llama


@pytest.mark.parametrize("gib, lean", [(0, False), (7, True), (40, False)])
def test_activations_are_recomputed_where_memory_is_short(monkeypatch, capsys, gib, lean):
    """Of a model as large as Baichuan2-7B; without a GPU there is nothing to be short of."""
    model = tiny_llama()
    model.config.num_hidden_layers, model.config.hidden_size = 32, 4096
    monkeypatch.setattr(runtime, "free_memory", lambda model: gib * 2**30)
    assert prepare(model) is lean
    assert not any(param.requires_grad for param in model.parameters())
    assert all(layer.gradient_checkpointing is lean for layer in model.model.layers)
    assert ("7.0 GiB of GPU memory are free" in capsys.readouterr().out) is lean


@pytest.mark.parametrize("capability, precision", [((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16")])
def test_precision_of_a_gpu(monkeypatch, capability, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert best_precision() == precision
    assert best_precision(model_type="gemma3_text") == precision.replace("fp16", "no")


@pytest.mark.parametrize("flag, precision", [("avx512_bf16", "bf16"), ("amx_bf16", "bf16"), ("avx2", "no")])
def test_precision_of_a_cpu(monkeypatch, flag, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {flag: True}, raising=False)
    assert best_precision(cpu=True) == precision
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as in PyTorch 2.6
    assert best_precision(cpu=True) == "no"
