"""bitsandbytes: the two quantisations of the course, and the one place where it is put right."""

import functools
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit
    from transformers import BitsAndBytesConfig

# On its import on some CPUs it warns that an optional kernel of the hub was not found (bitsandbytes issue 2064), at
# each int8 product that the input is cast to float16.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def quantization_config(quantize: str, compute_dtype: "torch.dtype") -> "BitsAndBytesConfig":
    """transformers' BitsAndBytesConfig for "nf4" (4 bit, double quantisation: QLoRA, arXiv:2305.14314) or for
    "int8" (arXiv:2208.07339). `compute_dtype` is the torch dtype in which 4-bit layers multiply."""
    from transformers import BitsAndBytesConfig

    mend_bitsandbytes()
    if quantize == "int8":
        mend_adalora_over_int8()
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def as_in_nf4(weight: "torch.Tensor") -> "torch.Tensor":
    """What NF4 leaves of a weight, in the weight's own dtype: what a layer computes with that was loaded so."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    return dequantize_4bit(*quantize_4bit(weight.contiguous(), compress_statistics=True, quant_type="nf4"))


def names_in_nf4(model: "torch.nn.Module") -> list[str]:
    """The names of a model's weights in NF4, without what an adapter adds to them."""
    from bitsandbytes.nn import Linear4bit

    return [
        f"{name.removesuffix('.base_layer')}.weight"
        for name, layer in model.named_modules()
        if isinstance(layer, Linear4bit) and layer.weight.quant_type == "nf4"
    ]


@functools.cache
def mend_bitsandbytes() -> None:
    """Let a 4-bit model on the CPU be saved and trained after use.

    On CPUs with AVX-512 BF16 the first forward in evaluation rearranges each 4-bit weight for a kernel that
    has no backward, and rounds its scales to bfloat16 (bitsandbytes pull request 1804; still so in 0.50.2).
    From then on gradients stop at every such layer, with no error, and `save_pretrained` writes scales that
    were quantised twice; shapes that the kernel does not know fail. Here the original scales, a 64th of the
    weights, are kept aside, so that the way back is exact; a layer goes back whenever it is trained; odd
    shapes stay as they are.
    """
    from bitsandbytes.nn import Linear4bit, modules

    pack, unpack = modules._convert_weight_packed_for_cpu, modules._convert_weight_packed_for_cpu_inverse
    forward = Linear4bit.forward

    def pack_keeping_scales(
        weight: "torch.Tensor", state: "QuantState", *args: Any
    ) -> "tuple[torch.Tensor, QuantState]":
        original = dict(vars(state))
        weight, state = pack(weight, state, *args)
        state.before_packing = original
        return weight, state

    def unpack_exactly(weight: "torch.Tensor", state: "QuantState", *args: Any) -> "tuple[torch.Tensor, QuantState]":
        original = state.before_packing
        weight, state = unpack(weight, state, *args)
        vars(state).clear()
        vars(state).update(original)
        return weight, state

    @functools.wraps(forward)
    def forward_unpacked_in_training(self: "Linear4bit", x: "torch.Tensor") -> "torch.Tensor":
        state = self.weight.quant_state
        if state.shape[0] % 32 or state.shape[1] % state.blocksize:
            self.support_avx512bf16_for_cpu = False
        if getattr(state, "packing_format_for_cpu", False) and (self.training or x.requires_grad):
            self.weight.data, _ = unpack_exactly(self.weight.data, state)
        return forward(self, x)

    modules._convert_weight_packed_for_cpu = pack_keeping_scales
    modules._convert_weight_packed_for_cpu_inverse = unpack_exactly
    Linear4bit.forward = forward_unpacked_in_training


@functools.cache
def mend_adalora_over_int8() -> None:
    """Let a model in int8 with AdaLoRA answer in 16 bits.

    Outside of autocast PEFT's layer casts its product to the base layer's dtype and divides by `ranknum` afterwards,
    which is float32, and so is the sum (`SVDLinear8bitLt.forward` in `peft/tuners/adalora/bnb.py`, 0.21; the 4-bit
    layer adds in place): the head then fails on two dtypes. No issue upstream.
    """
    import torch
    from peft.tuners.adalora.bnb import SVDLinear8bitLt

    forward = SVDLinear8bitLt.forward

    @functools.wraps(forward)
    def forward_in_its_dtype(self: SVDLinear8bitLt, x: torch.Tensor) -> torch.Tensor:
        result = forward(self, x)
        return result if torch.is_autocast_enabled(x.device.type) else result.to(x.dtype)

    SVDLinear8bitLt.forward = forward_in_its_dtype


def linears_4bit(model: "torch.nn.Module") -> "Iterator[Linear4bit]":
    """The 4-bit layers of a model, by bitsandbytes."""
    from bitsandbytes.nn import Linear4bit

    return (module for module in model.modules() if isinstance(module, Linear4bit))


def packed_for_inference(model: "torch.nn.Module") -> bool:
    """Whether bitsandbytes has repacked 4-bit weights for its CPU inference kernel, which has no backward."""
    states = (getattr(module.weight, "quant_state", None) for module in linears_4bit(model))
    return any(getattr(state, "packing_format_for_cpu", False) for state in states)


def never_packed(model: "torch.nn.Module") -> None:
    """Keep bitsandbytes from that during validation: it repacks at the first forward in evaluation mode.

    (`Linear4bit.forward`; it would go on training with gradients that stop at every such layer, in silence.)
    """
    for module in linears_4bit(model):
        module.train()
