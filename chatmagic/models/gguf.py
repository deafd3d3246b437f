"""A model's folder as a GGUF file: converted by llama.cpp's own converter, quantised with llama.cpp's own `gguf`."""

import os
import subprocess
import sys
from math import prod
from pathlib import Path

import numpy as np
from gguf import (
    GGML_QUANT_SIZES,
    GGML_QUANT_VERSION,
    GGMLQuantizationType,
    GGUFReader,
    GGUFValueType,
    GGUFWriter,
    Keys,
    LlamaFileType,
    ReaderTensor,
    dequantize,
    quant_shape_to_byte_shape,
    quantize,
)

from ..errors import ChatmagicError
from ..files import FULL, remove
from ..progress import Bar
from .checkpoint import read_json

# gguf (0.19) slices a numpy.memmap some two million times to read a vocabulary, each slice of which costs five of an
# array's, and transformers (5.23) opens a reader for the tokenizer and another for the config.
GGUFReader.data = property(
    lambda self: self.__dict__["data"], lambda self, data: vars(self).update(data=np.asarray(data))
)

# How matrices are stored: at 4 bit all but embeddings and head, which stay at 8.
MATRIX_TYPES = {"f16": GGMLQuantizationType.F16, "q8_0": GGMLQuantizationType.Q8_0, "q4_0": GGMLQuantizationType.Q4_0}
FILE_TYPES = {kind: LlamaFileType[f"MOSTLY_{kind.upper()}"] for kind in MATRIX_TYPES}
OUTER = ("token_embd.", "output.", "per_layer_token_embd.")
BITS_16 = (GGMLQuantizationType.F16, GGMLQuantizationType.BF16)
SCALES = (8.0, 6.5, 7.0, 7.5, 8.5, 9.0)  # steps from zero to the largest number of a block
AT_ONCE = 2**17  # numbers at a time, in float32: few enough to stay in the cache
CONVERTER = "convert_hf_to_gguf.py"


class ExportError(ChatmagicError):
    """A model that cannot become what was asked for. Nothing was written."""


def write_gguf(folder: Path, file: Path, kind: str, converter: Path, name: str, stops: list[int]) -> None:
    """Write the model in `folder` to the new `file`, its matrices as `kind`, one of MATRIX_TYPES. What the converter
    makes on the way lies beside it and takes 16 bit a weight.

    converter: the folder that holds llama.cpp's. name: the model's, in the file. stops: the ids that end a reply, of
    which llama.cpp stops at the tokenizer's own `eos` by itself.

    Raises ExportError where llama.cpp does not know the model.
    """
    _check_convertible(folder)
    whole = file.with_name("16-bit.gguf")
    command = [sys.executable, str(converter / CONVERTER), str(folder), "--outtype", "auto"]
    command += ["--outfile", str(whole), "--model-name", name]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        if full := next((each for each in FULL if f"[Errno {each}]" in said), None):
            raise OSError(full, said)  # which says nothing of the model
        raise ExportError(
            f"llama.cpp's converter does not convert {folder}; it says: {said} Serve it as it is: chatmagic serve "
            f"{folder}"
        )
    _quantise(whole, file, kind, stops)
    remove(whole)


def _check_convertible(folder: Path) -> None:
    config = read_json(folder / "config.json")
    if config.get("quantization_config"):
        raise ExportError(f"{folder} is quantised. Export the 16-bit model that it was made from.")
    for name, is_it in {
        "Baichuan-13B": config.get("model_type") == "baichuan_alibi",
        "ChatGLM2": config.get("model_type") == "glm" and config.get("vocab_size") == 65024,
    }.items():
        if is_it:
            raise ExportError(f"llama.cpp reads no {name} like this. Serve it as it is: chatmagic serve {folder}")
    if (folder / "tokenizer.model").is_file():
        import sentencepiece  # noqa: F401, which the converter reads it with


def _quantise(source: Path, target: Path, kind: str, stops: list[int]) -> None:
    """Copy a GGUF file of 16 bit, its matrices as `kind`."""
    reader = GGUFReader(source)
    fields = reader.fields
    writer = GGUFWriter(target, fields[Keys.General.ARCHITECTURE].contents())
    ours = (Keys.General.ARCHITECTURE, Keys.General.FILE_TYPE, Keys.General.QUANTIZATION_VERSION)
    for field in fields.values():
        if field.name not in ours and not field.name.startswith("GGUF."):
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    eos = fields[Keys.Tokenizer.EOS_ID].contents() if Keys.Tokenizer.EOS_ID in fields else None
    if stops and eos not in (None, stops[0]) and Keys.Tokenizer.EOT_ID not in fields:
        writer.add_eot_token_id(stops[0])
    made = [(tensor, _kind_of(tensor, MATRIX_TYPES[kind])) for tensor in reader.tensors]
    for tensor, each in made:
        shape = tuple(map(int, reversed(tensor.shape)))
        size = prod(quant_shape_to_byte_shape(shape, each))
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), size, each)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, each in Bar(made, desc=f"quantising to {kind}"):
        writer.write_tensor_data(tensor.data if each == tensor.tensor_type else _quantised(tensor, each))
    writer.close()


def _kind_of(tensor: ReaderTensor, kind: GGMLQuantizationType) -> GGMLQuantizationType:
    """As what a tensor is stored: what the converter left at 32 bit stays there."""
    if tensor.tensor_type not in BITS_16:
        return tensor.tensor_type
    if tensor.shape[0] % GGML_QUANT_SIZES[kind][0]:  # the length of a row
        return GGMLQuantizationType.F16
    return GGMLQuantizationType.Q8_0 if kind == GGMLQuantizationType.Q4_0 and tensor.name.startswith(OUTER) else kind


def _quantised(tensor: ReaderTensor, kind: GGMLQuantizationType) -> np.ndarray:
    """Some rows after the other, since in between they are in float32."""
    rows = tensor.data.reshape(-1, tensor.data.shape[-1])
    blocks = []
    for start in range(0, len(rows), step := max(AT_ONCE // int(tensor.shape[0]), 1)):
        numbers = dequantize(rows[start : start + step], tensor.tensor_type)
        blocks.append(_q4_0(numbers) if kind == GGMLQuantizationType.Q4_0 else quantize(numbers, kind))
        if kind == GGMLQuantizationType.F16 and not np.isfinite(blocks[-1]).all():
            raise ExportError(f"{tensor.name} holds numbers that float16 does not. Take q8_0: --quantize q8_0.")
    return np.concatenate(blocks)


def _q4_0(numbers: np.ndarray) -> np.ndarray:
    """Q4_0 as `gguf` writes it, but each block of 32 with the scale, of some, that leaves the least squared error, as
    llama.cpp's own `make_qx_quants` (ggml-quants.c) seeks it: `gguf` takes the first of them, which has cost a small
    model its new name (benchmarks/export.py)."""
    blocks = numbers.reshape(-1, 32).astype(np.float32, copy=False)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(1, keepdims=True), 1)
    inverse = np.divide(1, largest, out=np.zeros_like(largest), where=largest != 0)
    least, scale, codes = np.full_like(largest, np.inf), np.zeros_like(largest), np.zeros_like(blocks)
    for steps in SCALES:
        code = np.clip(np.rint(blocks * (inverse * -steps)), -8, 7)
        length = np.square(code).sum(1, keepdims=True)
        best = (blocks * code).sum(1, keepdims=True) / np.maximum(length, 1)
        best = best.astype(np.float16).astype(np.float32)
        error = np.square(blocks - best * code).sum(1, keepdims=True)
        better = error < least
        least, scale = np.where(better, error, least), np.where(better, best, scale)
        codes = np.where(better, code, codes)
    nibbles = (codes + 8).astype(np.uint8).reshape(-1, 2, 16)
    packed = np.concatenate([scale.astype(np.float16).view(np.uint8), nibbles[:, 0] | nibbles[:, 1] << 4], axis=1)
    return packed.reshape(*numbers.shape[:-1], -1)
