"""Forwards for the layers of a model with an adapter, in fewer passes over activations, equal up to rounding.

PEFT (`peft/tuners/adalora/layer.py` and `bnb.py`) casts the input to float32 and back under autocast, and scales and
adds the layer's output in three passes; here the scale goes into the few columns between A and B, and the product
with B adds to the output at once. `benchmarks/train_step.py` and `train_step_embedded.py` measure it.
"""

from contextlib import contextmanager
from functools import partial

import torch
from bitsandbytes.functional import dequantize_4bit
from peft.tuners.adalora.layer import AdaLoraLayer
from torch.nn.functional import dropout, linear, pad, rms_norm
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..models.parts import activations, free_memory
from ..models.quantize import linears_4bit


@contextmanager
def fast_layers(model):
    """For a while, give every AdaLoRA layer on a linear layer, quantised or not, the forward below; on a GPU every
    RMSNorm the one of a single kernel; and where the GPU has memory to spare, every 4-bit layer its weight
    dequantised once, not twice a step."""
    changed = {}
    for layer in model.modules():
        if isinstance(layer, AdaLoraLayer) and isinstance(layer.get_base_layer(), torch.nn.Linear):
            (name,) = layer.active_adapters
            layer.update_scale = layer.scaling[name] / (layer.ranknum[name].item() + 1e-5)
            changed[layer] = partial(forward, layer)
        elif type(layer).__name__.endswith("RMSNorm") and hasattr(layer, "variance_epsilon") and layer.weight.is_cuda:
            changed[layer] = partial(normalise, layer)
    four_bit = list(linears_4bit(model))
    size = 2 * sum(layer.in_features * layer.out_features for layer in four_bit)
    if size and (free := free_memory(model)) and size + activations(model) < free:
        for layer in four_bit:
            weight = dequantize_4bit(layer.weight, layer.weight.quant_state)
            changed[layer] = partial(linear, weight=weight, bias=layer.bias)
    for layer, function in changed.items():
        layer.forward = function
    try:
        yield
    finally:
        for layer in changed:
            del layer.forward
            vars(layer).pop("update_scale", None)


def forward(layer, x: torch.Tensor) -> torch.Tensor:
    if layer.disable_adapters:
        return layer.base_layer(x)
    A, B, E = vars(layer).get("gathered") or factors(layer)
    base, rows = layer.base_layer, x.flatten(0, -2)
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else A.dtype
    kept = rows
    if layer.training and (p := getattr(layer.lora_dropout[layer.active_adapters[0]], "p", 0)):
        kept = drop(rows, p)
    narrow, B = linear(kept.to(dtype), A) * E.to(dtype), B.to(dtype)
    hooked = "forward" in vars(base) or base._forward_hooks or base._forward_pre_hooks  # as where weights are offloaded
    if type(base) is torch.nn.Linear and base.bias is None and base.weight.dtype == rows.dtype == dtype and not hooked:
        # In this order the sum is rounded once. Added to a rounded product, an update below half of its last place
        # would be lost: at first, that is most of them.
        result = linear(narrow, B).addmm_(rows, base.weight.t())
    elif (result := base(rows)).dtype == dtype:
        result = result.addmm_(narrow, B.t())
    else:
        result = result + linear(narrow, B).to(result.dtype)
    return result.unflatten(0, x.shape[:-1])


def factors(layer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A (rank, in), B (out, rank) and E (rank,), by which the update is scaled too."""
    (name,) = layer.active_adapters
    return layer.lora_A[name], layer.lora_B[name], layer.lora_E[name].squeeze(1) * layer.update_scale


@contextmanager
def gathered(model, dtype: torch.dtype):
    """For a while, cast the factors of all layers at once, in one tensor a shape, instead of each by itself at each
    pass; their ranks padded with zeros to a multiple of 8, as tensor cores take them. Gradients reach the
    parameters."""
    layers = [layer for layer in model.modules() if "update_scale" in vars(layer)]
    for layer in layers:
        layer.gathered = []
    for padding, which in zip(((0, 0, 0, 1), (0, 1), (0, 1)), zip(*map(factors, layers))):  # all A, then B, then E
        groups = {}
        for layer, factor in zip(layers, which):
            groups.setdefault(factor.shape, []).append((layer, factor))
        for shape, group in groups.items():
            stacked = torch.stack([factor for _, factor in group]).to(dtype)
            missing = -min(shape) % 8  # the rank is the least of a factor's sizes
            for (layer, _), factor in zip(group, pad(stacked, [missing * side for side in padding]).unbind()):
                layer.gathered.append(factor)
    try:
        yield
    finally:
        for layer in layers:
            del layer.gathered


FLATTENED = ("glm", "llama", "qwen2")  # where the tests compare; elsewhere a state or a window may run through all rows


def may_be_flattened(model, inputs: dict) -> bool:
    """On the CPU, where a product takes as long as it has rows, for models that look their attention up by name, and do
    so once: a backward that recomputes it would find the plain one."""
    base = model.get_base_model()
    return (
        "attention_mask" in inputs
        and base.device.type == "cpu"
        and base.config.model_type in FLATTENED
        and base.config._attn_implementation == "sdpa"
        and not getattr(base.config, "sliding_window", None)
        and not any(getattr(module, "gradient_checkpointing", False) for module in base.modules())
    )


@contextmanager
def flattened(inputs: dict):
    """For a forward: a padded batch as one row without padding, and where in it a (row, column) of the batch is, int64
    (batch, length). Each row attends to itself alone, as with transformers' DataCollatorWithFlattening."""
    there = inputs["attention_mask"].bool()
    one = {
        "input_ids": inputs["input_ids"][there][None],
        "position_ids": (there.cumsum(1) - 1)[there][None],
        "attention_mask": there[:1, None, None, :1],  # of four dimensions: taken as it is, and not read below
    }
    lengths = there.sum(1).tolist()
    future = torch.full((max(lengths), max(lengths)), -torch.inf).triu(1)

    def attention(module, query, key, value, mask, scaling, dropout=0.0, **options):
        rows = zip(*(each[0].split(lengths, dim=1) for each in (query * scaling, key, value)))
        return torch.cat([attend(*row, future.to(query.dtype), dropout) for row in rows])[None], None

    plain, ALL_ATTENTION_FUNCTIONS["sdpa"] = ALL_ATTENTION_FUNCTIONS["sdpa"], attention
    try:
        yield one, (there.flatten().cumsum(0) - 1).view(there.shape)
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = plain


def attend(query, key, value, future, dropout_p: float) -> torch.Tensor:
    """Causal attention of n tokens, (n, heads, size), from query (heads, n, size) and key and value (fewer heads, n,
    size). torch's flash attention takes twice the time on the CPU, most of it in its backward; its plain one looks for
    rows that see nothing, and copies the keys for each head of a group."""
    heads, n, size = query.shape
    scores = query.reshape(len(key), -1, size) @ key.mT
    weights = (scores.view(heads, n, n) + future[:n, :n]).softmax(-1)
    if dropout_p:
        weights = dropout(weights, dropout_p)
    return (weights.view(len(key), -1, n) @ value).view(heads, n, size).transpose(0, 1)


def normalise(layer, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return rms_norm(x, layer.weight.shape, layer.weight.to(x.dtype), layer.variance_epsilon)


def drop(x: torch.Tensor, p: float) -> torch.Tensor:
    """Dropout. On the CPU, where torch draws a number an element, a random byte decides: p in steps of 1/256."""
    if x.device.type != "cpu":
        return dropout(x, p)
    words = torch.randint(-(2**63), 2**63 - 1, (x.numel() // 8 + 1,))
    dropped = round(256 * p)
    keep = words.view(torch.uint8)[: x.numel()].view(x.shape) >= dropped
    return x * keep.to(x.dtype).mul_(256 / (256 - dropped))
