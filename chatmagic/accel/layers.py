"""Forwards for the layers of a model with an adapter, in fewer passes over activations, equal up to rounding.

PEFT (`peft/tuners/adalora/layer.py` and `bnb.py`) casts the input to float32 and back under autocast, and scales and
adds the layer's output in three passes; here the scale goes into the few columns between A and B, and the product
with B adds to the output at once. `benchmarks/train_step.py` and `train_step_embedded.py` measure it.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from math import inf

import torch
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel
from peft.tuners.adalora.layer import AdaLoraLayer
from torch.nn.functional import dropout, linear, pad, rms_norm
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ..models.parts import activations, free_memory
from ..models.quantize import linears_4bit
from .attention import ROWS, attending_by
from .patched import patched, same_code


@contextmanager
def fast_layers(model: PeftModel) -> Iterator[None]:
    """For a while, give every AdaLoRA layer on a linear layer, quantised or not, the forward below; on a GPU every
    RMSNorm of Llama's code the one of a single kernel; where the GPU has memory to spare, every 4-bit layer its weight
    dequantised once, not twice a step; and on the CPU the attention that takes batches without their padding."""
    changes = []
    for layer in model.modules():
        if isinstance(layer, AdaLoraLayer) and isinstance(layer.get_base_layer(), torch.nn.Linear):
            (name,) = layer.active_adapters
            scale = layer.scaling[name] / (layer.ranknum[name].item() + 1e-5)
            changes += [(layer, "update_scale", scale), (layer, "forward", partial(forward, layer))]
        elif same_code(layer.forward, LlamaRMSNorm.forward) and layer.weight.is_cuda:
            changes.append((layer, "forward", partial(normalise, layer)))
    four_bit = list(linears_4bit(model))
    size = 2 * sum(layer.in_features * layer.out_features for layer in four_bit)
    if size and (free := free_memory(model)) and size + activations(model) < free:
        for layer in four_bit:
            weight = dequantize_4bit(layer.weight, layer.weight.quant_state)
            changes.append((layer, "forward", partial(linear, weight=weight, bias=layer.bias)))
    with ExitStack() as stack:
        stack.enter_context(patched(changes))
        if why_padded(model) is None:
            stack.enter_context(attending_by(ROWS, model.get_base_model()))
        yield


def forward(layer: AdaLoraLayer, x: torch.Tensor) -> torch.Tensor:
    """An AdaLoRA layer's output for x, (..., in): that of the layer below it, and B(A·x·E) x scale / ranks."""
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


def factors(layer: AdaLoraLayer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A (rank, in), B (out, rank) and E (rank,), by which the update is scaled too."""
    (name,) = layer.active_adapters
    return layer.lora_A[name], layer.lora_B[name], layer.lora_E[name].squeeze(1) * layer.update_scale


RANK_SIDES = ((0, 0, 0, 1), (0, 1), (0, 1))
"""Where torch's pad makes the rank of A, of B and of E larger by one."""


def gathered(model: PeftModel, dtype: torch.dtype) -> AbstractContextManager[None]:
    """A context in which the factors of all layers are cast at once, instead of each by itself at each pass. Gradients
    reach the parameters."""
    layers = [layer for layer in model.modules() if "update_scale" in vars(layer)]
    kinds = zip(*map(factors, layers))  # all A, all B, all E
    cast = [cast_together(kind, dtype, side) for kind, side in zip(kinds, RANK_SIDES)]
    return patched((layer, "gathered", its_factors) for layer, its_factors in zip(layers, zip(*cast)))


def cast_together(tensors: tuple[torch.Tensor, ...], dtype: torch.dtype, rank_side: tuple) -> list[torch.Tensor]:
    """Factors of one kind in another dtype, cast in one tensor a shape; their rank, the least of their sizes, padded
    with zeros to a multiple of 8, as tensor cores take it."""
    by_shape, result = {}, list(tensors)
    for index, tensor in enumerate(tensors):
        by_shape.setdefault(tensor.shape, []).append(index)
    for shape, indices in by_shape.items():
        stacked = torch.stack([tensors[index] for index in indices]).to(dtype)
        missing = -min(shape) % 8
        for index, tensor in zip(indices, pad(stacked, [missing * side for side in rank_side]).unbind()):
            result[index] = tensor
    return result


# Where the tests compare; elsewhere a state or a window may run through all rows.
FLATTENED = """
    ernie4_5 glm glm4 hunyuan_v1_dense internlm3 llama mistral mixtral phi3 qwen2 qwen3 qwen3_moe smollm3
""".split()


def why_padded(model: PeftModel) -> str | None:
    """What keeps the rows of a batch from being laid one after another, without their padding; None if nothing does.

    It is for the CPU, where a product takes as long as it has rows, and for models that look their attention up by
    name, and do so once: a backward that recomputes it would find the plain one.
    """
    base = model.get_base_model()
    if not isinstance(base, PreTrainedModel) or base.device.type != "cpu":
        return "that is for models of transformers on the CPU"
    config = base.config.get_text_config()
    window = getattr(config, "sliding_window", None) or inf
    reasons = {
        f"nobody has compared a {config.model_type} without": config.model_type not in FLATTENED,
        f"its attention is {config._attn_implementation}, not sdpa": config._attn_implementation != "sdpa",
        f"it attends to windows of {window} tokens": window < config.max_position_embeddings,
        "activations are recomputed to save memory": any(
            getattr(module, "gradient_checkpointing", False) for module in base.modules()
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def takes_rows(model: PeftModel) -> bool:
    """Whether `fast_layers` has made the model one that `flattened` batches are for."""
    return model.get_base_model().config._attn_implementation == ROWS


def flattened(inputs: dict) -> tuple[dict, torch.Tensor]:
    """A padded batch as one row without padding, and where in it a (row, column) of the batch is, int64 (batch,
    length). Each row attends to itself alone, as with transformers' DataCollatorWithFlattening."""
    there = inputs["attention_mask"].bool()
    lengths = there.sum(1).tolist()
    future = torch.full((max(lengths), max(lengths)), -torch.inf).triu(1)
    one = {
        "input_ids": inputs["input_ids"][there][None],
        "position_ids": (there.cumsum(1) - 1)[there][None],
        "attention_mask": there[:1, None, None, :1],  # of four dimensions: taken as it is, and not read
        "rows": (lengths, future),
    }
    return one, (there.flatten().cumsum(0) - 1).view(there.shape)


def normalise(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A LlamaRMSNorm's output for x, (..., size), in the dtype of x, by torch's one kernel."""
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
