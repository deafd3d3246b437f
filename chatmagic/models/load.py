"""A checkpoint folder, as its publisher ships it, as a model and a tokenizer of transformers' own classes."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..errors import ChatmagicError
from ..machine import home
from ..progress import Bar
from ..prompts.templates import name_family
from .checkpoint import CheckpointError, Stored, first_not_finite, open_file, open_weights, read_json
from .quantize import mend_adalora_over_int8, mend_bitsandbytes, quantization_config

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# What the number of a layer's experts is called in a config.json; some of those that see list two.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class RemoteCodeError(ChatmagicError):
    """The folder wants its own Python files to be run."""


def load_model(
    path: str | Path, quantize: str | None = None, dtype: "torch.dtype | str" = "auto", device_map: Any = "auto"
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load the checkpoint folder `path`; no code in it is run.

    quantize: "nf4" (4 bit with double quantisation) or "int8", both by bitsandbytes, on a GPU or the CPU;
        None for the weights as they are.
    dtype: a torch dtype or its name; "auto" is the checkpoint's own, or the 16-bit type that this device has.
    device_map: as in transformers; "auto" fills the GPUs and is the CPU where there is none.

    Returns (model, tokenizer), the model in evaluation mode. Raises CheckpointError for a folder that is
    missing or not whole, naming file and tensor, RemoteCodeError for one that only its own code can read, and
    ChatmagicError for a `quantize` or `dtype` that is not known.
    """
    if quantize not in (None, "nf4", "int8"):
        raise ChatmagicError(f"quantize={quantize!r} is not known: give 'nf4', 'int8' or None.")
    folder = Path(path).expanduser()
    config = _read_config(folder)
    from .families import find_family

    family = find_family(config, folder)
    if family is None:
        _refuse_remote_code(config, folder)
    stored = open_weights(folder)
    dtype = _resolve_dtype(dtype, config)
    options = {"dtype": dtype, "device_map": device_map}
    if "quantization_config" in config:
        _check_quantised(folder, config["quantization_config"], quantize)
    elif quantize:
        options["quantization_config"] = quantization_config(quantize, dtype)
    with _own_bars():
        if family is None:
            model, tokenizer = _load_native(folder, config, stored, options)
        else:
            model, tokenizer = _load_family(family, folder, config, stored, options)
    if tokenizer is not None:
        name_family(tokenizer, folder.resolve())
    return model, tokenizer


def load_trained(
    folder: str | Path, quantize: str | None = None
) -> "tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]":
    """Load what training left: a model's folder as `load_model` does, or an adapter's, over the base that it names, in
    NF4 if it was trained so and else in 16 bit (also after int8), unless `quantize` says otherwise; thinking as
    trained. Raises as `load_model` does, and CheckpointError where that base is not here, or the adapter is not
    whole."""
    folder = Path(folder).expanduser()
    adapter = read_json(folder / "adapter_config.json")
    if not adapter:
        return load_model(folder, quantize)
    from ..prompts.labels import note_thinking
    from .provenance import BASE_HERE, base_folder, read_provenance, trained_in_nf4, trained_thinking

    named = adapter.get("base_model_name_or_path") or ""
    if not isinstance(named, str):
        raise CheckpointError(
            f"{folder / 'adapter_config.json'} has base_model_name_or_path = {named!r}, which is no name."
        )
    files = [folder / name for name in ("adapter_model.safetensors", "adapter_model.bin") if (folder / name).is_file()]
    if not files:
        raise CheckpointError(f"{folder} has no adapter_model.safetensors. Take the folder as it was saved.")
    tensors = open_file(files[0])
    if spoilt := first_not_finite(tensors):
        raise CheckpointError(f"{files[0]} holds numbers that are not finite, first in {spoilt}. Train it again.")
    base = base_folder(named) or base_folder(read_provenance(folder).get(BASE_HERE, ""))
    if base is None:
        raise CheckpointError(
            f"{folder} is an adapter for {named or 'a model that it does not name'}, which is not here. `chatmagic "
            f"download` brings a model with a name; any other is looked for at {home() / Path(named).name}."
        )
    model, tokenizer = load_model(base, quantize or ("nf4" if trained_in_nf4(folder) else None))
    from peft import PeftModel, get_peft_model_state_dict  # after load_model, which quiets bitsandbytes' import

    note_thinking(model, tokenizer, trained_thinking(folder))
    try:
        trained = PeftModel.from_pretrained(model, folder)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, OSError, ImportError) as error:
        said = " ".join(line.strip() for line in str(error).strip().split("\n")[:2])
        raise CheckpointError(
            f"PEFT makes no adapter for {base} of {folder}: {said}. Take the folder as it was saved, or train again."
        ) from error
    # Where some are missing PEFT warns, and goes on with layers that do nothing.
    if missing := sorted(get_peft_model_state_dict(trained, save_embedding_layers=False).keys() - tensors.keys()):
        raise CheckpointError(
            f"{files[0]} is half an adapter: it lacks {len(missing)} tensors, the first is {missing[0]}. Take the "
            "folder as it was saved, or train again."
        )
    return trained, tokenizer


@contextmanager
def _own_bars() -> Iterator[None]:
    """transformers' bars as `progress.Bar` shows them, where it shows any."""
    from tqdm.auto import tqdm  # not before transformers does: where it warns, a notebook would show that
    from transformers.utils.logging import set_tqdm_hook

    previous = set_tqdm_hook(lambda factory, args, options: (Bar if factory is tqdm else factory)(*args, **options))
    try:
        yield
    finally:
        set_tqdm_hook(previous)


def check_config(folder: Path, name: str) -> None:
    """Look at the config.json of the model `name`, in `folder`, before its weights are there, without loading torch
    where transformers knows it: say what it is not good for. Raises RemoteCodeError for what only its own code can
    read."""
    from transformers.models.auto.auto_mappings import CONFIG_MAPPING_NAMES

    config = _read_config(folder)
    if config.get("model_type") not in CONFIG_MAPPING_NAMES:
        from .families import find_family

        if find_family(config, folder) is None:
            _refuse_remote_code(config, name)
    text = config | (config.get("text_config") or {})
    if any(text.get(key) not in (None, 0, 1) for key in EXPERTS):
        print(f"{name} is a mixture of experts: they are not quantised here, and get no adapter.", file=sys.stderr)
    if quantised := config.get("quantization_config"):
        how = quantised.get("quant_method", "unknown")
        print(f"{name} is published quantised ({how}): no adapter can be merged into it.", file=sys.stderr)


def context_limit(model: "PreTrainedModel") -> tuple[int | None, str]:
    """How many tokens, prompt and answer together, a model may be given (None: no limit known); why no more.

    Whoever generates refuses beyond it with the reason: some native classes depart from their originals.
    """
    config = model.config.get_text_config()
    reason = getattr(config, "context_limit_reason", "the model was trained on no longer texts")
    return getattr(config, "max_position_embeddings", None), reason


def _read_config(folder: Path) -> dict:
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder {folder}. Download the model: snapshot_download('...').")
    if config := read_json(folder / "config.json"):
        return config
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder} is an adapter, not a model: load its base, then "
            f"PeftModel.from_pretrained(model, {str(folder)!r})."
        )
    raise CheckpointError(f"{folder} has no config.json: it is no model folder, or its download did not end.")


def _check_quantised(folder: Path, stored: dict, quantize: str | None) -> None:
    """A checkpoint that was saved quantised stays as it is."""
    nf4 = stored.get("bnb_4bit_quant_type") == "nf4" and stored.get("load_in_4bit")
    found = "nf4" if nf4 else "int8" if stored.get("load_in_8bit") else stored.get("quant_method")
    if quantize not in (None, found):
        raise ChatmagicError(
            f"{folder} is quantised already ({found}), and cannot become {quantize}: leave quantize out, or "
            f"load the model that it was made from."
        )
    mend_bitsandbytes()
    if found == "int8":
        mend_adalora_over_int8()


def _refuse_remote_code(config: dict, folder: Path | str) -> None:
    from transformers import CONFIG_MAPPING

    from .families import FAMILIES, nearest_family

    model_type = config.get("model_type")
    if model_type in CONFIG_MAPPING:
        return
    auto_map = config.get("auto_map", {})
    code = auto_map.get("AutoModelForCausalLM") or auto_map.get("AutoModel")
    asks = f"{folder} asks for a model of type {model_type!r}, which transformers does not have"
    if code:
        module, _, name = code.rpartition(".")
        asks += f", and for its own {module.split('--')[-1]}.py to be run to make a {name}. No such file is run"
    raise RemoteCodeError(
        f"{asks}. Families that are read without their code: {', '.join(FAMILIES)}; the nearest is "
        f"{nearest_family(config)}."
    )


def _resolve_dtype(dtype: "torch.dtype | str", config: dict) -> "torch.dtype":
    """The torch dtype to load in."""
    import torch

    from .parts import BEYOND_FLOAT16

    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ChatmagicError(f"dtype={dtype!r} is not known: give 'auto', 'float32', 'bfloat16' or 'float16'.")
        return getattr(torch, dtype)
    said = config | (config.get("text_config") or {})
    stored = getattr(torch, said.get("dtype") or said.get("torch_dtype") or "float32")
    if not torch.cuda.is_available():
        # CPUs multiply float16 slowly or not at all
        return torch.bfloat16 if stored is torch.float16 else stored
    if stored is not torch.bfloat16 or torch.cuda.is_bf16_supported(including_emulation=False):
        return stored
    return torch.float32 if config["model_type"] in BEYOND_FLOAT16 else torch.float16


def _load_native(
    folder: Path, config: dict, stored: dict[str, Stored], options: dict
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """A checkpoint that transformers reads by itself."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .causal import LANGUAGE_MODEL, causal_config, names_on_disk, without_weights

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{folder} has no tokenizer that transformers can read: {error}") from None
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        tokenizer.pad_token = _pad_token(tokenizer)
    causal = causal_config(folder)
    if "quantization_config" not in config:  # transformers checks no shape that it quantises
        empty = without_weights(causal)
        expected = empty.state_dict()
        for name, published in names_on_disk(empty, stored).items():
            stored[published].check_shape(published, expected[name].shape)
        if "quantization_config" in options:
            _refuse_experts(empty, folder)
    composite = causal.model_type != config["model_type"]
    if composite:
        print(f"{folder.name}: its language model alone is loaded, and not what it sees or hears with.")
    model, report = AutoModelForCausalLM.from_pretrained(
        folder,
        config=causal,
        key_mapping=LANGUAGE_MODEL if composite else None,
        output_loading_info=True,
        **options,
    )
    if missing := report["missing_keys"]:
        raise CheckpointError(f"No file in {folder} holds {min(missing)}: download the model again.")
    if composite:
        del model._weight_conversions  # or it would be saved under the names of the whole that it no longer is
    return model, tokenizer


def _pad_token(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """A token to pad with that no conversation holds, so that the end of a turn can be trained: many publishers, of
    Llama 3, GLM-4 or DeepSeek-R1's distillates, name none, or their eos."""
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    unused = [token for token in special if token != tokenizer.eos_token and token not in template]
    named = [token for token in unused if "pad" in token.lower()]
    return next(iter([*named, *filter(None, [tokenizer.unk_token]), *unused]), tokenizer.eos_token)


def _refuse_experts(model: "PreTrainedModel", folder: Path) -> None:
    """Where quantising would leave most of a model as it is."""
    from .parts import experts

    if mixture := experts(model).values():
        share = sum(param.numel() for param in mixture) / model.num_parameters()
        raise ChatmagicError(
            f"{folder} has a mixture of experts, {share:.0%} of its weights, which bitsandbytes does not quantise: it "
            "would hardly become smaller. Leave quantize out, or take a model without experts: chatmagic models."
        )


def _load_family(
    family: ModuleType, folder: Path, config: dict, stored: dict[str, Stored], options: dict
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """A published checkpoint as its family's native class.

    transformers takes a state dict of its own names in place of a folder, and quantises, casts and places one
    tensor at a time as it does with files. Nothing is registered with it, and what is saved later is native.
    """
    from .families.native import read_native

    native = read_native(family, folder, config, stored, options["dtype"])
    model = native.model_class.from_pretrained(None, config=native.config, state_dict=native.weights, **options)
    model.name_or_path = model.config.name_or_path = str(folder)
    model.generation_config = native.generation_config
    return model, native.tokenizer
