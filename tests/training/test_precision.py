"""Runs in bf16, in fp16 and over quantised bases, beside those in fp32."""

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from chatmagic.accel.allocator import rank_allocator
from chatmagic.models.parts import trainable
from chatmagic.models.quantize import quantization_config
from chatmagic.training import StepRunner, find_all_linear_names
from quick import first
from tiny_runs import LAYERS, PROJECTIONS, adalora, fit, loader, rows, tiny_llama


@pytest.mark.slow
def test_bf16_follows_fp32(tmp_path):
    full = fit(adalora(), tmp_path)
    half = fit(adalora(), tmp_path, mixed_precision="bf16")
    assert (full.train_loss != half.train_loss).any()
    torch.testing.assert_close(half.train_loss.tolist(), full.train_loss.tolist(), rtol=1e-2, atol=0)


def test_a_16_bit_base_keeps_its_rank_number(tmp_path):
    """PEFT makes `ranknum`, by which the update is divided, trainable there, and does not save it."""
    model = adalora(base=tiny_llama().to(torch.bfloat16))
    fit(model, tmp_path)
    numbers = [param.item() for name, param in model.named_parameters() if "ranknum" in name]
    assert numbers == [6.0] * LAYERS


def fp16_step(scale):
    """One step with the loss scaled as fp16 wants it; accelerate offers that on GPUs alone, torch everywhere."""
    model = adalora()
    accelerator = Accelerator(cpu=True)
    accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters(), lr=1e-2))
    runner = StepRunner(model, None, accelerator, "train", {}, optimizer)
    _, log = runner(next(iter(loader(rows(8), batch_size=8))))
    return model, rank_allocator(model), log


def test_importance_is_of_unscaled_gradients():
    (_, small, small_log), (_, large, large_log) = fp16_step(1.0), fp16_step(1024.0)
    assert small_log["grad_norm"] == pytest.approx(large_log["grad_norm"], rel=1e-2)
    small, large = (torch.cat([a.flatten() for a in allocator.exp_avg_ipt]) for allocator in (small, large))
    assert large.norm() > 0
    torch.testing.assert_close(large.norm(), small.norm(), rtol=2e-2, atol=0)


def test_an_overflow_in_fp16_allocates_nothing():
    model, allocator, _ = fp16_step(2.0**40)
    assert allocator.step == 0 and allocator.exp_avg_ipt == []
    assert all(torch.equal(param, other) for (_, param), (_, other) in zip(trainable(model), trainable(adalora())))


@pytest.mark.parametrize(
    "bits", first(1, [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}])
)
def test_quantised_bases_train_on_the_cpu(tmp_path, bits):
    """As their dequantised weights do, across validations, before which bitsandbytes would repack 4-bit weights."""
    tiny_llama(size=64).save_pretrained(tmp_path / "base")  # NF4 wants blocks of 64
    config = BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32, **bits)
    load = AutoModelForCausalLM.from_pretrained
    base = load(tmp_path / "base", quantization_config=config, device_map="cpu", dtype=torch.float32)
    plain = load(tmp_path / "base", quantization_config=config, device_map="cpu", dtype=torch.float32).dequantize()
    assert find_all_linear_names(base) == PROJECTIONS
    history = fit(adalora(base=base), tmp_path / "quantised", lr=5e-2)
    expected = fit(adalora(base=plain), tmp_path / "plain", lr=5e-2)
    assert history.train_loss.iloc[-1] < history.train_loss.iloc[0] - 0.2
    torch.testing.assert_close(history.train_loss.tolist(), expected.train_loss.tolist(), rtol=1e-3, atol=0)
    assert len([module for module in base.modules() if type(module).__name__.startswith("Linear")]) == LAYERS + 1


@pytest.mark.parametrize("quantize", first(1, ["int8", "nf4"]))
@pytest.mark.parametrize("precision", first(1, ["bf16", "no"]))
@pytest.mark.slow
def test_a_quantised_base_trains_and_answers_in_bf16(tmp_path, quantize, precision):
    tiny_llama(size=64).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    config = quantization_config(quantize, torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=config, device_map="cpu", dtype=torch.bfloat16
    )
    model = adalora(base=base)
    history = fit(model, tmp_path / "adapter", lr=5e-2, mixed_precision=precision)
    assert history.train_loss.iloc[-1] < history.train_loss.iloc[0] - 0.1
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert model(ids).logits.dtype == torch.bfloat16
    said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert 12 < said.shape[1] <= 16
