"""Tiny checkpoints of random weights, each in the layout that its publisher ships.

The tensors' names, the keys of the JSON files and the ids of control tokens are the publishers' (their config.json,
modeling_*.py and tokenization_*.py). The sizes, the weights and all other pieces of the tokenizers are made here:
SentencePiece and tiktoken files, trained on the page of text beside this file.
"""

import base64
import io
import json
import struct
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby
from pathlib import Path

import torch
from safetensors.torch import save_file
from sentencepiece import SentencePieceTrainer
from tiktoken._educational import bpe_train

PAGE = Path(__file__).with_name("page.txt").read_text("utf-8")
USER_DEFINED, UNUSED = 4, 5  # SentencePiece.Type of sentencepiece_model.proto
LEARNT = 500  # pieces

# Baichuan2's user-defined pieces are 3 to 1088; the first of them are tags, digits and punctuation, as there.
FOUND = [
    "<SEP>",
    "<CLS>",
    "\n",
    "\t",
    "<b>",
    "</b>",
    *"０１２３４５６７８９+-=，。！？、：.!?《》",
    "...",
    "```",
    "---",
]
FOUND += [f"<h{n}>" for n in range(98 - len(FOUND))]
FOUND += [f"<reserved_{n}>" for n in range(12, 1000)]
ENDS = ["<eoh>", "<eoa>", *(f"<TOKENS_UNUSED_{n}>" for n in range(2, 141))]  # InternLM's last
WORDS = (  # Qwen's, tokenization_qwen.py: PAT_STR
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@cache
def sentencepiece(size: int, found: tuple[str, ...] = (), ends: tuple[str, ...] = (), prefix: bool = True) -> bytes:
    """A `tokenizer.model` of `size` pieces, BPE with byte fallback: those `found` in any text, bytes, learnt ones, and
    before the user-defined `ends` as many unused ones as are wanting. `prefix`: a text begins with a space."""
    trained = 3 + len(found) + 256 + LEARNT
    SentencePieceTrainer.train(
        sentence_iterator=iter(PAGE.splitlines()),
        model_writer=(file := io.BytesIO()),
        model_type="bpe",
        vocab_size=trained,
        user_defined_symbols=list(found),
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    unused = [(f"<unused {n}>", UNUSED) for n in range(size - trained - len(ends))]
    return file.getvalue() + b"".join(_piece(*each) for each in [*unused, *((text, USER_DEFINED) for text in ends)])


def _piece(text: str, kind: int) -> bytes:
    """One more of a ModelProto's `pieces`, a repeated field: text, score and type, all shorter than 128 bytes."""
    message = b"\x0a" + bytes([len(text)]) + text.encode() + b"\x15" + struct.pack("<f", 0.0) + b"\x18" + bytes([kind])
    return b"\x0a" + bytes([len(message)]) + message


@cache
def tiktoken(size: int) -> bytes:
    """A `qwen.tiktoken` of `size` tokens, one a line with its rank; most of them are of bytes that no text has."""
    learnt = bpe_train(PAGE, 256 + LEARNT, WORDS, visualise=None)
    unused = (b"\xff\xfe" + number.to_bytes(3, "big") for number in range(size - len(learnt)))
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate([*learnt, *unused]))


@dataclass(frozen=True)
class Published:
    """How one model is shipped, and what is to be made of it.

    template   its row in families.toml
    native     the class that it is read into
    control    the ids of its control tokens, which nobody's text may hold
    stops      the ids that end a reply, first the one that is taught, and `tail`, what follows it in a row
    limit      tokens that a conversation may have
    tokenizer  the name and the content of its tokenizer's file
    tensors    a name and the letters of its sizes in `sizes`, a line each; one with `*` in it is there for both layers
    shards     of `pytorch_model.bin`; 0: safetensors
    """

    template: str
    native: str
    control: set[int]
    stops: list[int]
    limit: int
    tokenizer: tuple[str, partial]
    sizes: dict[str, int]
    tensors: str
    config: dict
    generation: dict
    tokenizer_config: dict
    shards: int = 0
    tail: str = ""

    def shapes(self) -> dict[str, list[int]]:
        shapes = {}
        for in_layers, lines in groupby(map(str.split, self.tensors.split("\n")), lambda line: "*" in line[0]):
            lines = list(lines)
            for layer in range(2 if in_layers else 1):
                for name, *letters in lines:
                    shapes[name.replace("*", str(layer))] = [self.sizes[letter] for letter in letters]
        return shapes


def write(name: str, folder: Path) -> Path:
    """The checkpoint of that name, in a new folder. Its Python files end the process that runs them."""
    model = MODELS[name]
    folder.mkdir()
    for file, content in (("config", model.config), ("generation_config", model.generation),
                          ("tokenizer_config", model.tokenizer_config)):  # fmt: skip
        (folder / f"{file}.json").write_text(json.dumps(content, indent=1))
    for code in {code.split(".")[0] for code in model.config.get("auto_map", {}).values()}:
        (folder / f"{code}.py").write_text("import os\nos._exit(9)\n")
    file, content = model.tokenizer
    (folder / file).write_bytes(content())
    generator = torch.Generator().manual_seed(0)
    weights = {key: _draw(key, shape, generator) for key, shape in model.shapes().items()}
    if not model.shards:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    elif model.shards == 1:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        files, size = {}, -(-len(weights) // model.shards)
        for index, key in enumerate(weights):
            files.setdefault(f"pytorch_model-{index // size + 1:05d}-of-{model.shards:05d}.bin", []).append(key)
        for file, keys in files.items():
            torch.save({key: weights[key] for key in keys}, folder / file)
        index = {"metadata": {}, "weight_map": {key: file for file, keys in files.items() for key in keys}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def _draw(name: str, shape: list[int], generator: torch.Generator) -> torch.Tensor:
    """Random bfloat16: a norm around 1, a matrix narrow, a bias wider."""
    values = torch.randn(shape, generator=generator)
    if len(shape) == 1 and not name.endswith("bias"):
        return (1 + 0.3 * values).bfloat16()
    return (values * (0.5 if len(shape) == 1 else 0.3)).bfloat16()


def _sizes(config: dict, **more) -> dict[str, int]:
    """V, H and I are everywhere vocabulary, width and inner width."""
    return {"V": config["vocab_size"], "H": config["hidden_size"], "I": config["intermediate_size"], **more}


LLAMA = """\
model.embed_tokens.weight V H
model.layers.*.input_layernorm.weight H
model.layers.*.self_attn.q_proj.weight H H
model.layers.*.self_attn.k_proj.weight H H
model.layers.*.self_attn.v_proj.weight H H
model.layers.*.self_attn.o_proj.weight H H
model.layers.*.post_attention_layernorm.weight H
model.layers.*.mlp.gate_proj.weight I H
model.layers.*.mlp.up_proj.weight I H
model.layers.*.mlp.down_proj.weight H I
model.norm.weight H
lm_head.weight V H"""
BAICHUAN = LLAMA.replace("q_proj.weight H H", "W_pack.weight P H")
BAICHUAN = "\n".join(line for line in BAICHUAN.split("\n") if "k_proj" not in line and "v_proj" not in line)
INTERNLM = LLAMA + "".join(f"\nmodel.layers.*.self_attn.{each}_proj.bias H" for each in "qkvo")
QWEN = """\
transformer.wte.weight V H
transformer.h.*.ln_1.weight H
transformer.h.*.attn.c_attn.weight P H
transformer.h.*.attn.c_attn.bias P
transformer.h.*.attn.c_proj.weight H H
transformer.h.*.ln_2.weight H
transformer.h.*.mlp.w1.weight I H
transformer.h.*.mlp.w2.weight I H
transformer.h.*.mlp.c_proj.weight H I
transformer.ln_f.weight H
lm_head.weight V H"""
CHATGLM2 = """\
transformer.embedding.word_embeddings.weight V H
transformer.rotary_pos_emb.inv_freq R
transformer.encoder.layers.*.input_layernorm.weight H
transformer.encoder.layers.*.self_attention.query_key_value.weight P H
transformer.encoder.layers.*.self_attention.query_key_value.bias P
transformer.encoder.layers.*.self_attention.dense.weight H H
transformer.encoder.layers.*.post_attention_layernorm.weight H
transformer.encoder.layers.*.mlp.dense_h_to_4h.weight J H
transformer.encoder.layers.*.mlp.dense_4h_to_h.weight H I
transformer.encoder.final_layernorm.weight H
transformer.output_layer.weight V H"""


def baichuan2(width: int, heads: int, shards: int, **position) -> Published:
    config = {
        "architectures": ["BaichuanForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_baichuan.BaichuanConfig",
            "AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM",
        },
        "tokenizer_class": "BaichuanTokenizer",
        "model_type": "baichuan",
        "vocab_size": 1900,
        "hidden_size": width,
        "intermediate_size": 24,
        "num_attention_heads": heads,
        "num_hidden_layers": 2,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-06,
        "model_max_length": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **position,
    }
    return Published(
        template="baichuan2-chat",
        native="LlamaForCausalLM" if position else "BaichuanAlibiForCausalLM",
        control={0, 1, 2, 3, 4, *range(101, 1089)}, stops=[2], limit=4096,
        tokenizer=("tokenizer.model", partial(sentencepiece, 1900, found=tuple(FOUND), prefix=False)),
        sizes=_sizes(config, P=3 * width),
        tensors=BAICHUAN,
        shards=shards,
        config=config,
        generation={
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "user_token_id": 195, "assistant_token_id": 196,
            "max_new_tokens": 2048, "temperature": 0.3, "top_k": 5, "top_p": 0.85, "repetition_penalty": 1.05,
            "do_sample": True,
        },
        tokenizer_config={
            "add_bos_token": False, "add_eos_token": False, "bos_token": "<s>", "eos_token": "</s>",
            "unk_token": "<unk>", "pad_token": "<unk>", "model_max_length": 4096,
            "tokenizer_class": "BaichuanTokenizer",
            "auto_map": {"AutoTokenizer": ["tokenization_baichuan.BaichuanTokenizer", None]},
        },
    )  # fmt: skip


def qwen(width: int, inner: int, heads: int) -> Published:
    config = {
        "architectures": ["QWenLMHeadModel"],
        "auto_map": {
            "AutoConfig": "configuration_qwen.QWenConfig",
            "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
        },
        "tokenizer_class": "QWenTokenizer",
        "model_type": "qwen",
        "vocab_size": 151936,
        "hidden_size": width,
        "intermediate_size": 2 * inner,  # of w1 and w2 together
        "num_attention_heads": heads,
        "num_hidden_layers": 2,
        "kv_channels": width // heads,
        "layer_norm_epsilon": 1e-06,
        "max_position_embeddings": 32768,
        "seq_length": 8192,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "no_bias": True,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
    }
    return Published(
        template="qwen-7b-chat",
        native="Qwen2ForCausalLM",
        control={*range(151643, 151851)}, stops=[151645, 151643, 151644], tail="\n", limit=8192,
        tokenizer=("qwen.tiktoken", partial(tiktoken, 151643)),
        sizes=_sizes(config, P=3 * width) | {"I": inner},
        tensors=QWEN,
        config=config,
        generation={
            "chat_format": "chatml", "eos_token_id": 151643, "pad_token_id": 151643, "max_window_size": 6144,
            "max_new_tokens": 512, "do_sample": True, "top_k": 0, "top_p": 0.8, "repetition_penalty": 1.1,
        },
        tokenizer_config={
            "model_max_length": 32768, "tokenizer_class": "QWenTokenizer",
            "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
        },
    )  # fmt: skip


def internlm() -> Published:
    config = {
        "architectures": ["InternLMForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_internlm.InternLMConfig",
            "AutoModelForCausalLM": "modeling_internlm.InternLMForCausalLM",
        },
        "model_type": "internlm",
        "vocab_size": 103168,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "bias": True,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    return Published(
        template="internlm-chat",
        native="LlamaForCausalLM",
        control={0, 1, 2, *range(103027, 103168)}, stops=[103028, 2], tail="\n", limit=2048,
        tokenizer=("tokenizer.model", partial(sentencepiece, 103168, ends=tuple(ENDS), prefix=False)),
        sizes=_sizes(config),
        tensors=INTERNLM,
        shards=1,
        config=config,
        generation={"eos_token_id": [2, 103028], "bos_token_id": 1, "pad_token_id": 2},
        tokenizer_config={
            "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>",
            "model_max_length": int(1e30), "tokenizer_class": "InternLMTokenizer",
            "auto_map": {"AutoTokenizer": ["tokenization_internlm.InternLMTokenizer", None]},
        },
    )  # fmt: skip


def chatglm2() -> Published:
    config = {
        "_name_or_path": "THUDM/chatglm2-6b",
        "architectures": ["ChatGLMModel"],
        "auto_map": {
            "AutoConfig": "configuration_chatglm.ChatGLMConfig",
            "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
        },
        "model_type": "chatglm",
        "padded_vocab_size": 65024,
        "hidden_size": 32,
        "ffn_hidden_size": 24,
        "num_attention_heads": 4,
        "num_layers": 2,
        "kv_channels": 8,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "layernorm_epsilon": 1e-05,
        "rmsnorm": True,
        "original_rope": True,
        "seq_length": 32768,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return Published(
        template="chatglm2",
        native="GlmForCausalLM",
        control={0, 1, 2, *range(64789, 64795)},
        stops=[2],
        limit=32768,
        tokenizer=("tokenizer.model", partial(sentencepiece, 64789)),
        sizes={"V": 65024, "H": 32, "P": 32 + 2 * 2 * 8, "I": 24, "J": 48, "R": 2},
        tensors=CHATGLM2,
        shards=1,
        config=config,
        generation={"eos_token_id": 2, "pad_token_id": 0},
        tokenizer_config={
            "tokenizer_class": "ChatGLMTokenizer",
            "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
        },
    )


def llama2() -> Published:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 800,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    }
    return Published(
        template="llama-2",
        native="LlamaForCausalLM",
        control={0, 1, 2}, stops=[2], limit=4096,
        tokenizer=("tokenizer.model", partial(sentencepiece, 800)),
        sizes=_sizes(config),
        tensors=LLAMA,
        config=config,
        generation={
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "temperature": 0.6, "top_p": 0.9,
            "do_sample": True, "max_length": 4096,
        },
        tokenizer_config={
            "add_bos_token": True, "add_eos_token": False, "bos_token": "<s>", "eos_token": "</s>",
            "unk_token": "<unk>", "pad_token": None, "model_max_length": 4096, "legacy": False,
            "tokenizer_class": "LlamaTokenizer",
        },
    )  # fmt: skip


MODELS = {
    "baichuan2-7b-chat": baichuan2(width=16, heads=2, shards=2, max_position_embeddings=4096),
    "baichuan2-13b-chat": baichuan2(width=20, heads=5, shards=3),
    "qwen-7b-chat": qwen(width=16, inner=24, heads=2),
    "qwen-14b-chat": qwen(width=24, inner=28, heads=3),
    "internlm-chat-7b": internlm(),
    "chatglm2-6b": chatglm2(),
    "llama-2-13b-chat": llama2(),
}
