"""Model families whose publishers ship Python files: their checkpoints, read into transformers' own classes.

One module a family, found by being here, each with

    NAME                                   the family's
    recognises(config, folder) -> bool     whether a published config.json, in that folder, is this family's
    native_config(config)                  the same model as a config of transformers
    TENSORS                                published names to native ones, see `native.native_names`
    adapt(weights, config, dtype)          optional: what the weights need besides new names
    tokenizer(folder, config)              the fast tokenizer, its chat template set
    STOP_IDS                               the token ids that end an answer

Saved again they are plain checkpoints, which AutoModelForCausalLM reads by itself, but for Baichuan-13B:
transformers has no class like it, and reads it after `import chatmagic.models.families`, which registers one.
"""

import re
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType

from transformers import AutoConfig, AutoModelForCausalLM

from ...text import nearest
from . import alibi

_MODULES = [import_module(f".{module.name}", __name__) for module in iter_modules(__path__)]
FAMILIES = {module.NAME: module for module in _MODULES if hasattr(module, "NAME")}

AutoConfig.register(alibi.BaichuanAlibiConfig.model_type, alibi.BaichuanAlibiConfig, exist_ok=True)
AutoModelForCausalLM.register(alibi.BaichuanAlibiConfig, alibi.BaichuanAlibiForCausalLM, exist_ok=True)


def find_family(config: dict, folder: Path) -> ModuleType | None:
    """The module of the family that a published checkpoint belongs to; None where it is none of them."""
    return next((family for family in FAMILIES.values() if family.recognises(config, folder)), None)


def nearest_family(config: dict) -> str:
    """The name of the family that an unknown config looks most like."""
    looks = " ".join([config.get("model_type", ""), *config.get("architectures", [])]).lower()
    for word in re.findall("[a-z]+", looks):
        if near := nearest(word, FAMILIES, cutoff=0.4):
            return near[0]
    return "Llama"
