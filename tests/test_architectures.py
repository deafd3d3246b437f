"""Every architecture on its way through the course: loaded, asked, trained, broken off, merged, read again and saved.

docs/models.md has a row for each, which `python tests/helpers/architectures.py` prints.
"""

import os
import signal

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from architectures import ARCHITECTURES, write
from chatmagic import (
    ChatLLM,
    ChatmagicError,
    DataCollator,
    adalora_config,
    adalora_to_lora,
    build_messages,
    encode_example,
    encode_prompt,
    find_all_linear_names,
    load_model,
    merge_adapter,
    prepare,
)
from chatmagic.models.checkpoint import open_file, open_weights
from chatmagic.models.parts import experts
from chatmagic.training.keras import TrainingInterrupted
from chatmagic.training.states import ADAPTER
from generation import new_ids, plain
from tiny_runs import fit, runner_that

IDS = torch.arange(3, 43)[None]
CONVERSATIONS = [
    [
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "I am 小炉."},
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "4", "replayed": True},
    ],
    [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello.", "replayed": True}],
    [{"role": "user", "content": "Your name?"}, {"role": "assistant", "content": "小炉, made by 张三."}],
]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request, tokenizer, tmp_path_factory):
    """Its name, the folder that a publisher would ship, and the model that was saved there, in float32."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|pad|>"]})
    return request.param, folder, write(request.param, folder, tokenizer)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits.float()


def same_but_for_rounding(model, expected, change):
    """Of experts, rounding chooses others for some tokens."""
    limit = 0.05 if not experts(model) else 0.3
    return (logits(model) - expected).norm() < limit * change


def test_it_is_loaded_in_16_bit_and_in_nf4(architecture):
    name, folder, model = architecture
    loaded, _ = load_model(folder)
    assert loaded.dtype == torch.bfloat16
    expected = logits(model)
    torch.testing.assert_close(logits(load_model(folder, dtype="float32")[0]), expected, rtol=0, atol=1e-4)
    if experts(loaded):
        with pytest.raises(ChatmagicError, match="mixture of experts, .* does not quantise.*Leave quantize out"):
            load_model(folder, quantize="nf4")
        return
    quantised, _ = load_model(folder, quantize="nf4")
    assert quantised.get_memory_footprint() < 0.75 * loaded.get_memory_footprint()
    assert torch.corrcoef(torch.stack([logits(quantised).flatten(), expected.flatten()]))[0, 1] > 0.7


def test_its_answers_are_those_of_a_model_that_keeps_nothing(architecture, monkeypatch):
    """Windows are passed, prompts come in pieces, and what was said before is taken up, changed and broken off."""
    monkeypatch.setattr("chatmagic.backends.generate.PREFILL_CHUNK", 7)
    model, tokenizer = load_model(architecture[1], dtype="float32")
    llm = ChatLLM(model, tokenizer, stream=False, max_new_tokens=10)

    def asked(query):
        ids = encode_prompt(build_messages(query, llm.history), tokenizer)
        reply = llm(query, greedy=True)
        assert new_ids(llm, reply) == plain(model, ids, do_sample=False, max_new_tokens=10, use_cache=False)[:-1]
        return reply

    asked("Who are you? 你是谁？")
    asked("And why?")
    llm.history = llm.history[:1]
    asked("And how?")


METHODS = {
    "adalora": lambda names: adalora_config(12, names, init_r=4, target_r=2, lora_alpha=8),
    "lora": lambda names: LoraConfig(task_type="CAUSAL_LM", target_modules=names, r=2, lora_alpha=4),
}


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_is_trained_broken_off_merged_and_exported(architecture, method, tmp_path):
    name, folder, published = architecture
    quantize = "nf4" if method == "adalora" and not experts(published) else None

    def run(path, **settings):
        torch.manual_seed(0)
        model, tokenizer = load_model(folder, quantize=quantize)
        prepare(model)
        model = get_peft_model(model, METHODS[method](find_all_linear_names(model)))
        rows = [row for messages in CONVERSATIONS for row in encode_example(messages, tokenizer)]
        train = DataLoader(rows * (2 if method == "adalora" else 1), 1, collate_fn=DataCollator(tokenizer))
        val = DataLoader(rows[:2], 2, collate_fn=DataCollator(tokenizer))
        return fit(model, path, epochs=2, lr=3e-2, train=train, val=val, **settings)

    history = run(tmp_path / "unbroken")
    with pytest.raises(TrainingInterrupted):
        run(tmp_path / "broken", runner=runner_that(lambda _: os.kill(os.getpid(), signal.SIGINT), 5))
    losses = ["train_loss", "val_loss", "grad_norm"]
    assert run(tmp_path / "broken", resume=True)[losses].equals(history[losses])
    adapter, other = tmp_path / "unbroken", tmp_path / "broken"
    assert (adapter / "adapter_model.safetensors").read_bytes() == (other / "adapter_model.safetensors").read_bytes()

    base = load_model(folder, dtype="float32")[0]
    without = logits(base)
    expected = logits(PeftModel.from_pretrained(base, adapter))
    change = (expected - without).norm()
    merged = merge_adapter(folder, adapter, tmp_path / "merged")
    assert open_weights(merged).keys() == open_weights(folder).keys()
    model, tokenizer = load_model(merged, dtype="float32")
    assert change > 10 and same_but_for_rounding(model, expected, change)
    by_peft = PeftModel.from_pretrained(load_model(folder)[0], adapter).merge_and_unload().state_dict()
    ours = load_model(merged)[0].state_dict()
    assert all(torch.equal(ours[name], weight) for name, weight in by_peft.items())

    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(model))

    if method == "adalora" or "text_config" in ARCHITECTURES[name]:
        exported = adalora_to_lora(adapter, tmp_path / "lora")
        named = {key.removeprefix("base_model.model.").split(".lora_")[0] for key in open_file(exported / ADAPTER)}
        assert {f"{layer}.weight" for layer in named} <= open_weights(folder).keys()
        again, _ = load_model(merge_adapter(folder, exported, tmp_path / "again"), dtype="float32")
        assert same_but_for_rounding(again, expected, change)
