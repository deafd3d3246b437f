"""Qwen-7B and 14B (1.0): a Qwen2 whose q, k and v are one matrix, and whose gate and up go by other names."""

from pathlib import Path

from transformers import PreTrainedTokenizerFast, Qwen2Config

from .native import fast_tokenizer
from .tiktoken import build_tokenizer

NAME = "Qwen"
TENSORS = {
    "transformer.wte.": ["model.embed_tokens."],
    "transformer.h.": ["model.layers."],
    "transformer.ln_f.": ["model.norm."],
    ".ln_1.": [".input_layernorm."],
    ".ln_2.": [".post_attention_layernorm."],
    ".attn.c_attn.": [".self_attn.q_proj.", ".self_attn.k_proj.", ".self_attn.v_proj."],
    ".attn.c_proj.": [".self_attn.o_proj."],
    ".mlp.w1.": [".mlp.up_proj."],
    ".mlp.w2.": [".mlp.gate_proj."],
    ".mlp.c_proj.": [".mlp.down_proj."],
}
# tokenization_qwen.py: the pattern, and the control tokens from 151643 on.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{n}|>" for n in range(205))]
STOP_IDS = [151645, 151643, 151644]  # qwen_generation_utils.py stops at <|im_start|> as well
CHAT_TEMPLATE = """\
{%- if messages[0].role != 'system' -%}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def recognises(config: dict, folder: Path) -> bool:
    """Qwen 1.0; Qwen-VL has the same model type."""
    return config.get("model_type") == "qwen" and "visual" not in config


def native_config(config: dict) -> Qwen2Config:
    """A Qwen2's, whose context ends where the original would rescale its positions."""
    native = Qwen2Config(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"] // 2,  # published as the size of w1 and w2 together
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=config["num_attention_heads"],
        num_key_value_heads=config["num_attention_heads"],
        max_position_embeddings=config["seq_length"],
        rms_norm_eps=config["layer_norm_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": float(config["rotary_emb_base"])},
        tie_word_embeddings=config["tie_word_embeddings"],
        eos_token_id=151643,
        pad_token_id=151643,
    )
    native.context_limit_reason = (
        "beyond it, Qwen's own code stretches its rotary positions and scales its attention (dynamic NTK, "
        "log-n), which transformers' Qwen2 does not"
    )
    return native


def tokenizer(folder: Path, config: dict) -> PreTrainedTokenizerFast:
    """The fast tokenizer of `qwen.tiktoken` and its control tokens."""
    return fast_tokenizer(
        build_tokenizer(folder / "qwen.tiktoken", PATTERN, CONTROL_TOKENS),
        folder,
        CHAT_TEMPLATE,
        model_max_length=config["seq_length"],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
