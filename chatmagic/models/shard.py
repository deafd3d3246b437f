"""A safetensors file, written block by block: no tensor needs to be in memory whole."""

import json
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import torch

from ..files import writing

DTYPES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
WORKERS, AT_A_TIME = 4, 2**19  # threads that copy, and bytes they copy at a time: few enough to stay in the cache


class Part(NamedTuple):
    """A tensor that is not read yet: `rows()[i:j]` are some of its rows."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    rows: Callable


def write_shard(target: Path, parts: dict[str, Part], wrote: Callable[[int], object] = lambda size: None) -> None:
    """Write the tensors to a safetensors file; `wrote` hears the bytes of each block."""
    entries, end = {}, 0
    for name, part in sorted(parts.items(), key=lambda item: -item[1].dtype.itemsize):
        start, end = end, end + math.prod(part.shape) * part.dtype.itemsize
        entries[name] = {"dtype": DTYPES[part.dtype], "shape": [*part.shape], "data_offsets": [start, end]}
    header = json.dumps({"__metadata__": {"format": "pt"}} | entries).encode()
    header += b" " * (-len(header) % 8)

    def write(names: list[str]) -> None:
        with open(whole.name, "r+b") as file:
            for name in names:
                part = parts[name]
                start, end = entries[name]["data_offsets"]
                file.seek(8 + len(header) + start)
                count = part.shape[0] if part.shape else 1
                step = max(AT_A_TIME * count // max(end - start, 1), 1)
                rows = part.rows()
                for i in range(0, count, step):
                    block = rows[i : i + step] if part.shape else rows[...]
                    file.write(block.contiguous().flatten().view(torch.uint8).numpy())
                    wrote(block.nbytes)

    names = list(entries)
    with writing(target) as whole, ThreadPoolExecutor(WORKERS) as pool:
        whole.write(len(header).to_bytes(8, "little") + header)
        whole.flush()
        writers = [pool.submit(write, names[i::WORKERS]) for i in range(WORKERS)]
        while wait(writers, timeout=0.1).not_done:
            os.fsync(whole.fileno())  # the disk takes what there is while the rest is made, not all of it at the end
        for writer in writers:
            writer.result()
