"""What a run leaves on disk: the adapter, as PEFT reads it, and the state that a run goes on from.

    CKPT_PATH/adapter_model.safetensors, adapter_config.json    the best adapter, pruned to its ranks
    CKPT_PATH/last-000120/                                      the same of step 120, and state.pt beside it

All of it by `chatmagic.files`, so that what was there before stays whole, whatever happens.
"""

import copy
import functools
import io
import json
import pickle
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import BinaryIO

import torch
from peft import PeftModel
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors.torch import save
from torch.utils._pytree import tree_leaves

from ..accel.allocator import rank_allocator
from ..errors import ChatmagicError
from ..files import new_folder, remove, write, write_together
from ..models.causal import names_in_checkpoint
from ..models.checkpoint import first_not_finite, open_file, read_json
from ..models.parts import trainable
from ..models.provenance import BASE, PROVENANCE, base_fingerprint, base_name
from ..models.quantize import names_in_nf4

ADAPTER, ADAPTER_CONFIG, STATE = "adapter_model.safetensors", "adapter_config.json", "state.pt"
FILES = {ADAPTER, ADAPTER_CONFIG, PROVENANCE, STATE}
HINT = "Make room, and go on with fit(resume=True)."
# What the factors of an adapter are multiplied by goes by these.
SCALING = ("lora_alpha", "use_rslora", "alpha_pattern", "init_r")


@dataclass
class RunState:
    """All that a run holds between two steps: what is saved is this, and a resumed run begins with it."""

    epoch: int = 1  # counted from 1
    batch: int = 0  # batches of this epoch that are done
    sums: list[float] | None = None  # loss and label tokens, of this epoch so far
    skipped: int = 0  # optimizer steps in a row that fp16 has skipped
    history: dict[str, list] = field(default_factory=dict)
    best: dict | None = None  # epoch and score of the adapter that was kept
    epoch_rng: list[dict] = field(default_factory=list)  # of each process, as `get_rng` gives it, at the epoch's start
    settings: dict | None = None  # what the run is, which one that goes on with it must be too
    # What follows is taken when the state is saved.
    step: int = 0  # optimizer steps so far
    of: int | None = None  # optimizer steps of the whole run
    finished: bool = True  # earlier versions do not say
    rng: list[dict] = field(default_factory=list)  # of each process, now
    params: dict[str, torch.Tensor] = field(default_factory=dict)
    allocator: dict | None = None
    optimizer: dict | None = None
    lr_scheduler: dict | None = None
    scaler: dict | None = None

    def to_bytes(self) -> bytes:
        """What torch.save writes of it."""
        buffer = io.BytesIO()
        torch.save(vars(self), buffer)
        return buffer.getvalue()

    @classmethod
    def read(cls, file: Path | BinaryIO, mmap: bool = False) -> "RunState":
        """Of a file that `to_bytes` wrote, in this version or an earlier one. With `mmap` tensors stay on the disk.
        Raises ChatmagicError for a file that is damaged."""
        known = {field.name for field in fields(cls)}
        try:
            saved = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
            return cls(**{name: value for name, value in saved.items() if name in known})
        except (RuntimeError, EOFError, ValueError, AttributeError, pickle.UnpicklingError) as error:
            raise ChatmagicError(
                f"{file} is damaged: {(str(error) or type(error).__name__).splitlines()[0][:100]}. Move its folder "
                "away, and go on from another state, or start anew with fit(..., resume=False)."
            ) from error


def save_adapter(model: PeftModel, folder: str | Path) -> None:
    """Write the adapter of a PEFT model to `folder`, AdaLoRA's factors pruned to their ranks. Main process only."""
    write_together(folder, adapter_files(model), HINT)  # without its config, which is the last, an adapter is not one


@torch.no_grad()
def load_adapter(model: PeftModel, folder: str | Path) -> dict[str, list[bool]]:
    """Put a saved adapter into the live factors of a PEFT model with the same targets, in place; returns its rank
    pattern, {} where it has none.

    Pruned triplets get E = 0, which leaves the update that was saved. Raises ChatmagicError if there is no adapter,
    its names or shapes are not the model's (`load_state_dict(strict=False)` would do nothing, in silence), or it is
    scaled otherwise.
    """
    folder = Path(folder)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ChatmagicError(
            f"There is no adapter in {folder}: no {ADAPTER_CONFIG}. Train one with fit(ckpt_path=...)."
        )
    rank_allocator(model)  # which freezes what PEFT makes trainable by mistake
    files = [folder / name for name in (ADAPTER, "adapter_model.bin") if (folder / name).is_file()]
    if not files:
        raise ChatmagicError(f"There is no adapter in {folder}: no {ADAPTER}. Train one with fit(ckpt_path=...).")
    saved = open_file(files[0])
    config, ours = read_json(folder / ADAPTER_CONFIG), model.peft_config[model.active_adapter].to_dict()
    pattern = config.get("rank_pattern") or {}
    if not isinstance(pattern, dict) or not all(isinstance(kept, list | int) for kept in pattern.values()):
        raise ChatmagicError(f"{folder / ADAPTER_CONFIG} has a rank_pattern that PEFT never writes: {pattern!r:.80}.")
    if spoilt := first_not_finite(saved):
        raise ChatmagicError(f"The adapter in {folder} is not finite, first in {spoilt}: train it again.")
    params = saved_names(model)
    if params.keys() != saved.keys():
        other = sorted(params.keys() ^ saved.keys())
        raise ChatmagicError(f"The adapter in {folder} is for other layers: {len(other)} names differ, as {other[0]}.")
    for name in SCALING:
        if name in config and (config[name] or False) != (ours.get(name) or False):
            raise ChatmagicError(
                f"The adapter in {folder} was trained with {name}={config[name]!r}, this model's has "
                f"{name}={ours.get(name)!r}: its factors would be scaled otherwise. Make the adapter as it was then."
            )
    for name, param in params.items():
        layer, _, factor = name.removeprefix("base_model.model.").rpartition(".")
        rank_axis = 1 if factor == "lora_B" else 0
        keep = torch.tensor(pattern.get(f"{layer}.lora_E", []), dtype=torch.bool, device=param.device).reshape(-1)
        if param.shape == saved[name].shape:
            param.copy_(saved[name])
        elif len(keep) == param.shape[rank_axis] and keep.sum() == saved[name].shape[rank_axis]:
            if factor == "lora_E":
                param.zero_()
            param[(slice(None), keep) if rank_axis else keep] = saved[name].to(param)
        else:
            raise ChatmagicError(
                f"The adapter in {folder} has a {name} of shape {tuple(saved[name].shape)}, this model one of "
                f"{tuple(param.shape)}: make the adapter with the ranks of then."
            )
    return pattern


def saved_names(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """The parameters that are trained, by the names that PEFT saves them under."""
    adapter = model.active_adapter

    def saved_name(name: str) -> str:
        name = name.replace(f".modules_to_save.{adapter}", "").replace(f".{adapter}", "")
        return name.removesuffix(".weight") if name.endswith(".lora_magnitude_vector.weight") else name  # DoRA's

    return {saved_name(name): param for name, param in trainable(model)}


def peft_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    """What is trained, as PEFT would save it."""
    name, factors = model.active_adapter, {name: param.detach() for name, param in trainable(model)}
    config = model.peft_config[name]
    pattern = getattr(config, "rank_pattern", None)
    # "auto" would ask the hub whether the base's vocabulary has grown.
    tensors = get_peft_model_state_dict(model, factors, name, save_embedding_layers=False)
    config.rank_pattern = pattern  # its layers have been renamed
    return tensors


def state_folder(ckpt_path: str | Path, step: int) -> Path:
    """Where the state of that step lies."""
    return Path(ckpt_path) / f"last-{step:06d}"


def save_state(model: PeftModel, state: RunState, ckpt_path: str | Path) -> None:
    """Write the state and the adapter to CKPT_PATH/last-STEP, then drop older ones. Raises ChatmagicError where a
    reader's own file lies there, or a tensor is not finite; WriteError where the disk is full."""
    ckpt_path, folder = Path(ckpt_path), state_folder(ckpt_path, state.step)
    leaves = [leaf for leaf in tree_leaves(vars(state)) if isinstance(leaf, torch.Tensor)]
    check_finite({f"Tensor {number} of the state": leaf for number, leaf in enumerate(leaves)}, folder)
    if folder.exists() and (others := {file.name for file in folder.iterdir()} - FILES):
        raise ChatmagicError(
            f"{folder} holds {min(others)}, which no run wrote, and the state of this step goes there: move it "
            "away. The state before is kept: fit(..., resume=True) goes on from it."
        )
    with new_folder(folder, hint=HINT, over=True) as staging:
        for name, content in adapter_files(model).items():
            write(staging / name, content, HINT)
        write(staging / STATE, state.to_bytes(), HINT)
    for old in states(ckpt_path):
        if old != folder:
            remove(old)


def states(ckpt_path: Path) -> list[Path]:
    """The folders that `save_state` made, also what a kill left of one; not a reader's own, whatever its name."""
    numbered = (path for path in ckpt_path.glob("last-*") if re.fullmatch(r"last-\d{6,}", path.name))
    return [path for path in numbered if {file.name for file in path.iterdir()} <= FILES]


def newest_state(ckpt_path: str | Path, read: bool = True) -> RunState | None:
    """The newest state under `ckpt_path`, None if there is none. Without `read` its tensors stay on the disk."""
    files = [folder / STATE for folder in states(Path(ckpt_path)) if (folder / STATE).is_file()]
    if not files:
        return None
    newest = max(files, key=lambda path: path.stat().st_mtime_ns)  # a new run's 0 comes after the old one's 120
    return RunState.read(newest, mmap=not read)


def adapter_files(model: PeftModel) -> dict[str, bytes]:
    """The files of a PEFT adapter folder, by name. Raises ChatmagicError for factors that are no numbers any more."""
    config = copy.copy(model.peft_config[model.active_adapter])
    config.inference_mode = True
    fields = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    if pattern := fields.get("rank_pattern"):
        fields["rank_pattern"] = {name.replace(f".{model.active_adapter}", ""): kept for name, kept in pattern.items()}
    tensors = {name: tensor.contiguous().cpu() for name, tensor in peft_tensors(model).items()}
    check_finite(tensors, "in the adapter")
    base = Path(config.base_model_name_or_path or "")
    provenance = {
        "thinking": getattr(model, "chat_thinking", None),
        "nf4": names_in_nf4(model.get_base_model()),
    }
    if (base / "config.json").is_file():
        layers = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in tensors}
        changed = frozenset(f"{layer}.weight" for layer in layers)
        provenance |= {BASE: base_fingerprint(base), "on_disk": _names_in_checkpoint(base, changed)}
        fields["base_model_name_or_path"] = base_name(base)
    return {
        ADAPTER: save(tensors, metadata={"format": "pt"}),
        PROVENANCE: json.dumps(provenance).encode(),
        ADAPTER_CONFIG: json.dumps(fields, indent=2, sort_keys=True).encode(),
    }


_names_in_checkpoint = functools.cache(names_in_checkpoint)  # a run asks at each state that it saves


def check_finite(tensors: dict[str, torch.Tensor], where: str | Path) -> None:
    """Raise ChatmagicError if one of the tensors, named, is not finite: nothing is saved of them."""
    if name := first_not_finite(tensors):
        raise ChatmagicError(
            f"{name} is not finite any more, so it is not saved ({where}); what was saved before is as it was. Lower "
            "the learning rate, and go on from there: fit(..., resume=True)."
        )
