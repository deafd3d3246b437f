"""Adapter + base -> one checkpoint, row by row.

The merged weights are those of PEFT's `merge_and_unload` to the last bit. No model is made: the rows of the base go
from its files, past the adapter, into the new ones.
"""

import json
import math
import shutil
import sys
from functools import partial
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any

import torch
from safetensors import safe_open

from ..files import new_folder, write
from ..progress import Bar
from .adapter import MergeError, Update, read_settings, read_updates
from .checkpoint import open_weights, read_json, weight_files
from .provenance import BASE, base_fingerprint, base_folder, read_provenance, trained_in_nf4, trained_thinking
from .quantize import as_in_nf4
from .shard import Part, write_shard

NOT_COPIED = (".safetensors", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf")
HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"  # the latter below its model's name


def merge_adapter(
    base: str | Path, adapter: str | Path, output: str | Path, any_base: bool = False, onto: str = "trained"
) -> Path:
    """Merge a LoRA or AdaLoRA adapter, as PEFT saves it, into a base of 16 or 32 bit; returns `output`.

    `output` is a new folder, there only once it is complete: the merged weights, in the dtype and the shards of
    the base and equal to PEFT's `merge_and_unload` bit by bit, with the base's config, tokenizer and chat
    template. A base whose publisher has his own tensor names (Baichuan, Qwen, InternLM, ChatGLM) comes out native, one
    in `.bin` files as safetensors; a head that was the embedding, and that the adapter changes, becomes its own.
    `any_base` merges also where the adapter was trained on another model, as long as the shapes fit.
    `onto`: "trained" takes those of the base's weights that were in NF4 in training as that leaves them, in the base's
    dtype again, which is what the adapter was fitted to. "original" takes all as they were published. Where these
    differ, a line on stderr tells which were taken.

    Raises MergeError if the adapter was trained on another base or is more than LoRA, or if the base is quantised;
    WriteError if `output` exists or its disk is too full.
    """
    from .causal import names_in_checkpoint
    from .families import find_family
    from .portable import make_portable

    if onto not in ("trained", "original"):
        raise MergeError(f"onto is {onto!r}; expected 'trained' or 'original'.")
    base, adapter, output = (Path(path).expanduser() for path in (base, adapter, output))
    config = _read_base_config(base)
    if config.get("quantization_config"):
        raise MergeError(
            f"{base} is quantised: merging would round the adapter away. Merge into the 16-bit model it was made "
            f"from: merge_adapter(base=<folder of the 16-bit model>, ...)."
        )
    for name in ("generation_config.json", "tokenizer_config.json"):
        read_json(base / name)  # they are copied, and named where they lie
    with new_folder(output, needed=sum(file.stat().st_size for file in weight_files(base))) as staging:
        updates = read_updates(adapter)
        if not any_base:
            _check_base(base, adapter)
        family = find_family(config, base)
        shards = _open_family(family, base, config, staging) if family else _open_native(base, staging)
        make_portable(staging)
        in_nf4 = trained_in_nf4(adapter)
        renamed = names_in_checkpoint(base, updates.keys() | in_nf4)
        updates = {renamed.get(name, name): update for name, update in updates.items()}
        if HEAD in updates:
            _untie_head(shards, config, staging)
        _check_updates(updates, base, shards)
        changed = {name for name, update in updates.items() if len(update.A)}  # AdaLoRA empties some
        rounded = {renamed.get(name, name) for name in in_nf4} if onto == "trained" else set()
        multiplying = Lock()
        size = sum(math.prod(part.shape) * part.dtype.itemsize for parts in shards.values() for part in parts.values())
        with Bar(total=size, unit="B", unit_scale=True, desc="merging") as bar:
            for file, parts in shards.items():
                for name in parts.keys() & rounded:
                    parts[name] = parts[name]._replace(rows=partial(_as_trained, parts[name], multiplying))
                for name in parts.keys() & changed:
                    rows = partial(_Changed, name, parts[name], updates[name], multiplying)
                    parts[name] = parts[name]._replace(rows=rows)
                write_shard(staging / file, parts, bar.update)
        _note_thinking(staging / "tokenizer_config.json", trained_thinking(adapter))
    if in_nf4:
        what = {"trained": "as NF4 leaves them, as in training", "original": "as they are published"}[onto]
        other = "original" if onto == "trained" else "trained"
        print(f"Merged onto the base's weights {what}; the other way: onto={other!r}, --onto {other}.", file=sys.stderr)
    return output


def _read_base_config(folder: Path) -> dict:
    if config := read_json(folder / "config.json"):
        return config
    raise MergeError(f"{folder} has no config.json. Name the folder of a downloaded model.")


def _note_thinking(file: Path, thinking: bool | None) -> None:
    """Write it where the merged model's tokenizer reads it, see `prompts.labels.note_thinking`."""
    if thinking is not None:
        write(file, json.dumps(read_json(file) | {"chat_thinking": thinking}, ensure_ascii=False, indent=2))


def _check_base(base: Path, adapter: Path) -> None:
    trained_on = read_provenance(adapter).get(BASE)
    if trained_on and trained_on != base_fingerprint(base):
        name = read_settings(adapter).get("base_model_name_or_path") or ""
        found = base_folder(name)
        there = f": merge_adapter(base={str(found)!r}, ...)" if found else ", which is not here"
        if found and found.samefile(base):
            there = ", and that is this folder: its files were changed since"
        names = f"It names {name!r}{there}. " if name else ""
        raise MergeError(
            f"{adapter} was trained on another model than {base}: config or weights differ. {names}If you know that it "
            "is for this one: any_base=True, or chatmagic merge --any-base."
        )


def _check_updates(updates: dict[str, Update], base: Path, shards: dict[str, dict[str, Part]]) -> None:
    parts = {name: part for shard in shards.values() for name, part in shard.items()}
    for name, update in updates.items():
        part = parts.get(name)
        if not part or part.shape != update.shape or not part.dtype.is_floating_point:
            found = f"a {tuple(part.shape)} of {part.dtype}" if part else "nothing of that name"
            raise MergeError(
                f"The adapter changes {name}, {update.shape}, but {base} holds {found}. Merge into the 16-bit model "
                f"that the adapter was trained on."
            )


def _open_native(base: Path, output: Path) -> dict[str, dict[str, Part]]:
    """Copy what is not weights to `output`; returns the tensors by the file they are in."""
    for file in base.iterdir():
        if file.is_file() and not file.name.endswith(NOT_COPIED) and not file.name.startswith("."):
            shutil.copyfile(file, output / file.name)
    shards: dict[str, dict[str, Part]] = {}
    for name, (tensor, file) in open_weights(base).items():
        rows = partial(_open_rows, file, name) if file.suffix == ".safetensors" else partial(_given, tensor)
        target = file.name.replace("pytorch_model", "model").removesuffix(".bin").removesuffix(".safetensors")
        shards.setdefault(f"{target}.safetensors", {})[name] = Part(tensor.dtype, tensor.shape, rows)
    if not list(output.glob("*.safetensors.index.json")):  # the base's, where it has one of the same files
        _write_index(shards, output)
    return shards


def _given(tensor: torch.Tensor) -> torch.Tensor:
    """Of a `.bin` file, which is mapped into memory as a whole."""
    return tensor


def _open_rows(file: Path, name: str) -> Any:
    """Opens the file for this tensor alone, so that what is read of it does not stay in memory."""
    return safe_open(file, framework="pt").get_slice(name)


def _open_family(family: ModuleType, base: Path, config: dict, output: Path) -> dict[str, dict[str, Part]]:
    """As _open_native, for a checkpoint in its publisher's layout, which becomes native on the way."""
    from .families.native import native_names, read_native
    from .families.sentencepiece import add_file

    stored = open_weights(base)
    native = read_native(family, base, config, stored)
    weights = native.weights
    for part in (native.config, native.generation_config, native.tokenizer):
        part.save_pretrained(output)
    if (base / "tokenizer.model").is_file():
        add_file(base / "tokenizer.model", output, native.tokenizer)
    by_file = {}
    for published, (_, file) in stored.items():
        names = native_names(published, family.TENSORS)
        by_file.setdefault(file, []).extend(name for name in names if name in weights)
    shards = {}
    for number, names in enumerate(by_file.values(), 1):
        file = f"model-{number:05d}-of-{len(by_file):05d}.safetensors"
        # popped when it is written: a file of the base is unmapped with the last of its tensors
        shards[file] = {
            name: Part(weights[name].dtype, weights[name].shape, partial(weights.pop, name)) for name in names
        }
    _write_index(shards, output)
    return shards


def _untie_head(shards: dict[str, dict[str, Part]], config: dict, output: Path) -> None:
    """Where the head is the embedding, and changes: give it rows of its own. The embedding stays as it was."""
    saved, untied = read_json(output / "config.json") or config, {"tie_word_embeddings": False}
    embeddings = ((parts, name) for parts in shards.values() for name in parts if name.endswith(f".{EMBEDDING}"))
    parts, name = next(embeddings, (None, None))
    if parts and not any(HEAD in parts for parts in shards.values()):
        parts[HEAD] = parts[name]
        _write_index(shards, output)
    elif not saved.get("tie_word_embeddings"):
        return
    if "text_config" in saved:
        saved["text_config"] |= untied
    write(output / "config.json", json.dumps(saved | untied, indent=2))


def _write_index(shards: dict[str, dict[str, Part]], output: Path) -> None:
    """In which file each tensor is; one file of the name that everybody looks for needs none."""
    if shards.keys() != {"model.safetensors"}:
        weight_map = {name: file for file, shard in shards.items() for name in shard}
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        write(output / "model.safetensors.index.json", index)


def _as_trained(part: Part, multiplying: Lock) -> torch.Tensor:
    """A weight as it was in NF4."""
    with multiplying:  # one at a time: on its way it takes many times its size
        return as_in_nf4(part.rows()[:])


class _Changed:
    """The rows of a weight, with what an adapter adds to them."""

    def __init__(self, name: str, part: Part, update: Update, multiplying: Lock) -> None:
        self.name, self.update, self.rows = name, update, part.rows()
        with multiplying:  # one product at a time: each takes all cores
            self.product = update.product(part.dtype)

    def __getitem__(self, some: slice) -> torch.Tensor:
        block = self.rows[some].clone()
        self.update.add_to(block, self.product[some])
        if not block.isfinite().all():
            way = (
                "Use a base in bfloat16" if block.dtype == torch.float16 else "Train the adapter again, at a lower rate"
            )
            raise MergeError(f"The merged {self.name} is not finite in {block.dtype}. {way}.")
        return block
