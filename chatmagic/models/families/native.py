"""What the families share: a published checkpoint as transformers would have it."""

from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from ..checkpoint import CheckpointError, Stored, read_json


class Native(NamedTuple):
    """A published checkpoint in native terms. `weights[name][...]` reads a tensor; none is read before."""

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    weights: dict
    tokenizer: PreTrainedTokenizerFast
    generation_config: GenerationConfig


def read_native(
    family: ModuleType, folder: Path, config: dict, stored: dict[str, Stored], dtype: torch.dtype | None = None
) -> Native:
    """A family's checkpoint, its weights still in the files; `dtype` None: that in which they are stored.

    Raises CheckpointError as `native_weights` does, and where the tokenizer's file is missing.
    """
    native = family.native_config(config)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(native)]
    weights = native_weights(stored, family.TENSORS, model_class, native)
    native.architectures = [model_class.__name__]
    native.dtype = dtype or next(iter(weights.values())).dtype
    if hasattr(family, "adapt"):
        family.adapt(weights, config, native.dtype)
    tokenizer = family.tokenizer(folder, config)
    generation = _generation_config(read_json(folder / "generation_config.json"), family, tokenizer)
    return Native(model_class, native, weights, tokenizer, generation)


def _generation_config(published: dict, family: ModuleType, tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """The publisher's sampling and the family's stop ids; not the keys that only its code knows, nor a
    `max_length`, which generate() warns of at every call."""
    own = {"eos_token_id": family.STOP_IDS, "pad_token_id": tokenizer.pad_token_id}
    known = GenerationConfig().to_dict().keys() - {"max_length", "transformers_version"}
    return GenerationConfig(**{key: value for key, value in published.items() if key in known} | own)


def native_names(published: str, tensors: dict[str, list[str]]) -> list[str]:
    """The native tensors that a published one becomes: one under a new name, or several that share its rows.

    Every fragment of `tensors` that occurs in the name is replaced by each of its counterparts.
    """
    names = [published]
    for fragment, counterparts in tensors.items():
        if fragment in published:
            names = [name.replace(fragment, counterpart) for name in names for counterpart in counterparts]
    return names


def native_weights(
    stored: dict[str, Stored],
    tensors: dict[str, list[str]],
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
) -> dict:
    """The checkpoint as a state dict of `model_class(config)`: views of the memory-mapped files, no copy.

    A published tensor that becomes several is cut into as many rows as each of them has. Rotary tables are
    dropped, they are computed. Raises CheckpointError for a tensor that is missing, unknown, or of another
    shape than `config` asks for.
    """
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in model_class(config).state_dict().items()}
    weights = {}
    for published, found in stored.items():
        if published.endswith("inv_freq"):
            continue
        names = native_names(published, tensors)
        if unknown := [name for name in names if name not in expected]:
            raise CheckpointError(f"{found.file} holds {published}, for which this model has no place ({unknown[0]}).")
        rows = [expected[name][0] for name in names]
        found.check_shape(published, (sum(rows), *expected[names[0]][1:]))
        weights |= zip(names, found.tensor.split(rows), strict=True)
    for name in expected.keys() - weights.keys():
        files = ", ".join(sorted({file.name for _, file in stored.values()}))
        missing = _published_name(name, tensors)
        raise CheckpointError(f"No file holds {missing} ({files} do not): download the model again.")
    return weights


def _published_name(native: str, tensors: dict[str, list[str]]) -> str:
    for fragment, counterparts in tensors.items():
        for counterpart in counterparts:
            native = native.replace(counterpart, fragment)
    return native


def llama_shape(config: dict) -> dict:
    """The keys of a published config that LlamaConfig knows by the same name."""
    sizes = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"
    others = "max_position_embeddings hidden_act rms_norm_eps initializer_range tie_word_embeddings"
    tokens = "pad_token_id bos_token_id eos_token_id"
    return {key: config[key] for key in f"{sizes} {others} {tokens}".split() if key in config}


def fast_tokenizer(
    backend: Tokenizer, folder: Path, chat_template: str | None, **names: Any
) -> PreTrainedTokenizerFast:
    """A `tokenizers.Tokenizer` as a class of transformers that any tool reads; it pads on the left."""
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        name_or_path=str(folder),
        chat_template=chat_template,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **names,
    )
