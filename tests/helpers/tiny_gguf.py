"""A GGUF file of a tiny Qwen2, as llama.cpp writes it."""

import gguf
import numpy as np

SIZES = {"embedding_length": 64, "block_count": 1, "feed_forward_length": 96, "context_length": 128}


def tiny_gguf(
    path, tied: bool, chat_template: str = "{{ messages }}", kind: str = "Q8_0", times: float = 1, splits: str = "qwen2"
) -> dict[str, np.ndarray]:
    """A Qwen2 of one layer, as llama.cpp writes it, its matrices stored as `kind`; and its tensors before that, which
    are `times` as large as usual. `splits`: llama.cpp's name for how a text is split before it is encoded."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "qwen2")
    for key, value in SIZES.items():
        getattr(writer, f"add_{key}")(value)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    tokens = [*map(chr, range(33, 127)), "ab", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splits)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 3) + [3] * 3)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_pad_token_id(len(tokens) - 1)
    writer.add_chat_template(chat_template)
    block = "blk.0."
    shapes = {"token_embd.weight": (len(tokens), 64), "output_norm.weight": (64,)}
    shapes |= {f"{block}{name}.weight": shape for name, shape in {
        "attn_norm": (64,), "ffn_norm": (64,), "attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64),
        "attn_output": (64, 64), "ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}.items()}  # fmt: skip
    shapes |= {f"{block}attn_{name}.bias": (size,) for name, size in {"q": 64, "k": 32, "v": 32}.items()}
    tensors = {name: times * rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    tensors["output.weight"] = tensors["token_embd.weight"] * (1 if tied else 2)
    for name, tensor in tensors.items():
        stored = gguf.GGMLQuantizationType[kind if tensor.ndim == 2 else "F32"]
        writer.add_tensor(name, gguf.quantize(tensor, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors
