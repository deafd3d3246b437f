"""An adapter's files, as PEFT saves them: its settings, and what it adds to each layer.

The arithmetic is PEFT's, operation for operation (`peft/tuners/lora/layer.py` and `peft/tuners/adalora/layer.py`).
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ..errors import ChatmagicError
from .checkpoint import first_not_finite, open_file, read_json

FACTORS = ("adapter_model.safetensors", "adapter_model.bin")
# The settings of an adapter that a merge reads, or that concern training alone. Any other of PEFT's that is set changes
# what the layer computes (DoRA, aLoRA, ...) and is refused; what PEFT does not know it ignores, and so does a merge.
KNOWN_SETTINGS = """
    peft_type task_type base_model_name_or_path revision peft_version auto_mapping inference_mode bias r
    lora_alpha lora_dropout target_modules exclude_modules layers_to_transform layers_pattern rank_pattern
    alpha_pattern use_rslora fan_in_fan_out init_lora_weights megatron_core qalora_group_size eva_config
    init_r target_r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step
"""
# What PEFT takes where a setting is missing.
DEFAULTS = {"r": 8, "lora_alpha": 8, "fan_in_fan_out": False, "init_r": 12}
# What a setting that a merge reads must be, besides missing or null.
NUMBERS, SWITCHES, PATTERNS = ("r", "lora_alpha", "init_r"), ("use_rslora", "fan_in_fan_out"), ("alpha_pattern",)


class MergeError(ChatmagicError):
    """An adapter and a base that cannot be merged. Nothing was written."""


@dataclass
class Update:
    """What an adapter adds to one linear layer: `B @ (A * E) * scale / divisor`.

    A: (rank, in_features), B: (out_features, rank), E: (rank, 1), divisor: (1,), all float32. In LoRA, E and the
    divisor are one.
    """

    A: torch.Tensor
    B: torch.Tensor
    E: torch.Tensor
    scale: float
    divisor: torch.Tensor
    rounded: bool = False  # PEFT loads AdaLoRA factors with a rank pattern in the base layer's dtype
    transposed: bool = False  # the layer is a Conv1D, whose weight is (in_features, out_features)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the weight that this is for."""
        shape = (self.B.shape[0], self.A.shape[1])
        return shape[::-1] if self.transposed else shape

    def product(self, dtype: torch.dtype) -> torch.Tensor:
        """`B @ (A * E)` for a weight of this dtype: float32, of the shape of the weight."""
        A, B, E = (t.to(dtype).float() if self.rounded else t for t in (self.A, self.B, self.E))
        product = B @ (A * E)
        return product.T if self.transposed else product

    def add_to(self, weight: torch.Tensor, product: torch.Tensor) -> None:
        """Add the product, or some rows of it to the same rows of a weight, in place; `product` is used up."""
        weight += product.mul_(self.scale).div_(self.divisor)


def read_settings(adapter: Path) -> dict:
    """An adapter's settings, with PEFT's defaults. Raises MergeError if one of them makes it more than LoRA or AdaLoRA
    factors, or is not of its kind."""
    if not (adapter / "adapter_config.json").is_file() or not any((adapter / name).is_file() for name in FACTORS):
        raise MergeError(
            f"{adapter} lacks adapter_config.json or {FACTORS[0]}. Name the folder that "
            f"peft_model.save_pretrained(folder) wrote."
        )
    config = {name: v for name, v in read_json(adapter / "adapter_config.json").items() if v is not None}
    config = DEFAULTS | config
    strange = [name for name, value in config.items() if value and name not in KNOWN_SETTINGS.split()]
    if strange:
        from peft import AdaLoraConfig, LoraConfig

        known = {field.name for kind in (LoraConfig, AdaLoraConfig) for field in fields(kind)}
        strange = sorted(known & set(strange))
    init = config.get("init_lora_weights", True)
    if init not in (True, False, "gaussian", "eva", "orthogonal"):  # the others change the base as well
        strange.append(f"init_lora_weights={init}")
    kind = config.get("peft_type")
    if kind not in ("LORA", "ADALORA") or strange:
        raise MergeError(
            f"{adapter} is not plain LoRA or AdaLoRA ({kind}{''.join(f', {s}' for s in strange)}). "
            f"Merge it with PEFT: PeftModel.from_pretrained(model, {str(adapter)!r}).merge_and_unload()."
        )
    _check_settings(adapter, config)
    return config


def _check_settings(adapter: Path, config: dict) -> None:
    """Raise MergeError for a setting that is not of its kind: "false" would be true, and "16" no number."""
    kinds: dict[str, Callable[[Any], bool]] = dict.fromkeys(NUMBERS, _is_number)
    kinds |= dict.fromkeys(SWITCHES, lambda value: isinstance(value, bool))
    kinds |= dict.fromkeys(("rank_pattern", *PATTERNS), lambda value: isinstance(value, dict))
    kinds["base_model_name_or_path"] = lambda value: isinstance(value, str)
    wrong = [name for name, is_right in kinds.items() if name in config and not is_right(config[name])]
    wrong += [name for name in ("r", "init_r") if name not in wrong and config[name] <= 0]
    for name in PATTERNS if not wrong else ():
        for key, value in config.get(name, {}).items():
            try:
                re.compile(key)
            except re.error:
                wrong.append(name)
            wrong += [] if _is_number(value) else [name]
    if wrong:
        raise MergeError(
            f"{adapter / 'adapter_config.json'} has {wrong[0]} = {config[wrong[0]]!r}, which PEFT never writes. Save "
            "the adapter again, or mend the file."
        )


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def read_updates(adapter: Path) -> dict[str, Update]:
    """An adapter's updates by the name of the weight, such as `model.layers.0.mlp.up_proj.weight`.

    Raises MergeError for a folder that holds anything but whole, finite factors of linear layers.
    """
    config, layers = read_settings(adapter), {}
    for key, tensor in open_file(next(adapter / name for name in FACTORS if (adapter / name).is_file())).items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([ABE])(?:\.weight)?", key)
        if not match:
            raise MergeError(
                f"{adapter} holds {key}, which is no LoRA factor. Save it without, "
                f"peft_model.save_pretrained(folder, save_embedding_layers=False), or merge it with PEFT: "
                f"PeftModel.from_pretrained(model, {str(adapter)!r}).merge_and_unload()."
            )
        if not tensor.is_floating_point():
            raise MergeError(
                f"{adapter} holds {key} of {tensor.dtype}, which is no number to multiply by. Save it again."
            )
        layers.setdefault(match[1], {})[match[2]] = tensor.float()
    kind = config["peft_type"]
    wanted = "ABE" if kind == "ADALORA" else "AB"
    if not layers:
        raise MergeError(f"{adapter} holds no tensors: it changes nothing. Save it again, or train it.")
    for module, factors in layers.items():
        if factors.keys() != set(wanted):
            held, whole = (", ".join(f"lora_{factor}" for factor in sorted(each)) for each in (factors, wanted))
            raise MergeError(
                f"{adapter} is half an adapter: of {module} it holds {held}, and {kind} has {whole}. Save it again."
            )
        if odd := [factor for factor, tensor in factors.items() if tensor.dim() != 2]:
            raise MergeError(
                f"{adapter} holds a lora_{odd[0]} of {module} of shape {tuple(factors[odd[0]].shape)}, which is no "
                "linear layer's. Merge it with PEFT: "
                f"PeftModel.from_pretrained(model, {str(adapter)!r}).merge_and_unload()."
            )
        ranks = {factors["A"].shape[0], factors["B"].shape[-1], *(factors["E"].shape[:1] if "E" in factors else ())}
        if len(ranks) > 1:
            raise MergeError(
                f"{adapter} holds factors of {module} that do not fit: ranks {sorted(ranks)}. Save it again."
            )
    if spoilt := first_not_finite(
        {f"{name}.lora_{factor}": t for name, f in layers.items() for factor, t in f.items()}
    ):
        raise MergeError(
            f"{adapter} holds numbers that are not finite, first in {spoilt}: its training broke down. Train it again, "
            "with a lower learning rate."
        )
    make = _adalora_update if config["peft_type"] == "ADALORA" else _lora_update
    return {f"{module}.weight": make(config, module, **factors) for module, factors in layers.items()}


def _lora_update(config: dict, module: str, A: torch.Tensor, B: torch.Tensor) -> Update:
    alpha, rank = _of_layer(config, "alpha", module, "lora_alpha"), _of_layer(config, "rank", module, "r")
    _check_rank(module, len(A), rank)
    scale = alpha / (math.sqrt(len(A)) if config.get("use_rslora") else len(A))
    return Update(A, B, torch.ones(len(A), 1), scale, torch.ones(1), transposed=config["fan_in_fan_out"])


def _adalora_update(config: dict, module: str, A: torch.Tensor, B: torch.Tensor, E: torch.Tensor) -> Update:
    # The divisor is the rank that training began with, also where the rank pattern left fewer.
    divisor = torch.tensor([float(config["init_r"])]) + 1e-5
    kept = config.get("rank_pattern", {}).get(f"{module}.lora_E", [True] * len(A))
    _check_rank(module, len(A), sum(kept) if len(kept) == config["init_r"] else config["init_r"])
    scale = config["lora_alpha"] if config["lora_alpha"] > 0 else float(len(A))
    return Update(A, B, E, scale, divisor, bool(config.get("rank_pattern")), config["fan_in_fan_out"])


def _check_rank(module: str, found: int, said: int) -> None:
    """Raise MergeError unless a layer's factors are of the rank by which they are scaled."""
    if found != said:
        raise MergeError(
            f"The factors of {module} are of rank {found}, and adapter_config.json says {said}: one of the two files "
            "is of another adapter, and what they are scaled by is not known. Save it again."
        )


def _of_layer(config: dict, kind: str, module: str, otherwise: str) -> Any:
    """A setting of one layer, as PEFT's `get_pattern_key` finds it."""
    patterns = config.get(f"{kind}_pattern", {}).items()
    return next((value for key, value in patterns if re.match(rf"(.*\.)?({key})$", module)), config[otherwise])
