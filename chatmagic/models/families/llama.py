"""Llama-2 as Meta ships it: native weights, and a `tokenizer.model`, which transformers reads by protobuf."""

from pathlib import Path

from transformers import LlamaConfig, PreTrainedTokenizerFast

from ...prompts.templates import LLAMA_2
from ..checkpoint import read_json
from .native import fast_tokenizer
from .sentencepiece import build_tokenizer

NAME = "Llama"
TENSORS: dict[str, list[str]] = {}
STOP_IDS = [2]
# meta-llama/llama, generation.py: chat_completion
CHAT_TEMPLATE = """\
{%- set system = messages[0].content if messages[0].role == 'system' else none -%}
{%- for message in (messages if system is none else messages[1:]) -%}
    {%- if message.role == 'user' -%}
        {%- set content = message.content -%}
        {%- if loop.first and system is not none -%}
            {%- set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + content -%}
        {%- endif -%}
        {{- bos_token + '[INST] ' + content | trim + ' [/INST]' -}}
    {%- else -%}
        {{- ' ' + message.content | trim + ' ' + eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""


def recognises(config: dict, folder: Path) -> bool:
    """A Llama without a tokenizer.json, so that its tokenizer.model must be read."""
    return (
        config.get("model_type") == "llama"
        and "quantization_config" not in config
        and (folder / "tokenizer.model").is_file()
        and not (folder / "tokenizer.json").is_file()
    )


def native_config(config: dict) -> LlamaConfig:
    """The published config, which is transformers' own."""
    return LlamaConfig.from_dict(config)


def tokenizer(folder: Path, config: dict) -> PreTrainedTokenizerFast:
    """The tokenizer, with Llama-2's chat template where the folder's name says so."""
    published = read_json(folder / "tokenizer_config.json")
    llama2_chat = LLAMA_2.search(str(folder.resolve()))
    return fast_tokenizer(
        build_tokenizer(folder / "tokenizer.model"),
        folder,
        published.get("chat_template") or (CHAT_TEMPLATE if llama2_chat else None),
        model_max_length=config["max_position_embeddings"],
        add_bos_token=published.get("add_bos_token", True),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
    )
