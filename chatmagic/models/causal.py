"""The causal language model that transformers makes of a folder: its class, and what its tensors are called there.

Composite checkpoints, which also see or hear, are read as their language model alone: a Gemma 3 or 4 as a Qwen3.5,
which transformers reads so by itself. No tower is loaded then that text never reaches, and none gets an adapter.
"""

from collections.abc import Iterable, Set
from pathlib import Path

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from .checkpoint import CheckpointError, open_weights, read_json
from .families import find_family

# How a language model's tensors are called as a part of another model, and by themselves.
LANGUAGE_MODEL = {r"^model\.language_model\.": "model.", r"^language_model\.(model|lm_head)\.": r"\1."}


def causal_config(folder: Path) -> PreTrainedConfig:
    """The config of the causal language model in a folder. Raises CheckpointError where there is none."""
    whole = AutoConfig.from_pretrained(folder)
    text = whole.get_text_config(decoder=True)
    config = next((each for each in (text, whole) if type(each) in MODEL_FOR_CAUSAL_LM_MAPPING), None)
    if config is None:
        raise CheckpointError(f"{folder} is a {whole.model_type}, of which transformers has no causal language model.")
    if config is not whole:
        said = read_json(folder / "config.json")  # and what it says of the whole alone
        of_the_whole = said.keys() - (said.get("text_config") or {}).keys()
        for name in {"tie_word_embeddings", "quantization_config"} & of_the_whole:
            setattr(config, name, getattr(whole, name))
    return config


def without_weights(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config on the meta device: its names and shapes."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def names_on_disk(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """What each tensor of a model is called in a checkpoint that holds `stored`, by transformers' mapping for its
    class. Tensors that are put together from several there, as the experts of a layer, are left out."""
    conversions = get_model_conversion_mapping(model, LANGUAGE_MODEL)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    ours, names = model.state_dict(), {}
    for published in stored:
        name, converted = rename_source_key(published, renamings, converters, model.base_model_prefix, ours)
        if converted is None and name in ours:
            names[name] = published
    return names


def names_in_checkpoint(base: Path, names: Set[str]) -> dict[str, str]:
    """What those of a model's weights are called in its checkpoint that have another name there: above all in composite
    ones, of which the language model is a part. vLLM calls them so, too; of an adapter under other names it loads
    nothing, and says nothing (vllm-project/vllm#48019)."""
    stored, config = open_weights(base), read_json(base / "config.json")
    known = config.get("model_type") in CONFIG_MAPPING and not find_family(config, base)
    if not known or stored.keys() >= names:
        return {}
    on_disk = names_on_disk(without_weights(causal_config(base)), stored)
    return {name: on_disk[name] for name in names & on_disk.keys() if on_disk[name] != name}
