"""What transformers 5 writes of a model, for those who know neither its `rope_parameters` nor its `TokenizersBackend`:
transformers 4, and what reads a model through that; vLLM and llama.cpp's converter.
"""

import json
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..files import write
from .checkpoint import read_json

GEMMA_3 = ("gemma3_text", "gemma3n_text")  # whose kinds of layers have positions of their own there, too


def make_portable(folder: Path) -> None:
    """Add to the settings in a folder what others look for; transformers 5 reads the same model as before."""
    config = read_json(folder / "config.json")
    for part in (config, config.get("text_config") or {}):
        part.update(_by_older_names(part))
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.get("model_type", ""))
    if model_class and not config.get("architectures"):  # by which vLLM and the converter know a model
        config["architectures"] = [model_class]
    tokenizer = read_json(folder / "tokenizer_config.json")
    if tokenizer.get("tokenizer_class") == "TokenizersBackend":
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"  # 5 knows it by that name, too
    for name, settings in {"config.json": config, "tokenizer_config.json": tokenizer}.items():
        if settings != read_json(folder / name):
            write(folder / name, json.dumps(settings, ensure_ascii=False, indent=2))


def _by_older_names(part: dict[str, Any]) -> dict[str, Any]:
    """Settings of a model by the names that transformers 4 (4.57, each configuration_*.py) reads them by."""
    rotary, told = part.get("rope_parameters") or {}, {}
    if part.get("model_type") in GEMMA_3 and "sliding_attention" in rotary:
        told["rope_local_base_freq"] = rotary["sliding_attention"]["rope_theta"]
        rotary = rotary["full_attention"]
    if "rope_theta" in rotary:  # and not one for each kind of layer
        outside = {name: rotary[name] for name in ("rope_theta", "partial_rotary_factor") if name in rotary}
        scaling = {name: value for name, value in rotary.items() if name not in outside}
        if part.get("model_type") == "phi3":  # takes no more than these three, and turns all where nothing is said
            scaling = {"type": rotary["rope_type"]} | {
                name: rotary.get(name) for name in ("short_factor", "long_factor")
            }
            outside = {name: value for name, value in outside.items() if value != 1}
        told |= outside
        if rotary.get("rope_type", "default") != "default":
            told["rope_scaling"] = scaling
    if "num_local_experts" in part:  # Qwen3's; Mixtral's is called so there, too
        told["num_experts"] = part["num_local_experts"]
    return told
