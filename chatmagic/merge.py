"""Adapter + base -> one checkpoint, tensor by tensor; AdaLoRA -> plain LoRA.

The arithmetic is PEFT's `merge_and_unload`, operation for operation (`peft/tuners/lora/layer.py` and
`peft/tuners/adalora/layer.py`), so the merged weights are its weights to the last bit. The file work is not:
a merged shard has the header of the base's shard, so it is a copy of that shard with rows added to on the way.
"""

import hashlib
import json
import math
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from threading import Lock

import torch
from safetensors.torch import load_file, save_file

from .errors import ChatmagicError

PROVENANCE = "chatmagic.json"  # beside an adapter: {"base": base_fingerprint(folder it was trained on)}
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WEIGHTS = (".safetensors", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf")
WORKERS, BLOCK = 4, 2**19  # threads that copy, and bytes they copy at a time: few enough to stay in the cache
# The settings of an adapter that a merge reads, or that concern training alone. Any other that is set changes
# what the layer computes (DoRA, aLoRA, ...) and is refused: so are the variants that PEFT will add.
KNOWN_SETTINGS = """
    peft_type task_type base_model_name_or_path revision peft_version auto_mapping inference_mode bias r
    lora_alpha lora_dropout target_modules exclude_modules layers_to_transform layers_pattern rank_pattern
    alpha_pattern use_rslora fan_in_fan_out init_lora_weights megatron_core qalora_group_size eva_config
    init_r target_r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step
"""


class MergeError(ChatmagicError):
    """An adapter and a base that cannot be merged. Nothing was written."""


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


def merge_adapter(base: str | Path, adapter: str | Path, output: str | Path) -> Path:
    """Merge a LoRA or AdaLoRA adapter, as PEFT saves it, into a base of 16 or 32 bit; returns `output`.

    `output` is a new folder, there only once it is complete: the merged weights, in the dtype and the shards of
    the base and equal to PEFT's `merge_and_unload` bit by bit, with the base's config, tokenizer and chat
    template. A base whose publisher has his own tensor names (Baichuan, Qwen, InternLM, ChatGLM) comes out native.

    Raises MergeError if the adapter was trained on another base or is more than LoRA, if the base is quantised,
    or if `output` exists or its disk is too full.
    """
    base, adapter, output = Path(base), Path(adapter), Path(output)
    if _is_quantised(base):
        raise MergeError(
            f"{base} is quantised: merging would round the adapter away. Merge into the 16-bit model it was made "
            f"from: merge_adapter(base=<folder of the 16-bit model>, ...)."
        )
    shards = weight_files(base)
    with _staged(output, needed=sum(shard.stat().st_size for shard in shards)) as staging:
        updates = _read_updates(adapter)
        _check_base(base, adapter)
        entries = {}
        for shard in shards:
            if shard.suffix == ".safetensors":
                with open(shard, "rb") as file:
                    entries |= _read_header(file)
        if updates.keys() <= entries.keys():
            for name, update in updates.items():
                _check_weight(name, update, tuple(entries[name]["shape"]), DTYPES.get(entries[name]["dtype"]))
            for shard in shards:
                _merge_shard(shard, staging / shard.name, updates)
            for file in base.iterdir():
                if file.is_file() and not file.name.endswith(WEIGHTS):
                    shutil.copyfile(file, staging / file.name)
        else:
            _merge_loaded(base, staging, updates)
    return output


def adalora_to_lora(adapter: str | Path, output: str | Path) -> Path:
    """Write an AdaLoRA adapter as a plain LoRA adapter, which vLLM and llama.cpp read, to the new folder `output`.

    Its one rank is the largest that AdaLoRA kept, with zeros where a layer kept less; the singular values are
    folded into A and the scale into B, so `lora_alpha` equals `r`; layers that kept no rank are left out.
    Raises MergeError if `adapter` is not AdaLoRA or kept no rank at all, or if `output` exists.
    """
    from peft import LoraConfig

    adapter, output = Path(adapter), Path(output)
    config = _read_config(adapter)
    if config["peft_type"] != "ADALORA":
        raise MergeError(
            f"{adapter} is {config['peft_type']}, not ADALORA: there is nothing to fold. Use it as it is."
        )
    kept = {name.removesuffix(".weight"): u for name, u in _read_updates(adapter).items() if len(u.A)}
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
    with _staged(output) as staging:
        LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules=sorted(kept),
            inference_mode=True,
            **{key: config.get(key) for key in ("task_type", "base_model_name_or_path", "fan_in_fan_out")},
        ).save_pretrained(staging)
        save_file(tensors, staging / "adapter_model.safetensors", metadata={"format": "pt"})
        if (adapter / PROVENANCE).is_file():
            shutil.copyfile(adapter / PROVENANCE, staging / PROVENANCE)
    return output


def base_fingerprint(folder: str | Path) -> str | None:
    """A SHA-256 of the config and of about a thousand places in the weights of a model folder.

    Training stores it beside the adapter (see PROVENANCE); merging compares. None for a quantised folder: its
    16-bit original, which the adapter will be merged into, cannot be told from it.
    """
    folder = Path(folder)
    if _is_quantised(folder):
        return None
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    files = weight_files(folder)
    step = sum(file.stat().st_size for file in files) // 1000 + 1
    for path in files:
        with open(path, "rb") as file:
            for offset in range(0, path.stat().st_size, step):
                file.seek(offset)
                digest.update(file.read(64))
    return digest.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's weights, safetensors if there are any, `.bin` otherwise."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            files = [
                folder / shard for shard in sorted(set(json.loads(index.read_text())["weight_map"].values()))
            ]
            if missing := [file.name for file in files if not file.is_file()]:
                raise MergeError(f"{index} names {missing[0]}, which is not there. Download the model again.")
            return files
    raise MergeError(
        f"{folder} holds no model.safetensors and no pytorch_model.bin. Name a downloaded model's folder."
    )


def _is_quantised(folder: Path) -> bool:
    if not (folder / "config.json").is_file():
        raise MergeError(f"{folder} has no config.json. Name the folder of a downloaded model.")
    return "quantization_config" in json.loads((folder / "config.json").read_text())


def _read_config(adapter: Path) -> dict:
    """An adapter's settings, refused if one of them makes it more than LoRA or AdaLoRA factors."""
    path = adapter / "adapter_config.json"
    if not path.is_file() or not path.with_name("adapter_model.safetensors").is_file():
        raise MergeError(
            f"{adapter} lacks adapter_config.json or adapter_model.safetensors. Name the folder that "
            f"peft_model.save_pretrained(folder) wrote."
        )
    config = json.loads(path.read_text())
    strange = sorted(key for key, value in config.items() if value and key not in KNOWN_SETTINGS.split())
    init = config.get("init_lora_weights", True)
    if init not in (True, False, "gaussian", "eva", "orthogonal"):  # the others change the base as well
        strange.append(f"init_lora_weights={init}")
    if config["peft_type"] not in ("LORA", "ADALORA") or strange:
        raise MergeError(
            f"{adapter} is not plain LoRA or AdaLoRA ({config['peft_type']}{''.join(f', {s}' for s in strange)}). "
            f"Merge it with PEFT: PeftModel.from_pretrained(model, {str(adapter)!r}).merge_and_unload()."
        )
    return config


def _read_updates(adapter: Path) -> dict[str, Update]:
    """An adapter's updates by the name of the weight, such as `model.layers.0.mlp.up_proj.weight`."""
    config, layers = _read_config(adapter), {}
    for key, tensor in load_file(adapter / "adapter_model.safetensors").items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([ABE])(?:\.weight)?", key)
        if not match:
            raise MergeError(
                f"{adapter} holds {key}, which is no LoRA factor. Merge it with PEFT: "
                f"PeftModel.from_pretrained(model, {str(adapter)!r}).merge_and_unload()."
            )
        layers.setdefault(match[1], {})[match[2]] = tensor.float()
    make = _adalora_update if config["peft_type"] == "ADALORA" else _lora_update
    return {f"{module}.weight": make(config, module, **factors) for module, factors in layers.items()}


def _lora_update(config: dict, module: str, A: torch.Tensor, B: torch.Tensor) -> Update:
    patterns = (config.get("alpha_pattern") or {}).items()
    alpha = next((a for key, a in patterns if re.match(rf"(.*\.)?({key})$", module)), config["lora_alpha"])
    scale = alpha / (math.sqrt(len(A)) if config.get("use_rslora") else len(A))
    return Update(A, B, torch.ones(len(A), 1), scale, torch.ones(1), transposed=config["fan_in_fan_out"])


def _adalora_update(config: dict, module: str, A: torch.Tensor, B: torch.Tensor, E: torch.Tensor) -> Update:
    # The divisor is the rank that training began with, also where the rank pattern left fewer.
    divisor = torch.tensor([float(config["init_r"])]) + 1e-5
    scale = config["lora_alpha"] if config["lora_alpha"] > 0 else float(len(A))
    return Update(A, B, E, scale, divisor, bool(config.get("rank_pattern")), config["fan_in_fan_out"])


def _check_base(base: Path, adapter: Path) -> None:
    path = adapter / PROVENANCE
    trained_on = json.loads(path.read_text()).get("base") if path.is_file() else None
    if trained_on and trained_on != base_fingerprint(base):
        name = _read_config(adapter).get("base_model_name_or_path")
        raise MergeError(
            f"{adapter} was trained on another model than {base}: config or weights differ. It names {name!r}: "
            f"merge_adapter(base={name!r}, ...)."
        )


def _check_weight(name: str, update: Update, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
    if shape != update.shape or dtype not in DTYPES.values():
        raise MergeError(
            f"The adapter changes {name} as {update.shape} floats, but the base holds {shape} of {dtype or 'another type'}."
            f" Merge into the 16-bit model that the adapter was trained on."
        )


def _read_header(file) -> dict[str, dict]:
    """The tensors of a safetensors file by name: dtype, shape and data_offsets; leaves `file` at the data."""
    header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return header


def _merge_shard(source: Path, target: Path, updates: dict[str, Update]) -> None:
    """Copy a shard block by block, adding to the rows that are changed; a few tensors are on their way at a time."""
    with open(source, "rb") as reader:
        entries = _read_header(reader)
        length = reader.tell()
        reader.seek(0)
        target.write_bytes(reader.read(length))
    multiplying = Lock()  # one product at a time: each takes all cores

    def copy(names: list[str]) -> None:
        with open(source, "rb") as reader, open(target, "r+b") as writer:
            for name in names:
                start, end = entries[name]["data_offsets"]
                reader.seek(length + start)
                writer.seek(length + start)
                block, dtype, products = BLOCK, DTYPES.get(entries[name]["dtype"]), repeat(None)
                if name in updates and len(updates[name].A):  # AdaLoRA takes all rank away from some
                    row = (end - start) // entries[name]["shape"][0]
                    block = max(BLOCK // row, 1) * row
                    with multiplying:
                        products = updates[name].product(dtype).split(block // row)
                for offset, product in zip(range(start, end, block), products):
                    data = bytearray(min(block, end - offset))
                    if reader.readinto(data) != len(data):
                        raise MergeError(f"{source} ends within {name}. Download the model again.")
                    if product is not None:
                        updates[name].add_to(torch.frombuffer(data, dtype=dtype).view(product.shape), product)
                    writer.write(data)

    names = sorted(entries, key=lambda name: entries[name]["data_offsets"])
    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(copy, (names[i::WORKERS] for i in range(WORKERS))))


@torch.no_grad()
def _merge_loaded(base: Path, output: Path, updates: dict[str, Update]) -> None:
    """Merge into a base whose tensors have other names in its files than in its native class."""
    from .load import load_model

    model, tokenizer = load_model(base, device_map="cpu")
    weights = model.state_dict()
    for name, update in updates.items():
        if name not in weights:
            raise MergeError(
                f"The adapter changes {name}, which {base} has not. Name the model it was trained on."
            )
        _check_weight(name, update, tuple(weights[name].shape), weights[name].dtype)
        update.add_to(weights[name], update.product(weights[name].dtype))
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


@contextmanager
def _staged(output: Path, needed: int = 0):
    """A folder beside `output` that becomes `output` when the block ends well, and vanishes when it does not."""
    if output.exists():
        raise MergeError(
            f"{output} exists, and nothing is written over it. Name another folder, or: rm -r {output}"
        )
    staging = output.absolute().with_name(f".{output.name}.unfinished")
    shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
    staging.mkdir(parents=True)
    try:
        if (free := shutil.disk_usage(staging).free) < needed:
            raise MergeError(
                f"{output} needs {needed / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} GB free. Make room, or name "
                f"a folder on another disk."
            )
        yield staging
        staging.rename(output)
    except BaseException:
        shutil.rmtree(staging)
        raise
