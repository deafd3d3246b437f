"""ChatGLM2-6B: a Glm, with two key-value heads, under Megatron's names."""

from pathlib import Path
from typing import ClassVar

from tokenizers import AddedToken, processors
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GlmConfig, GlmForCausalLM, PreTrainedTokenizerFast

from .native import fast_tokenizer
from .sentencepiece import build_tokenizer

NAME = "ChatGLM2"
TENSORS = {
    "transformer.embedding.word_embeddings.": ["model.embed_tokens."],
    "transformer.encoder.final_layernorm.": ["model.norm."],
    "transformer.encoder.layers.": ["model.layers."],
    "transformer.output_layer.": ["lm_head."],
    ".self_attention.query_key_value.": [".self_attn.q_proj.", ".self_attn.k_proj.", ".self_attn.v_proj."],
    ".self_attention.dense.": [".self_attn.o_proj."],
    ".mlp.dense_h_to_4h.": [".mlp.gate_up_proj."],
    ".mlp.dense_4h_to_h.": [".mlp.down_proj."],
}
# tokenization_chatglm.py: these ids follow the file's; each text is led by [gMASK] and sop.
COMMANDS = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]
STOP_IDS = [2]
CHAT_TEMPLATE = """\
{{- '[gMASK]sop' -}}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {{- '[Round ' + (loop.index0 // 2 + 1) | string + ']\\n\\n问：' + message.content + '\\n\\n' -}}
    {%- elif message.role == 'assistant' -%}
        {{- '答：' + message.content + '\\n\\n' -}}
    {%- else -%}
        {{- raise_exception('ChatGLM2 knows no system text: put it into the first question.') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '答：' -}}
{%- endif -%}
"""


class ChatGLM2Config(GlmConfig):
    """A GlmConfig that finds the size of the vocabulary in the published config.json too.

    PEFT looks for it there, and takes any other number for a resized vocabulary, which it saves with the
    adapter.
    """

    attribute_map: ClassVar = {"padded_vocab_size": "vocab_size"}


MODEL_FOR_CAUSAL_LM_MAPPING.register(ChatGLM2Config, GlmForCausalLM, exist_ok=True)


def recognises(config: dict, folder: Path) -> bool:
    """ChatGLM, ChatGLM3 and GLM-4 have the same model type, and other tensors, prompts or vocabularies."""
    return (
        config.get("model_type") == "chatglm"
        and config.get("padded_vocab_size") == 65024
        and config.get("rope_ratio", 1) == 1
        and "chatglm3" not in f"{config.get('_name_or_path')} {folder.resolve()}".lower()
    )


def native_config(config: dict) -> ChatGLM2Config:
    """A Glm's, of modeling_chatglm.py's own numbers: GlmConfig's defaults are GLM-4's."""
    return ChatGLM2Config(
        vocab_size=config["padded_vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["ffn_hidden_size"],
        num_hidden_layers=config["num_layers"],
        num_attention_heads=config["num_attention_heads"],
        num_key_value_heads=config["multi_query_group_num"],
        head_dim=config["kv_channels"],
        max_position_embeddings=config["seq_length"],
        rms_norm_eps=config["layernorm_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        attention_bias=config["add_qkv_bias"],
        tie_word_embeddings=config["tie_word_embeddings"],
        eos_token_id=2,
        pad_token_id=0,
    )


def tokenizer(folder: Path, config: dict) -> PreTrainedTokenizerFast:
    """The fast tokenizer of `tokenizer.model` and its commands, which lead each text with [gMASK] and sop."""
    backend = build_tokenizer(folder / "tokenizer.model", extra=COMMANDS)
    lead = ["[gMASK]", "sop"]
    # "sop" must not be found in "sophisticated": as a whole word only
    backend.add_tokens([AddedToken(t, special=True, normalized=False, single_word=t.isalpha()) for t in lead])
    backend.post_processor = processors.TemplateProcessing(
        single="[gMASK] sop $A", special_tokens=[(token, backend.token_to_id(token)) for token in lead]
    )
    return fast_tokenizer(
        backend,
        folder,
        CHAT_TEMPLATE,
        model_max_length=config["seq_length"],
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
    )
