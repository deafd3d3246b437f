"""InternLM-7B (1.0): a Llama whose attention has biases, in all four projections."""

from pathlib import Path

from transformers import LlamaConfig, PreTrainedTokenizerFast

from .native import fast_tokenizer, llama_shape
from .sentencepiece import build_tokenizer

NAME = "InternLM"
TENSORS: dict[str, list[str]] = {}
STOP_IDS = [103028, 2]  # <eoa>, which InternLM's own files do not mark special, and </s>
CHAT_TEMPLATE = """\
{%- set marks = {'system': '<|System|>:', 'user': '<|User|>:', 'assistant': '<|Bot|>:'} -%}
{{- bos_token -}}
{%- for message in messages -%}
    {{- marks[message.role] + message.content + ('<eoa>' if message.role == 'assistant' else '') + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- marks.assistant -}}
{%- endif -%}
"""


def recognises(config: dict, folder: Path) -> bool:
    """InternLM 2 has a model type of its own, and is none of these."""
    return config.get("model_type") == "internlm"


def native_config(config: dict) -> LlamaConfig:
    """A Llama's with biases, and the reason why its context ends where it does."""
    native = LlamaConfig(
        **llama_shape(config),
        attention_bias=config["bias"],
        rope_parameters={"rope_type": "default", "rope_theta": config.get("rope_theta", 10000.0)},
    )
    native.context_limit_reason = (
        "beyond it, InternLM's own code rescales the rotary positions of what it keeps, which transformers' "
        "Llama does not"
    )
    return native


def tokenizer(folder: Path, config: dict) -> PreTrainedTokenizerFast:
    """The fast tokenizer of `tokenizer.model`, which begins a text with <s>."""
    return fast_tokenizer(
        build_tokenizer(folder / "tokenizer.model"),
        folder,
        CHAT_TEMPLATE,
        model_max_length=config["max_position_embeddings"],
        add_bos_token=True,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
    )
