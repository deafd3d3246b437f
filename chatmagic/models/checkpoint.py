"""The weight files of a checkpoint folder: opened without being read, and checked before a model is made."""

import json
import pickle
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import ChatmagicError

if TYPE_CHECKING:
    from torch import Tensor


class CheckpointError(ChatmagicError):
    """The folder is not a whole and safe checkpoint of the model that its config describes."""


class Stored(NamedTuple):
    """A tensor as a file holds it: memory-mapped, so nothing is read before it is used."""

    tensor: "Tensor"
    file: Path

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise CheckpointError where the tensor, stored as `name`, has not the shape of the model's."""
        if self.tensor.shape != shape:
            raise CheckpointError(
                f"{self.file} holds {name} of shape {tuple(self.tensor.shape)}, and config.json asks for "
                f"{tuple(shape)}: one of the two belongs to another model. Download both again."
            )


def first_not_finite(tensors: dict[str, "Tensor"]) -> str | None:
    """The name of the first tensor that holds a NaN or an infinity; None if there is no such."""
    floating = ((name, tensor) for name, tensor in tensors.items() if tensor.is_floating_point())
    return next((name for name, tensor in floating if not tensor.isfinite().all()), None)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, after a byte order mark or not; {} where there is no such file. Raises CheckpointError
    where it is none."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON ({error}): download it, or save it, again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is JSON, but no object of settings: download it, or save it, again.")
    return value


def weight_files(folder: Path) -> dict[Path, list[str]]:
    """The files that hold the weights, safetensors before `.bin`, each with the tensors its index promises.

    A checkpoint of one file has no index: its list is empty. Raises CheckpointError where there are no
    weights, or where an index names a file that is not there.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if weight_map := read_json(folder / f"{name}.index.json").get("weight_map"):
            files: dict[Path, list[str]] = {folder / file: [] for file in dict.fromkeys(weight_map.values())}
            for tensor, file in weight_map.items():
                files[folder / file].append(tensor)
            if missing := [file for file in files if not file.is_file()]:
                raise CheckpointError(
                    f"{missing[0]} is missing ({len(missing)} of {len(files)} shards are), and with it "
                    f"{files[missing[0]][0]}. Download the model again: the files already there are kept."
                )
            return files
        if (folder / name).is_file():
            return {folder / name: []}
    found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    raise CheckpointError(
        f"{folder} holds no weights: no model.safetensors, no pytorch_model.bin, no index of either. "
        f"Found: {found}. Download the model again, or name the folder that has them."
    )


def open_weights(folder: Path) -> dict[str, Stored]:
    """Every tensor of the checkpoint by its published name, memory-mapped: opening 15 GB takes no memory.

    `.bin` files go through `torch.load(weights_only=True)`. Raises CheckpointError for a file that is
    missing, cut short, no checkpoint, lacks what its index promises, or holds anything but tensors.
    """
    stored: dict[str, Stored] = {}
    for file, promised in weight_files(folder).items():
        tensors = open_file(file)
        for name in promised:
            if name not in tensors:
                raise CheckpointError(f"{file} does not hold {name}, which its index promises: download both.")
        stored |= {name: Stored(tensor, file) for name, tensor in tensors.items()}
    return stored


def open_file(file: Path) -> dict[str, "Tensor"]:
    """The tensors of a `.safetensors` or a `.bin` file, memory-mapped; errors as `open_weights`."""
    return _open_safetensors(file) if file.suffix == ".safetensors" else _open_bin(file)


def _open_safetensors(file: Path) -> dict[str, "Tensor"]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, it is no dict
    except SafetensorError as error:
        raise CheckpointError(f"{file} is cut short or no checkpoint ({error}): download it again.") from None


def _open_bin(file: Path) -> dict[str, "Tensor"]:
    import torch

    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        if asked := re.search(r"GLOBAL (\S+)", str(error)):
            raise CheckpointError(
                f"{file} holds more than tensors: it asks to run {asked[1]}. Nothing was run, nothing was "
                f"loaded, and no option does. Get the model from its publisher, best as safetensors."
            ) from None
        raise CheckpointError(f"{file} is cut short or no checkpoint: download it again.") from None
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{file} is no checkpoint but a {type(tensors).__name__}: download it again.")
    if odd := [name for name, value in tensors.items() if not isinstance(value, torch.Tensor)]:
        kind = type(tensors[odd[0]]).__name__
        raise CheckpointError(f"{file} holds more than tensors: {odd[0]} is a {kind}.")
    return tensors
