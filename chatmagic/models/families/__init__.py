"""Model families whose publishers ship Python files: their checkpoints, read into transformers' own classes.

One module a family, each with

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
from difflib import get_close_matches
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM

from . import alibi, baichuan, chatglm2, internlm, llama, qwen

FAMILIES = {
    "Baichuan2": baichuan,
    "Qwen": qwen,
    "InternLM": internlm,
    "ChatGLM2": chatglm2,
    "Llama": llama,
}

AutoConfig.register(alibi.BaichuanAlibiConfig.model_type, alibi.BaichuanAlibiConfig, exist_ok=True)
AutoModelForCausalLM.register(alibi.BaichuanAlibiConfig, alibi.BaichuanAlibiForCausalLM, exist_ok=True)


def find_family(config: dict, folder: Path):
    """The module of the family that a published checkpoint belongs to; None where it is none of them."""
    return next((family for family in FAMILIES.values() if family.recognises(config, folder)), None)


def nearest_family(config: dict) -> str:
    """The name of the family that an unknown config looks most like."""
    names = {name.lower(): name for name in FAMILIES}
    looks = " ".join([config.get("model_type", ""), *config.get("architectures", [])]).lower()
    for word in re.findall("[a-z]+", looks):
        for match in get_close_matches(word, names, 1, cutoff=0.4):
            return names[match]
    return "Llama"
