"""Triton's kernels beside the functions of transformers that they stand in for, on the CPU in Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys

import pytest

COMPARISON = """
import torch
from chatmagic.accel.kernels import normalise, rotate
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

torch.manual_seed(0)
for dtype in torch.float32, torch.float16:  # the interpreter rounds bfloat16 its own way
    for shape in (1, 1, 1500), (1, 1, 9, 64):
        layer, x = LlamaRMSNorm(shape[-1], 1e-5).to(dtype), 3 * torch.randn(shape, dtype=dtype)
        torch.nn.init.normal_(layer.weight)
        assert torch.equal(normalise(layer, x), layer(x)), (dtype, shape)
    mixed, x = LlamaRMSNorm(64), torch.randn(1, 1, 64, dtype=dtype)
    assert normalise(mixed, x).dtype == torch.float32 and torch.equal(normalise(mixed, x), mixed(x))
    for size in 96, 128:
        q, k = (torch.randn(1, 1, heads, size, dtype=dtype).transpose(1, 2) for heads in (6, 2))
        cos, sin = torch.randn(2, 1, 1, size, dtype=dtype)
        ours, theirs = rotate(q, k, cos, sin), apply_rotary_pos_emb(q, k, cos, sin)
        assert all(map(torch.equal, ours, theirs)) and ours[0].stride() == theirs[0].stride(), (dtype, size)
"""


@pytest.mark.slow
def test_the_kernels_compute_what_transformers_does():
    if not importlib.util.find_spec("triton") and not os.environ.get("CHATMAGIC_REQUIRE_TRITON"):
        pytest.skip("no triton: torch brings it on Linux with CUDA")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", COMPARISON], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
