"""Adapter + base -> one checkpoint, row by row; AdaLoRA -> plain LoRA.

The arithmetic is PEFT's `merge_and_unload`, operation for operation (`peft/tuners/lora/layer.py` and
`peft/tuners/adalora/layer.py`), so the merged weights are its weights to the last bit. No model is made: the rows of
the base go from its files, past the adapter, into the new ones.
"""

import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..errors import ChatmagicError
from ..files import new_folder, write
from ..progress import Bar
from .checkpoint import first_not_finite, open_file, open_weights, read_json, weight_files
from .provenance import (
    BASE,
    PROVENANCE,
    base_fingerprint,
    base_folder,
    read_provenance,
    trained_in_nf4,
    trained_thinking,
)
from .quantize import as_in_nf4
from .shard import Part, write_shard

FACTORS = ("adapter_model.safetensors", "adapter_model.bin")
NOT_COPIED = (".safetensors", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf")
# The settings of an adapter that a merge reads, or that concern training alone. Any other of PEFT's that is set changes
# what the layer computes (DoRA, aLoRA, ...) and is refused; what PEFT does not know it ignores, and so does a merge.
KNOWN_SETTINGS = """
    peft_type task_type base_model_name_or_path revision peft_version auto_mapping inference_mode bias r
    lora_alpha lora_dropout target_modules exclude_modules layers_to_transform layers_pattern rank_pattern
    alpha_pattern use_rslora fan_in_fan_out init_lora_weights megatron_core qalora_group_size eva_config
    init_r target_r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step
"""
# What PEFT takes where a setting is missing.
DEFAULTS = {"r": 8, "lora_alpha": 8, "fan_in_fan_out": False, "init_r": 12}


# What a setting that a merge reads must be, besides missing or null.
NUMBERS, SWITCHES, PATTERNS = ("r", "lora_alpha", "init_r"), ("use_rslora", "fan_in_fan_out"), ("alpha_pattern",)


class MergeError(ChatmagicError):
    """An adapter and a base that cannot be merged. Nothing was written."""


class NothingToFold(MergeError):
    """A LoRA adapter that others read as it is."""


@dataclass
class Update:
    """What an adapter adds to one linear layer: `B @ (A * E) * scale / divisor`.

    A: (rank, in_features), B: (out_features, rank), E: (rank, 1), divisor: (1,), all float32. In LoRA, E and the
    divisor are one.
    """

    A: torch.Tensor
    B: torch.Tensor
    E: torch.Tensor
    scale: float
    divisor: torch.Tensor
    rounded: bool = False  # PEFT loads AdaLoRA factors with a rank pattern in the base layer's dtype
    transposed: bool = False  # the layer is a Conv1D, whose weight is (in_features, out_features)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the weight that this is for."""
        shape = (self.B.shape[0], self.A.shape[1])
        return shape[::-1] if self.transposed else shape

    def product(self, dtype: torch.dtype) -> torch.Tensor:
        """`B @ (A * E)` for a weight of this dtype: float32, of the shape of the weight."""
        A, B, E = (t.to(dtype).float() if self.rounded else t for t in (self.A, self.B, self.E))
        product = B @ (A * E)
        return product.T if self.transposed else product

    def add_to(self, weight: torch.Tensor, product: torch.Tensor) -> None:
        """Add the product, or some rows of it to the same rows of a weight, in place; `product` is used up."""
        weight += product.mul_(self.scale).div_(self.divisor)


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
        updates = _read_updates(adapter)
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


def adalora_to_lora(adapter: str | Path, output: str | Path) -> Path:
    """Write an AdaLoRA adapter as a plain LoRA adapter, which vLLM and llama.cpp read, to the new folder `output`.

    Its one rank is the largest that AdaLoRA kept, with zeros where a layer kept less; the singular values are
    folded into A and the scale into B, so `lora_alpha` equals `r`; layers that kept no rank are left out. Layers are
    named as in the base's checkpoint, which `fit` noted beside the adapter (of another's adapter: if the base is where
    it says): of one that also sees, a LoRA adapter is renamed so.
    Raises MergeError if there is nothing to fold or to rename, or no rank was kept, WriteError if `output` exists.
    """
    from peft import LoraConfig

    adapter, output = Path(adapter).expanduser(), Path(output).expanduser()
    config, updates = _read_config(adapter), _read_updates(adapter)
    on_disk = _on_disk(adapter, config, updates)
    renamed = {name: on_disk[name] for name in updates.keys() & on_disk.keys()}
    if config["peft_type"] != "ADALORA" and not renamed:
        raise NothingToFold(
            f"{adapter} is {config['peft_type']}, not ADALORA: there is nothing to fold. Use it as it is."
        )
    kept = {renamed.get(name, name).removesuffix(".weight"): u for name, u in updates.items() if len(u.A)}
    if not kept:
        raise MergeError(f"{adapter} kept no rank in any layer, so it changes nothing. Train it again.")
    rank = max(len(update.A) for update in kept.values())
    tensors = {}
    for module, u in kept.items():
        padding = rank - len(u.A)
        A = torch.nn.functional.pad(u.A * u.E, (0, 0, 0, padding))
        B = torch.nn.functional.pad(u.B * (u.scale / u.divisor), (0, padding))
        tensors |= {
            f"base_model.model.{module}.lora_A.weight": A,
            f"base_model.model.{module}.lora_B.weight": B,
        }
    with new_folder(output) as staging:
        LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules=sorted(kept),
            inference_mode=True,
            **{key: config.get(key) for key in ("task_type", "base_model_name_or_path", "fan_in_fan_out")},
        ).save_pretrained(staging)
        save_file(tensors, staging / FACTORS[0], metadata={"format": "pt"})
        if (adapter / PROVENANCE).is_file():
            shutil.copyfile(adapter / PROVENANCE, staging / PROVENANCE)
    return output


def _on_disk(adapter: Path, config: dict, updates: dict[str, Update]) -> dict[str, str]:
    """What the base's checkpoint calls those of its weights that have another name there."""
    from .causal import names_in_checkpoint

    noted = read_provenance(adapter)
    if "on_disk" in noted:
        return noted["on_disk"]
    base = base_folder(config.get("base_model_name_or_path") or "")
    return names_in_checkpoint(base, updates.keys()) if base else {}


def _read_base_config(folder: Path) -> dict:
    if config := read_json(folder / "config.json"):
        return config
    raise MergeError(f"{folder} has no config.json. Name the folder of a downloaded model.")


def _read_config(adapter: Path) -> dict:
    """An adapter's settings, refused if one of them makes it more than LoRA or AdaLoRA factors."""
    if not (adapter / "adapter_config.json").is_file() or not any((adapter / name).is_file() for name in FACTORS):
        raise MergeError(
            f"{adapter} lacks adapter_config.json or {FACTORS[0]}. Name the folder that "
            f"peft_model.save_pretrained(folder) wrote."
        )
    config = {name: v for name, v in read_json(adapter / "adapter_config.json").items() if v is not None}
    config = DEFAULTS | config
    strange = [name for name, value in config.items() if value and name not in KNOWN_SETTINGS.split()]
    if strange:
        from peft import AdaLoraConfig, LoraConfig

        known = {field.name for kind in (LoraConfig, AdaLoraConfig) for field in fields(kind)}
        strange = sorted(known & set(strange))
    init = config.get("init_lora_weights", True)
    if init not in (True, False, "gaussian", "eva", "orthogonal"):  # the others change the base as well
        strange.append(f"init_lora_weights={init}")
    kind = config.get("peft_type")
    if kind not in ("LORA", "ADALORA") or strange:
        raise MergeError(
            f"{adapter} is not plain LoRA or AdaLoRA ({kind}{''.join(f', {s}' for s in strange)}). "
            f"Merge it with PEFT: PeftModel.from_pretrained(model, {str(adapter)!r}).merge_and_unload()."
        )
    _check_settings(adapter, config)
    return config


def _check_settings(adapter: Path, config: dict) -> None:
    """Raise MergeError for a setting that is not of its kind: "false" would be true, and "16" no number."""
    kinds: dict[str, Callable[[Any], bool]] = dict.fromkeys(NUMBERS, _is_number)
    kinds |= dict.fromkeys(SWITCHES, lambda value: isinstance(value, bool))
    kinds |= dict.fromkeys(("rank_pattern", *PATTERNS), lambda value: isinstance(value, dict))
    kinds["base_model_name_or_path"] = lambda value: isinstance(value, str)
    wrong = [name for name, is_right in kinds.items() if name in config and not is_right(config[name])]
    wrong += [name for name in ("r", "init_r") if name not in wrong and config[name] <= 0]
    for name in PATTERNS if not wrong else ():
        for key, value in config.get(name, {}).items():
            try:
                re.compile(key)
            except re.error:
                wrong.append(name)
            wrong += [] if _is_number(value) else [name]
    if wrong:
        raise MergeError(
            f"{adapter / 'adapter_config.json'} has {wrong[0]} = {config[wrong[0]]!r}, which PEFT never writes. Save "
            "the adapter again, or mend the file."
        )


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _read_updates(adapter: Path) -> dict[str, Update]:
    """An adapter's updates by the name of the weight, such as `model.layers.0.mlp.up_proj.weight`."""
    config, layers = _read_config(adapter), {}
    for key, tensor in open_file(next(adapter / name for name in FACTORS if (adapter / name).is_file())).items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([ABE])(?:\.weight)?", key)
        if not match:
            raise MergeError(
                f"{adapter} holds {key}, which is no LoRA factor. Save it without, "
                f"peft_model.save_pretrained(folder, save_embedding_layers=False), or merge it with PEFT: "
                f"PeftModel.from_pretrained(model, {str(adapter)!r}).merge_and_unload()."
            )
        if not tensor.is_floating_point():
            raise MergeError(
                f"{adapter} holds {key} of {tensor.dtype}, which is no number to multiply by. Save it again."
            )
        layers.setdefault(match[1], {})[match[2]] = tensor.float()
    kind = config["peft_type"]
    wanted = "ABE" if kind == "ADALORA" else "AB"
    if not layers:
        raise MergeError(f"{adapter} holds no tensors: it changes nothing. Save it again, or train it.")
    for module, factors in layers.items():
        if factors.keys() != set(wanted):
            held, whole = (", ".join(f"lora_{factor}" for factor in sorted(each)) for each in (factors, wanted))
            raise MergeError(
                f"{adapter} is half an adapter: of {module} it holds {held}, and {kind} has {whole}. Save it again."
            )
        if odd := [factor for factor, tensor in factors.items() if tensor.dim() != 2]:
            raise MergeError(
                f"{adapter} holds a lora_{odd[0]} of {module} of shape {tuple(factors[odd[0]].shape)}, which is no "
                "linear layer's. Merge it with PEFT: "
                f"PeftModel.from_pretrained(model, {str(adapter)!r}).merge_and_unload()."
            )
        ranks = {factors["A"].shape[0], factors["B"].shape[-1], *(factors["E"].shape[:1] if "E" in factors else ())}
        if len(ranks) > 1:
            raise MergeError(
                f"{adapter} holds factors of {module} that do not fit: ranks {sorted(ranks)}. Save it again."
            )
    if spoilt := first_not_finite(
        {f"{name}.lora_{factor}": t for name, f in layers.items() for factor, t in f.items()}
    ):
        raise MergeError(
            f"{adapter} holds numbers that are not finite, first in {spoilt}: its training broke down. Train it again, "
            "with a lower learning rate."
        )
    make = _adalora_update if config["peft_type"] == "ADALORA" else _lora_update
    return {f"{module}.weight": make(config, module, **factors) for module, factors in layers.items()}


def _lora_update(config: dict, module: str, A: torch.Tensor, B: torch.Tensor) -> Update:
    alpha, rank = _of_layer(config, "alpha", module, "lora_alpha"), _of_layer(config, "rank", module, "r")
    _check_rank(module, len(A), rank)
    scale = alpha / (math.sqrt(len(A)) if config.get("use_rslora") else len(A))
    return Update(A, B, torch.ones(len(A), 1), scale, torch.ones(1), transposed=config["fan_in_fan_out"])


def _check_rank(module: str, found: int, said: int) -> None:
    """Raise MergeError unless a layer's factors are of the rank by which they are scaled."""
    if found != said:
        raise MergeError(
            f"The factors of {module} are of rank {found}, and adapter_config.json says {said}: one of the two files "
            "is of another adapter, and what they are scaled by is not known. Save it again."
        )


def _of_layer(config: dict, kind: str, module: str, otherwise: str) -> Any:
    """A setting of one layer, as PEFT's `get_pattern_key` finds it."""
    patterns = config.get(f"{kind}_pattern", {}).items()
    return next((value for key, value in patterns if re.match(rf"(.*\.)?({key})$", module)), config[otherwise])


def _adalora_update(config: dict, module: str, A: torch.Tensor, B: torch.Tensor, E: torch.Tensor) -> Update:
    # The divisor is the rank that training began with, also where the rank pattern left fewer.
    divisor = torch.tensor([float(config["init_r"])]) + 1e-5
    kept = config.get("rank_pattern", {}).get(f"{module}.lora_E", [True] * len(A))
    _check_rank(module, len(A), sum(kept) if len(kept) == config["init_r"] else config["init_r"])
    scale = config["lora_alpha"] if config["lora_alpha"] > 0 else float(len(A))
    return Update(A, B, E, scale, divisor, bool(config.get("rank_pattern")), config["fan_in_fan_out"])


def _note_thinking(file: Path, thinking: bool | None) -> None:
    """Write it where the merged model's tokenizer reads it, see `prompts.labels.note_thinking`."""
    if thinking is not None:
        write(file, json.dumps(read_json(file) | {"chat_thinking": thinking}, ensure_ascii=False, indent=2))


def _check_base(base: Path, adapter: Path) -> None:
    trained_on = read_provenance(adapter).get(BASE)
    if trained_on and trained_on != base_fingerprint(base):
        name = _read_config(adapter).get("base_model_name_or_path") or ""
        found = base_folder(name)
        there = f": merge_adapter(base={str(found)!r}, ...)" if found else ", which is not here"
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


HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"  # the latter below its model's name


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
