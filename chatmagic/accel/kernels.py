"""Triton kernels for the many small steps of a decoded token, with the same result to the last bit.

They stand in for `LlamaRMSNorm.forward`, eight kernels, here three, and `apply_rotary_pos_emb`, ten kernels, here one
(transformers/models/llama/modeling_llama.py). Every product is rounded where transformers rounds it, and the mean of
the squares is torch's, whose order of summing is its own affair.
"""

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def _square(x, squares, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, at < count).to(tl.float32)
    tl.store(squares + at, value * value, at < count)


@triton.jit
def _scale(x, mean, weight, result, epsilon, size, BLOCK: tl.constexpr):
    row, column = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at, there = row * size + column, column < size
    value = tl.load(x + at, there).to(tl.float32) * tl.rsqrt(tl.load(mean + row) + epsilon)
    value = value.to(x.dtype.element_ty).to(tl.float32) * tl.load(weight + column, there).to(tl.float32)
    tl.store(result + at, value.to(result.dtype.element_ty), there)


def normalise(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`layer(x)`, of a LlamaRMSNorm, for x of (..., size)."""
    x, size = x.contiguous(), x.shape[-1]
    squares = torch.empty_like(x, dtype=torch.float32)
    result = torch.empty_like(x, dtype=torch.result_type(layer.weight, x))
    grid = x.numel() // size, triton.cdiv(size, BLOCK)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _square[(triton.cdiv(x.numel(), BLOCK),)](x, squares, x.numel(), BLOCK)
        _scale[grid](x, squares.mean(-1), layer.weight, result, layer.variance_epsilon, size, BLOCK)
    return result


@triton.jit
def _rotate(q, k, cos, sin, new_q, new_k, q_heads, size, BLOCK: tl.constexpr):
    head, column = tl.program_id(0), tl.arange(0, BLOCK)
    there, left = column < size, column < size // 2
    if head < q_heads:
        source, target = q + head * size, new_q + head * size
    else:
        source, target = k + (head - q_heads) * size, new_k + (head - q_heads) * size
    value = tl.load(source + column, there).to(tl.float32)
    other = tl.load(source + tl.where(left, column + size // 2, column - size // 2), there).to(tl.float32)
    value = value * tl.load(cos + column, there).to(tl.float32)
    other = tl.where(left, -other, other) * tl.load(sin + column, there).to(tl.float32)
    kind = new_q.dtype.element_ty
    value = value.to(kind).to(tl.float32) + other.to(kind).to(tl.float32)
    tl.store(target + column, value.to(kind), there)


def rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """`apply_rotary_pos_emb` for one token: q and k (1, heads, 1, size), cos and sin (1, 1, size), of one dtype."""
    heads, size = q.shape[1], q.shape[-1]
    new_q, new_k = q.new_empty(q.shape), k.new_empty(k.shape)
    inputs = (each.contiguous() for each in (q, k, cos, sin))
    grid, block = (heads + k.shape[1],), triton.next_power_of_2(size)
    with torch.cuda.device_of(q):  # and without fusion, or a product is added before it was rounded
        _rotate[grid](*inputs, new_q, new_k, heads, size, block, num_warps=1, enable_fp_fusion=False)
    return new_q, new_k
