"""What takes the place of something of others' is given back, whatever happens."""

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from chatmagic.accel import attention
from chatmagic.accel.patched import patched
from tiny_runs import tiny_llama


def test_attributes_are_given_back_as_they_were():
    layer, own = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    own.forward = mine = lambda x: x
    by_class = torch.nn.Linear.forward
    with pytest.raises(ZeroDivisionError), patched([(layer, "forward", len), (own, "forward", len)]):
        assert layer.forward is own.forward is len
        raise ZeroDivisionError
    assert "forward" not in vars(layer) and layer.forward.__func__ is by_class and own.forward is mine


def test_models_attend_by_ours_for_a_while_and_others_never():
    ours, other, plain = tiny_llama(), tiny_llama(), ALL_ATTENTION_FUNCTIONS["sdpa"]
    with attention.attending_by(attention.ROWS, ours):
        assert ours.config._attn_implementation == ours.model.config._attn_implementation == attention.ROWS
        assert other.config._attn_implementation == "sdpa" and ALL_ATTENTION_FUNCTIONS["sdpa"] is plain
    assert ours.config._attn_implementation == "sdpa"
