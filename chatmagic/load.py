"""A checkpoint folder, as its publisher ships it, as a model and a tokenizer of transformers' own classes."""

from pathlib import Path

from .checkpoint import CheckpointError, open_weights, read_json
from .errors import ChatmagicError


class RemoteCodeError(ChatmagicError):
    """The folder wants its own Python files to be run."""


def load_model(path, quantize: str | None = None, dtype="auto", device_map="auto"):
    """Load a checkpoint folder; no code in it is run.

    quantize: "nf4" (4 bit with double quantisation), "int8" (both bitsandbytes, on a GPU or on the CPU),
        or None for the weights as they are.
    dtype: a torch dtype or its name; "auto" is the checkpoint's own, or the 16-bit type that this device has.
    device_map: as in transformers; "auto" fills the GPUs and is the CPU where there is none.

    Returns (model, tokenizer), the model in evaluation mode. Raises CheckpointError for a folder that is missing
    or not whole, naming file and tensor, and RemoteCodeError for one that only its own code can read.
    """
    import torch

    folder = Path(path).expanduser()
    config = _read_config(folder)
    dtype = _resolve_dtype(dtype, config, torch)
    if quantize not in (None, "nf4", "int8"):
        raise ChatmagicError(f"quantize={quantize!r} is not known: give 'nf4', 'int8' or None.")
    stored = open_weights(folder)
    return _load_native(folder, config, stored, quantize, dtype, device_map)


def context_limit(model) -> tuple[int, str]:
    """How many tokens, prompt and answer together, this model may be given, and why no more.

    Whoever generates refuses beyond it with the reason: a family's native class may depart from its original there.
    """
    config = model.config.get_text_config()
    reason = getattr(config, "context_limit_reason", "the model was trained on no longer texts")
    return config.max_position_embeddings, reason


def _read_config(folder: Path) -> dict:
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder {folder}. Download a model: chatmagic.snapshot_download('...').")
    if config := read_json(folder / "config.json"):
        return config
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder} is an adapter, not a model: load its base, then PeftModel.from_pretrained(model, {str(folder)!r})."
        )
    raise CheckpointError(f"{folder} has no config.json: it is no model folder, or its download did not end.")


def _resolve_dtype(dtype, config: dict, torch):
    """The torch dtype to load in."""
    if dtype != "auto":
        return getattr(torch, dtype) if isinstance(dtype, str) else dtype
    stored = getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")
    if not torch.cuda.is_available():
        return torch.bfloat16 if stored is torch.float16 else stored  # a CPU multiplies float16 slowly or not at all
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.float16 if stored is torch.bfloat16 and not bf16 else stored


def _load_native(folder, config, stored, quantize, dtype, device_map):
    """A checkpoint that transformers reads by itself."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .quantize import mend_bitsandbytes, quantization_config

    if "quantization_config" in config:
        mend_bitsandbytes()
    extra = {"quantization_config": quantization_config(quantize, dtype)} if quantize else {}
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map=device_map, output_loading_info=True, **extra
    )
    if info["missing_keys"]:
        raise CheckpointError(f"{folder} lacks {sorted(info['missing_keys'])[0]}: download the model again.")
    return model, AutoTokenizer.from_pretrained(folder)
