"""Baichuan 1 and 2, 7B and 13B: Llamas whose q, k and v are one matrix.

The head of Baichuan 2 is a NormHead (modeling_baichuan.py), whose rows are divided by their length at every
forward: here once, while loading. For training that is the same only while the head is frozen, as it is under
an adapter. The 13B has ALiBi in place of rotary positions; what tells it apart is that its config has no
`max_position_embeddings`.
"""

from pathlib import Path

import torch
from torch.nn.functional import normalize
from transformers import LlamaConfig, PreTrainedTokenizerFast

from ..checkpoint import read_json
from .alibi import BaichuanAlibiConfig
from .native import fast_tokenizer, llama_shape
from .sentencepiece import build_tokenizer

NAME = "Baichuan2"
TENSORS = {".self_attn.W_pack.": [".self_attn.q_proj.", ".self_attn.k_proj.", ".self_attn.v_proj."]}
STOP_IDS = [2]
CHAT_TEMPLATE = """\
{%- set marks = {'system': '', 'user': '<reserved_106>', 'assistant': '<reserved_107>'} -%}
{%- for message in messages -%}
    {{- marks[message.role] + message.content -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- marks.assistant -}}
{%- endif -%}
"""


class NormalisedRows:
    """A matrix that is divided by the length of each row, in `dtype`, when it is read and not before."""

    def __init__(self, matrix: torch.Tensor, dtype: torch.dtype) -> None:
        self.matrix, self.shape, self.dtype = matrix, matrix.shape, dtype

    def __getitem__(self, index: slice) -> torch.Tensor:
        return normalize(self.matrix[index].to(self.dtype))


def recognises(config: dict, folder: Path) -> bool:
    """Baichuan 1 and 2 have the same model type."""
    return config.get("model_type") == "baichuan"


def native_config(config: dict) -> LlamaConfig:
    """A Llama's; for the 13B, which has no rotary positions, a BaichuanAlibiConfig."""
    if "max_position_embeddings" in config:
        rotary = {"rope_type": "default", "rope_theta": 10000.0}
        return LlamaConfig(**llama_shape(config), rope_parameters=rotary)
    return BaichuanAlibiConfig(**llama_shape(config), max_position_embeddings=config["model_max_length"])


def adapt(weights: dict, config: dict, dtype: torch.dtype) -> None:
    """Divide the rows of Baichuan 2's head by their length."""
    if config["vocab_size"] != 64000:  # Baichuan 1 has a plain head
        weights["lm_head.weight"] = NormalisedRows(weights["lm_head.weight"], dtype)


def tokenizer(folder: Path, config: dict) -> PreTrainedTokenizerFast:
    """The fast tokenizer of `tokenizer.model`, with Baichuan 2's chat template."""
    backend = build_tokenizer(folder / "tokenizer.model", special=[f"<reserved_{n}>" for n in range(1000)])
    published = read_json(folder / "tokenizer_config.json")
    return fast_tokenizer(
        backend,
        folder,
        CHAT_TEMPLATE,
        model_max_length=config["model_max_length"],
        add_bos_token=published.get("add_bos_token", False),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
    )
