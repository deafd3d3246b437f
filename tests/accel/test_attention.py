"""Attention on a GPU, as `fit` and `ask` have it: gradients under a mask, at every length, with logits as low as
real ones."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from chatmagic.accel.attention import without_cudnn_attention

HEADS, GROUPS, SIZE = 14, 2, 64  # Qwen2.5-0.5B's


def inputs(length: int, dtype, seed: int):
    """Query, key and value with logits of some -700 in one head, and the mask of two rows, one padded on the right."""
    generator = torch.Generator("cuda").manual_seed(seed)
    draw = lambda heads: torch.randn(2, heads, length, SIZE, device="cuda", generator=generator)  # noqa: E731
    query, key, value = draw(HEADS), draw(GROUPS), draw(GROUPS)
    query[:, 0] = 40 + query[:, 0]
    key[:, 0] = -2 + 0.1 * key[:, 0]
    mask = torch.ones(length, length, dtype=torch.bool, device="cuda").tril().repeat(2, 1, 1, 1)
    mask[1, ..., length - length // 3 :] = False
    mask[1, ..., 0] = True
    return [tensor.to(dtype).requires_grad_() for tensor in (query, key, value)], mask


def gradients(tensors, mask, dtype):
    tensors = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
    output = scaled_dot_product_attention(*tensors, attn_mask=mask, enable_gqa=True)
    output.float().square().mean().backward()
    return [tensor.grad.float() for tensor in tensors]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU, whose attention this is about")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_at_every_length(dtype):
    wrong = []
    for length in range(1, 301):
        tensors, mask = inputs(length, dtype, length)
        with sdpa_kernel(SDPBackend.MATH):
            expected = gradients(tensors, mask, torch.float32)
        with without_cudnn_attention():
            found = gradients(tensors, mask, dtype)
        for name, grad, other in zip("qkv", found, expected):
            if not (grad - other).norm() <= 0.05 * other.norm() + 1e-6:  # a NaN fails this too
                wrong.append((length, name))
    assert wrong == []


def test_fit_and_ask_leave_cudnns_attention_out(tmp_path, monkeypatch, model, tokenizer):
    from chatmagic.conversation.messages import build_messages
    from chatmagic.course.evaluate import ask
    from chatmagic.training import StepRunner
    from tiny_runs import adalora, fit

    seen = []

    class Runner(StepRunner):
        def __call__(self, batch):
            seen.append(torch.backends.cuda.cudnn_sdp_enabled())
            return super().__call__(batch)

    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        fit(adalora(), tmp_path, runner=Runner)
        model.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cuda.cudnn_sdp_enabled()))
        ask(model, tokenizer, [build_messages("hi")], max_new_tokens=2)
        assert len(seen) > 40 and not any(seen) and torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
