"""An adapter that was trained over NF4, and PEFT's own merge of it with what it was trained on."""

from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model

from chatmagic import find_all_linear_names, load_model
from chatmagic.training.states import save_adapter


def trained_over_nf4(folder: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Save an adapter with random factors on half of the kinds of layers of the model in `folder`, in NF4, as a run
    saves it. Returns the tensors, in bfloat16, of PEFT's merge with the numbers that bitsandbytes' layers hold."""
    torch.manual_seed(0)
    model, _ = load_model(folder, quantize="nf4", dtype="bfloat16")
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, Linear4bit)]
    held = {f"{name}.weight": dequantize_4bit(layer.weight.data, layer.weight.quant_state) for name, layer in layers}
    names = find_all_linear_names(model)[::2]
    settings = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 16, "init_lora_weights": False}
    save_adapter(get_peft_model(model, LoraConfig(target_modules=names, **settings)), adapter)
    plain, _ = load_model(folder, dtype="bfloat16")
    assert len(held) > 3 and not plain.load_state_dict(held, strict=False).unexpected_keys
    return PeftModel.from_pretrained(plain, adapter).merge_and_unload().state_dict()
