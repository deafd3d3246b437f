"""AdaLoRA, or names that only transformers knows -> a plain LoRA adapter, which other programs read."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..files import new_folder
from .adapter import FACTORS, MergeError, Update, read_settings, read_updates
from .provenance import PROVENANCE, base_folder, read_provenance


class NothingToFold(MergeError):
    """A LoRA adapter that others read as it is."""


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
    config, updates = read_settings(adapter), read_updates(adapter)
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
