"""A GGUF file, as llama.cpp quantises a model, as a folder of bfloat16 safetensors with config and tokenizer.

transformers reads one too, all of it in float32 at once, and keeps a quantisation mark that refuses `save_pretrained`.
Here the file's rows go one block after another into the new file, by gguf's own table of names.
"""

from functools import partial
from math import prod
from pathlib import Path

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, ReaderTensor, dequantize, get_tensor_name_map
from tokenizers import normalizers, pre_tokenizers
from transformers import TOKENIZER_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

from ..progress import Bar
from .gguf import GGUFReader
from .portable import make_portable
from .shard import Part, write_shard


def unpack_gguf(gguf: Path, folder: Path) -> None:
    """Write the model in `gguf`, Llama's or Qwen2's, to the empty `folder`: at most 2 GiB of memory beyond its imports.

    The output head is tied to the embedding where the file has none, or the same values under both names.
    """
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    kind = TOKENIZER_MAPPING.get(
        type(config), PreTrainedTokenizerFast
    )  # as AutoTokenizer, which would read the config again
    tokenizer = kind.from_pretrained(gguf.parent, gguf_file=gguf.name)
    reader, backend = GGUFReader(gguf), tokenizer.backend_tokenizer
    if config.model_type == "qwen2":  # the publisher's tokenizer has it, and GGUF no field for it
        backend.normalizer = normalizers.NFC()
    if (splits := reader.fields.get("tokenizer.ggml.pre")) and splits.contents() == "smollm":  # transformers reads none
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    # Some files pad with the token that ends a turn, which would then be masked.
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.model_max_length = config.max_position_embeddings
    stored = {tensor.name: tensor for tensor in reader.tensors}
    config.tie_word_embeddings = same(stored["token_embd.weight"], stored.get("output.weight"))
    config.pad_token_id, config.dtype = tokenizer.pad_token_id, torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    processor = TENSOR_PROCESSORS.get(config.model_type, TensorProcessor)(config=config.to_dict())
    architecture = next(each for each, name in MODEL_ARCH_NAMES.items() if name == config.model_type)
    table = get_tensor_name_map(architecture, config.num_hidden_layers)
    parts = {}
    for name, meta in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        layer, _, kind = name.rpartition(".")
        tensor = stored[f"{table.get_name(layer)}.{kind}"]
        parts[name] = Part(torch.bfloat16, tuple(meta.shape), partial(Rows, tensor, processor))
    with Bar(
        total=sum(2 * prod(part.shape) for part in parts.values()), unit="B", unit_scale=True, desc="unpacking"
    ) as bar:
        write_shard(folder / "model.safetensors", parts, bar.update)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    for saved in (config, model.generation_config, tokenizer):
        saved.save_pretrained(folder)
    make_portable(folder)


def same(embedding: ReaderTensor, head: ReaderTensor | None) -> bool:
    """Whether a head is no other than the embedding: it is not in the file, or stands there twice."""
    return head is None or (head.tensor_type == embedding.tensor_type and np.array_equal(head.data, embedding.data))


class Rows:
    """The rows of a tensor of a GGUF file, dequantised as they are asked for; bfloat16."""

    def __init__(self, tensor: ReaderTensor, processor: TensorProcessor) -> None:
        self.data, self.type = np.array(tensor.data), tensor.tensor_type
        if type(processor) is not TensorProcessor:  # which reorders rows: not by the block, but these are small
            whole = processor.process(weights=dequantize(self.data, self.type), name=tensor.name).weights
            self.data, self.type = np.ascontiguousarray(whole, dtype=np.float32), 0

    def __getitem__(self, some: slice) -> torch.Tensor:
        return torch.from_numpy(dequantize(self.data[some], self.type)).to(torch.bfloat16)
