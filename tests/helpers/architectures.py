"""Tiny checkpoints of random weights, one for each architecture, saved by transformers' own classes.

A row of ARCHITECTURES is all that a new one needs: its config beyond SIZES. Windows are shorter than the conversations
of the tests, patterns of layers short enough that each kind occurs. `python tests/helpers/architectures.py` prints the
tables of docs/models.md.
"""

from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from chatmagic import find_all_linear_names
from chatmagic.accel.layers import why_padded
from chatmagic.course.profile import GB, Profile, profiles, smallest_card
from chatmagic.models.parts import experts

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
TIED = {"tie_word_embeddings": True}
WINDOW = {"sliding_window": 16}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
FULL, SLIDING = "full_attention", "sliding_attention"

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": TIED,
    "qwen3_5": {
        "text_config": TIED
        | {
            "layer_types": ["linear_attention", FULL],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
        "vision_config": {
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 64,
        },
        **TIED,
    },
    "gemma2": TIED | WINDOW | {"query_pre_attn_scalar": 16},
    "gemma3_text": TIED | WINDOW | {"layer_types": [SLIDING, FULL], "query_pre_attn_scalar": 16},
    "gemma3": {
        "text_config": TIED | WINDOW | {"layer_types": [SLIDING, FULL], "query_pre_attn_scalar": 16},
        "vision_config": VISION | {"image_size": 28, "patch_size": 14},
        "mm_tokens_per_image": 4,
    },
    "gemma4": {
        "text_config": TIED
        | WINDOW
        | {
            "num_hidden_layers": 3,
            "layer_types": [SLIDING, FULL, FULL],  # the last of which has keys and values of the one before
            "num_kv_shared_layers": 1,
            "use_double_wide_mlp": True,
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 300,
            "pad_token_id": 0,
        },
        "vision_config": VISION
        | {"num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "position_embedding_size": 64},
        "audio_config": None,
    },
    "glm": {},
    "glm4": {"partial_rotary_factor": 0.5},
    "glm4_moe_lite": EXPERTS
    | {
        "n_routed_experts": 4,
        "num_key_value_heads": 4,
        "kv_lora_rank": 32,
        "q_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "mlp_layer_types": ["dense", "sparse"],
    },
    "internlm3": {"qkv_bias": False},
    "phi3": WINDOW,
    "hunyuan_v1_dense": {},
    "ernie4_5": TIED,
    "gpt_oss": WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": [SLIDING, FULL]},
    "mistral": WINDOW,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": EXPERTS | {"num_experts": 4},
    "smollm3": TIED | {"no_rope_layers": [1, 0]},
    "lfm2": TIED | {"layer_types": ["conv", FULL], "block_auto_adjust_ff_dim": False},
    "falcon_h1": {
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_chunk_size": 8,
    },
}


def config_of(name: str, vocabulary: int, **changes: Any) -> PreTrainedConfig:
    """A row's config, with `changes` made to it."""
    row, sizes = ARCHITECTURES[name] | changes, SIZES | {"vocab_size": vocabulary}
    return CONFIG_MAPPING[name](
        **row | {"text_config": sizes | row["text_config"]} if is_composite(name) else sizes | row
    )


def is_composite(name: str) -> bool:
    """Whether it also sees or hears."""
    return "text_config" in ARCHITECTURES[name]


def kind(name: str) -> tuple[bool, ...]:
    """What sets it apart: whether it has towers beside its language model, experts, windows."""
    row = ARCHITECTURES[name]
    return is_composite(name), "num_experts_per_tok" in row, "sliding_window" in row


def published(name: str, vocabulary: int, **changes: Any) -> PreTrainedModel:
    """The model that a publisher would save, in evaluation mode: float32, of random weights that bfloat16 can hold."""
    config = config_of(name, vocabulary, **changes)
    classes = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if is_composite(name) else MODEL_FOR_CAUSAL_LM_MAPPING
    torch.manual_seed(0)
    model = classes[type(config)](config)
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() > 1:  # wide enough that the likeliest token is so beyond rounding
                param.normal_(std=1.5 / param.shape[-1] ** 0.5)
            param.copy_(param.bfloat16())
    return model.eval()


def write(name: str, folder: Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Save it in bfloat16 with a tokenizer, as its publisher lays it out; returns the model."""
    model = published(name, len(tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    deepcopy(model).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def told(name: str) -> str:
    """The row of docs/models.md, and of its English twin, on an architecture: what the package makes of it."""
    config = config_of(name, 300).get_text_config()
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    own = {name, config.model_type} - (ARCHITECTURES.keys() - {name})
    users = [each.name for each in profiles().values() if each.architecture in own]
    layers = {type(layer) for layer in DynamicCache(config=config).layers}
    kept = "prefix"
    if layers != {DynamicLayer}:
        kept = "window" if layers <= {DynamicLayer, DynamicSlidingWindowLayer} else "append"
    cells = [
        f"`{name}`",
        type(model).__name__ + (" †" if is_composite(name) else ""),
        ", ".join(users) or "—",
        "✗" if experts(model) else "✓",
        " ".join(f"`{layer}`" for layer in find_all_linear_names(model)) + (" ‡" if experts(model) else ""),
        kept,
        "✗" if why_padded(SimpleNamespace(get_base_model=lambda: model)) else "✓",
    ]
    return f"| {' | '.join(cells)} |"


def profile_told(profile: Profile) -> str:
    """The row of docs/models.md, and of its English twin, on a model that the course can be run with."""
    needs = [f"{size / GB:.1f} GB" for size in (profile.bytes, profile.memory, profile.memory_merged)]
    cells = [
        f"`{profile.name}`",
        profile.id if profile.source == "modelscope" else "—",
        {profile.id: "=", None: "—"}.get(profile.huggingface, profile.huggingface),
        f"`{profile.architecture}`" if profile.architecture else "—",
        *needs,
        smallest_card(max(profile.memory, profile.memory_merged)),
        {"no": "—", "told": "on, off", "always": "always"}[profile.thinks],
        profile.licence,
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(*map(profile_told, profiles().values()), "", *map(told, ARCHITECTURES), sep="\n")
