"""What transformers 5 writes of a model, for those who know neither its `rope_parameters` nor its `TokenizersBackend`:
transformers 4, and what reads a model through that; vLLM and llama.cpp's converter.
"""

import json
from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..files import write
from .checkpoint import read_json


def make_portable(folder: Path) -> None:
    """Add to the settings in a folder what others look for; transformers 5 reads the same model as before."""
    config = read_json(folder / "config.json")
    for part in (config, config.get("text_config") or {}):
        rotary = part.get("rope_parameters") or {}
        if "rope_theta" in rotary:  # and not one for each kind of layer
            part["rope_theta"] = rotary["rope_theta"]
            if rotary.get("rope_type", "default") != "default":
                part["rope_scaling"] = {name: value for name, value in rotary.items() if name != "rope_theta"}
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.get("model_type", ""))
    if model_class and not config.get("architectures"):  # by which vLLM and the converter know a model
        config["architectures"] = [model_class]
    tokenizer = read_json(folder / "tokenizer_config.json")
    if tokenizer.get("tokenizer_class") == "TokenizersBackend":
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"  # 5 knows it by that name, too
    for name, settings in {"config.json": config, "tokenizer_config.json": tokenizer}.items():
        if settings != read_json(folder / name):
            write(folder / name, json.dumps(settings, ensure_ascii=False, indent=2))
