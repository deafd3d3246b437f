"""The weight files of a checkpoint folder: opened without being read, and checked before a model is made."""

import hashlib
import json
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import ChatmagicError
from ..files import write

if TYPE_CHECKING:
    from torch import Tensor


# Beside a downloaded model: where it is from and what it consists of, see `read_manifest`.
MANIFEST = ".complete"
# A folder without any of these holds no tokenizer.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "*.tiktoken", "vocab.json", "vocab.txt")


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
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON ({error}): download it, or save it, again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is JSON, but no object of settings: download it, or save it, again.")
    return value


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a download noted of itself: {"model", "source", "revision", "commit", "files": {name: {"bytes", "sha256"}}};
    {} where the folder was filled by anybody else, or the note is none that a download writes."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    files = found.get("files") if isinstance(found, dict) else None
    whole = isinstance(files, dict) and all(
        name == Path(name).name and isinstance(noted, dict) and type(noted.get("bytes")) is int
        for name, noted in files.items()
    )
    return found if whole else {}


def write_manifest(
    folder: Path, files: Mapping[Path, str], model: str, source: str, revision: str, commit: str = ""
) -> None:
    """Note in the folder what a model consists of, and where it is from: see `read_manifest`. files: with the SHA-256
    of those that were just found to have it, "" for those that are still to be read for it."""
    noted = {
        path.name: {"bytes": path.stat().st_size, "sha256": digest or sha256(path)}
        for path, digest in sorted(files.items())
    }
    about = {"model": model, "source": source, "revision": revision, "commit": commit, "files": noted}
    write(folder / MANIFEST, json.dumps(about, indent=1))


def sha256(file: Path) -> str:
    """The checksum of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_sizes(folder: Path) -> None:
    """Raise CheckpointError, naming the file, where one is not as long as it was when it was downloaded."""
    manifest = read_manifest(folder)
    for name, noted in manifest.get("files", {}).items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != noted["bytes"]:
            found = f"has {file.stat().st_size:,} bytes" if file.is_file() else "is missing"
            raise CheckpointError(
                f"{file} {found}; {noted['bytes']:,} were downloaded. To have it again, and it alone: "
                f"{_download(folder)}"
            )


def _download(folder: Path) -> str:
    """The command that brings what the folder lacks of its download."""
    noted = read_manifest(folder)
    of = f" --revision {noted.get('revision')}" if "@" in folder.name else ""  # as course/wanted.py names it
    return f"chatmagic download {noted.get('model', folder.name)}{of}"


def check_whole(folder: Path) -> None:
    """Raise CheckpointError, naming the file, unless the folder holds a config, a tokenizer and weights that end where
    they say: by its manifest or, where somebody else filled it, by what the files say themselves. Nothing is loaded."""
    if not read_json(folder / "config.json"):
        raise CheckpointError(f"{folder} has no config.json: it is no model folder, or its download did not end.")
    for file in weight_files(folder):
        if _is_cut(file):
            raise CheckpointError(f"{file} is cut short or no checkpoint: download it again.")
    if not any(any(folder.glob(name)) for name in TOKENIZERS):
        raise CheckpointError(f"{folder} holds no tokenizer, none of {', '.join(TOKENIZERS)}: download it again.")


def is_whole(folder: Path) -> bool:
    """Whether `check_whole` has nothing to say of the folder."""
    try:
        check_whole(folder)
    except (CheckpointError, OSError):
        return False
    return True


def verify(folder: Path) -> dict[str, Any]:
    """The folder's manifest, every file hashed anew and found to be as noted; {} where there is none, and the files
    are what `check_whole` asks for. Raises CheckpointError, naming the file."""
    check_whole(folder)
    manifest = read_manifest(folder)
    for name, noted in manifest.get("files", {}).items():
        if (found := sha256(folder / name)) != (then := str(noted.get("sha256"))):
            raise CheckpointError(
                f"{folder / name} has the checksum {found[:12]}..., and {then[:12]}... was downloaded: it "
                f"was changed since. To have it again, and it alone: rm {folder / name}; {_download(folder)}"
            )
    return manifest


def _is_cut(file: Path) -> bool:
    """Whether a weight file ends before its own table of contents says, or has none where it should."""
    with file.open("rb") as opened:
        head = opened.read(8)
        if file.suffix != ".safetensors":  # a zip archive, whose table is at its end; or, from old days, a bare pickle
            return not head or head.startswith(b"PK") and not zipfile.is_zipfile(file)
        try:
            (length,) = struct.unpack("<Q", head)
            tensors = json.loads(opened.read(min(length, 10**8)))
            ends = [each["data_offsets"][1] for name, each in tensors.items() if name != "__metadata__"]
        except (struct.error, ValueError, LookupError, TypeError, AttributeError):
            return True
        return bool(8 + length + max(ends, default=0) != file.stat().st_size)


def weight_files(folder: Path) -> dict[Path, list[str]]:
    """The files that hold the weights, safetensors before `.bin`, each with the tensors its index promises.

    A checkpoint of one file has no index: its list is empty. Raises CheckpointError where there are no
    weights, where an index names a file that is not there, and as `check_sizes`.
    """
    check_sizes(folder)
    for name in ("model.safetensors", "pytorch_model.bin"):
        if weight_map := read_json(folder / f"{name}.index.json").get("weight_map"):
            _check_map(folder / f"{name}.index.json", weight_map)
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


def _check_map(index: Path, weight_map: object) -> None:
    """Raise CheckpointError unless it is of names of tensors to names of files that lie beside the index."""
    named = list(weight_map.values()) if isinstance(weight_map, dict) else [weight_map]
    if odd := [name for name in named if not isinstance(name, str) or name != Path(name).name]:
        raise CheckpointError(
            f"{index} names {odd[0]!r} as a file of weights, and none is called so: download it again."
        )


def open_weights(folder: str | Path) -> dict[str, Stored]:
    """Every tensor of the checkpoint in `folder` by its published name, memory-mapped: opening 15 GB takes no memory.

    `.bin` files go through `torch.load(weights_only=True)`. Raises CheckpointError for a file that is
    missing, cut short, no checkpoint, lacks what its index promises, or holds anything but tensors.
    """
    stored: dict[str, Stored] = {}
    for file, promised in weight_files(Path(folder)).items():
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
    if odd := [
        name for name, value in tensors.items() if not (isinstance(value, torch.Tensor) and isinstance(name, str))
    ]:
        kind = type(tensors[odd[0]]).__name__
        raise CheckpointError(f"{file} holds more than tensors: {odd[0]} is a {kind}.")
    return tensors
