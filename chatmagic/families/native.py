"""What the families share: published tensors under native names, and tokenizers in transformers' clothes."""

from pathlib import Path

from ..checkpoint import CheckpointError, Stored


def native_names(published: str, tensors: dict[str, list[str]]) -> list[str]:
    """The native tensors that a published one becomes: one under a new name, several that share its rows, or none.

    Every fragment of `tensors` that occurs in the name is replaced by each of its counterparts.
    """
    names = [published]
    for fragment, counterparts in tensors.items():
        if fragment in published:
            names = [name.replace(fragment, counterpart) for name in names for counterpart in counterparts]
    return names


def native_weights(stored: dict[str, Stored], tensors: dict[str, list[str]], model_class, config) -> dict:
    """The checkpoint as a state dict of `model_class(config)`: views of the memory-mapped files, no copy.

    A published tensor that becomes several is cut into as many rows as each of them has. Rotary tables are dropped,
    they are computed. Raises CheckpointError for a tensor that is missing, unknown, or of another shape than
    `config` asks for.
    """
    import torch

    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in model_class(config).state_dict().items()}
    weights = {}
    for published, (tensor, file) in stored.items():
        if published.endswith("inv_freq"):
            continue
        names = native_names(published, tensors)
        if unknown := [name for name in names if name not in expected]:
            raise CheckpointError(
                f"{file} holds {published}, for which this model has no place ({unknown[0]})."
            )
        rows = [expected[name][0] for name in names]
        shape = (sum(rows), *expected[names[0]][1:])
        if tensor.shape != shape:
            raise CheckpointError(
                f"{file} holds {published} of shape {tuple(tensor.shape)}, and config.json asks for {tuple(shape)}: "
                "one of the two belongs to another model. Download both again."
            )
        weights |= zip(names, tensor.split(rows), strict=True)
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
    keys = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings"
    keys += " hidden_act rms_norm_eps initializer_range tie_word_embeddings pad_token_id bos_token_id eos_token_id"
    return {key: config[key] for key in keys.split() if key in config}


def fast_tokenizer(backend, folder: Path, chat_template: str | None, **names):
    """A `tokenizers.Tokenizer` as the class that any tool of transformers reads, padding on the left as chat needs."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        name_or_path=str(folder),
        chat_template=chat_template,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **names,
    )
