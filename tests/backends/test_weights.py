"""What of a model's weights is looked at before a turn; that kept keys and values go with them: test_generate.py."""

import numpy
import pytest
import torch

from chatmagic.backends.weights import sample


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8", "int64", "float64"])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (5, 7), (16, 8), (24, 1), (2, 3, 4)])
def test_every_bit_of_a_small_weight_counts(shape, dtype):
    tensor = (torch.arange(torch.Size(shape).numel() + 1) + 1).to(getattr(torch, dtype))[1:].reshape(shape)
    tensors = [torch.ones(3), tensor, torch.ones(2)]
    before = sample(tensors)
    bits = tensor.reshape(-1).view(torch.uint8).numpy()
    for index in range(bits.size):
        bits[index] ^= 1 << index % 8
        assert sample(tensors) != before
        bits[index] ^= 1 << index % 8
    assert sample(tensors) == before


@pytest.mark.parametrize(
    "shape",
    [
        (256, 256),
        (576, 1536),
        (1536, 576),
        (896, 4864),
        (33, 8192),
        (64, 14336),
        (9000, 32),
        (3, 200, 300),
        (1009, 1008),
    ],
)
def test_every_row_and_column_of_a_large_weight_counts(shape, monkeypatch):
    monkeypatch.setattr("chatmagic.backends.weights.WHOLE", 0)
    size, columns = torch.Size(shape).numel(), shape[-1]
    (seen,) = sample([torch.arange(size, dtype=torch.int32).reshape(shape)])
    seen = numpy.frombuffer(seen, numpy.int32)
    assert {*seen // columns} == {*range(size // columns)} and {*seen % columns} == {*range(columns)}
    assert len(seen) < 2 * max(size // columns, columns)


@pytest.mark.parametrize("shape", [(1_000_000,), (1_000_000, 1)])
def test_of_a_large_one_without_rows_a_thousandth_counts(shape):
    (seen,) = sample([torch.zeros(shape, dtype=torch.uint8)])
    assert 1000 <= len(seen) <= 1100


def test_what_is_not_here_has_no_sample():
    assert sample([torch.empty(3, device="meta"), torch.empty(0)]) == []
