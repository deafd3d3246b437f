"""What an adapter was trained on and how, noted beside it: what a merge compares."""

import hashlib
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..machine import from_home, home
from .checkpoint import CheckpointError, open_weights, read_json, weight_files

# Beside an adapter: {BASE: base_fingerprint(of what it is for), "thinking": how it was trained, see `note_thinking`,
# "nf4": names of the weights that were in NF4 while it was trained,
# "on_disk": names_in_checkpoint(the weights that it changes),
# "base_here": the folder's name among the models, of one whose adapter_config.json has the hub's for others}.
PROVENANCE, BASE, BASE_HERE = "chatmagic.json", "base_tensors", "base_here"
# Settings of a base that say how it is run or who wrote it, not what it computes.
NOT_OF_THE_MODEL = """
    use_cache transformers_version _name_or_path name_or_path torch_dtype dtype architectures auto_map tokenizer_class
    output_attentions output_hidden_states return_dict attn_implementation _attn_implementation gradient_checkpointing
    bos_token_id eos_token_id pad_token_id initializer_range
"""


def base_fingerprint(folder: str | Path) -> str | None:
    """A SHA-256 of a model's settings, and of its tensors by name, shape, dtype and about a thousand of their numbers:
    the same however they are laid out in files.

    Training stores it beside the adapter (see PROVENANCE); merging compares. None for a quantised folder: its
    16-bit original, which the adapter will be merged into, cannot be told from it.
    """
    folder = Path(folder)
    if read_json(folder / "config.json").get("quantization_config"):
        return None
    files = [folder / "config.json", *weight_files(folder)]
    return _fingerprint(folder, tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@cache
def _fingerprint(folder: Path, files: tuple[Any, ...]) -> str:
    """Of the folder while its files are these: a run asks at each state that it saves."""
    left_out, config = NOT_OF_THE_MODEL.split(), read_json(folder / "config.json")
    config = {name: value for name, value in config.items() if name not in left_out and value is not None}
    if config.get("rope_theta") == config.get("rope_parameters", {}).get("rope_theta"):  # told twice: `make_portable`
        config.pop("rope_theta", None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    stored = {name: tensor for name, (tensor, _) in sorted(open_weights(folder).items())}
    step = sum(tensor.numel() for tensor in stored.values()) // 1000 + 1
    for name, tensor in stored.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        some = tensor.reshape(-1)[::step].clone(memory_format=torch.contiguous_format)
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def base_name(path: str | Path) -> str:
    """How files call a base, so that it is found on another machine too and nobody's home is named: the folder's place
    among the models, which is what `chatmagic download` takes; of one elsewhere the path, from `~` in the home folder.
    What is no folder, as a hub's id, stays as it is."""
    folder = Path(os.path.abspath(Path(path).expanduser()))
    if not folder.is_dir():
        return str(path)
    return folder.relative_to(home()).as_posix() if home() in folder.parents else from_home(folder)


def base_folder(name: str) -> Path | None:
    """The folder that `base_name` named so, or that PEFT did, which writes a path; if there is no model in it, one of
    the same name among the models; None where there is none either."""
    places = home() / name, Path(name).expanduser(), home() / Path(name).name
    return next((place for place in places if name and (place / "config.json").is_file()), None)


_KINDS = {BASE: str, BASE_HERE: str, "thinking": bool, "nf4": list, "on_disk": dict}


def read_provenance(adapter: Path) -> dict[str, Any]:
    """What is noted beside an adapter, see PROVENANCE; {} where nothing is. Raises CheckpointError for what no training
    notes."""
    noted = {name: value for name, value in read_json(adapter / PROVENANCE).items() if value is not None}
    for name, kind in _KINDS.items():
        if name in noted and not isinstance(noted[name], kind):
            raise CheckpointError(
                f"{adapter / PROVENANCE} has {name} = {noted[name]!r}, which no training writes: take the file that "
                "was written with the adapter. Without it, a merge goes by the shapes alone."
            )
    return noted


def trained_thinking(adapter: Path) -> bool | None:
    """Whether an adapter was trained to think; None where nothing says."""
    return read_provenance(adapter).get("thinking")


def trained_in_nf4(adapter: Path) -> set[str]:
    """Names of the weights, as the model has them, that were in NF4 while an adapter was trained."""
    return set(map(str, read_provenance(adapter).get("nf4", ())))
