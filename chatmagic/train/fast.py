"""The forward of an AdaLoRA layer in fewer passes over its activations, equal to PEFT's up to rounding.

PEFT (`peft/tuners/adalora/layer.py` and `bnb.py`) casts the input to float32 and back under autocast, and scales the
layer's output twice; here the scale goes into the few columns between A and B. `benchmarks/train_step.py` measures it.
"""

from contextlib import contextmanager
from types import MethodType

import torch
from peft.tuners.adalora.layer import AdaLoraLayer
from torch.nn.functional import dropout, linear


@contextmanager
def fast_adapters(model):
    """Give every AdaLoRA layer on a linear layer, quantised or not, the forward below, for a while."""
    adapted = (layer for layer in model.modules() if isinstance(layer, AdaLoraLayer))
    layers = [layer for layer in adapted if isinstance(layer.get_base_layer(), torch.nn.Linear)]
    for layer in layers:
        layer.forward = MethodType(forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def forward(layer, x: torch.Tensor) -> torch.Tensor:
    result = layer.base_layer(x)
    if layer.disable_adapters:
        return result
    (name,) = layer.active_adapters
    A, B, E = layer.lora_A[name], layer.lora_B[name], layer.lora_E[name]
    scale = layer.scaling[name] / (layer.ranknum[name] + 1e-5)
    if not torch.is_autocast_enabled(x.device.type):
        x = x.to(A.dtype)
    if layer.training and (p := getattr(layer.lora_dropout[name], "p", 0)):
        x = drop(x, p)
    return result + linear(linear(x, A) * (E.squeeze(1) * scale), B).to(result.dtype)


def drop(x: torch.Tensor, p: float) -> torch.Tensor:
    """Dropout. On the CPU, where torch draws a number an element, a random byte decides: p in steps of 1/256."""
    if x.device.type != "cpu":
        return dropout(x, p)
    words = torch.randint(-(2**63), 2**63 - 1, (x.numel() // 8 + 1,))
    dropped = round(256 * p)
    keep = words.view(torch.uint8)[: x.numel()].view(x.shape) >= dropped
    return x * keep.to(x.dtype).mul_(256 / (256 - dropped))
