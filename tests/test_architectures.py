"""Every architecture on its way through the course: loaded, asked, trained, broken off, merged, read again and saved.

docs/models.md has a row for each, which `python tests/helpers/architectures.py` prints.
"""

import json
import os
import signal
from string import ascii_letters

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from architectures import ARCHITECTURES, TIED, is_composite, kind, published, write
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
from chatmagic.accel.captured import of_fixed_shape
from chatmagic.accel.layers import FLATTENED, fast_layers
from chatmagic.models.checkpoint import open_file, open_weights, read_json
from chatmagic.models.parts import experts
from chatmagic.training import StepRunner
from chatmagic.training.functional import loss_at
from chatmagic.training.keras import TrainingInterrupted
from chatmagic.training.states import ADAPTER
from generation import new_ids, plain
from over_nf4 import trained_over_nf4
from quick import first
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


@pytest.fixture(scope="module", params=first(1, ARCHITECTURES, of=kind))
def architecture(request, tokenizer, tmp_path_factory):
    """Its name, the folder that a publisher would ship, and the model that was saved there, in float32."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|pad|>"]})
    return request.param, folder, write(request.param, folder, tokenizer)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits.float()


def same_but_for_rounding(model, expected, change):
    """Rounding makes a router choose other experts for some tokens, and a scan carries it on."""
    steady = not experts(model) and "linear_attention" not in (getattr(model.config, "layer_types", None) or ())
    return (logits(model) - expected).norm() < (0.05 if steady else 0.3) * change


def test_it_is_loaded_in_16_bit_and_in_nf4(architecture, capsys):
    name, folder, model = architecture
    loaded, _ = load_model(folder)
    assert ("its language model alone is loaded" in capsys.readouterr().out) is is_composite(name)
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
    llm = ChatLLM(*load_model(architecture[1], dtype="float32"), stream=False, max_new_tokens=10)
    asked(llm, "Who are you? 你是谁？")
    asked(llm, "And why?")
    llm.history = llm.history[:1]
    asked(llm, "And how?")


def asked(llm, query, **options):
    """How many tokens of the question were kept, once its answer was compared with that of a model that keeps none."""
    ids = encode_prompt(build_messages(query, llm.history), llm.tokenizer)
    reply = llm(query, greedy=True, **options)
    options |= {"do_sample": False, "max_new_tokens": 10, "use_cache": False}
    assert new_ids(llm, reply) == plain(llm.model, ids, **options)[:-1]
    return reply.stats.tokens_reused


@pytest.mark.parametrize("name", ["gemma3_text", "lfm2"])
def test_what_is_kept_of_windows_and_scans(name, tokenizer):
    """A window is cut until it is full; a scan only goes on, and not after it was broken off within a step."""
    window = {"sliding_window": 150} if name == "gemma3_text" else {}
    llm = ChatLLM(published(name, len(tokenizer), **window), tokenizer, stream=False, max_new_tokens=10)
    letters = {tokenizer.convert_tokens_to_ids(letter) for letter in ascii_letters}  # what is said is read as it was
    spelt = {"suppress_tokens": [token for token in range(len(tokenizer)) if token not in letters]}
    asked(llm, "hello", **spelt)
    llm.history = []
    assert (asked(llm, "help", **spelt) > 5) is bool(window)
    seen = len(llm.backend._kept_ids)
    assert asked(llm, "how?", **spelt) == seen
    llm.history = llm.history[:1]
    assert (asked(llm, "hi", **spelt) > 40) is bool(window)
    while (seen := len(llm.backend._kept_ids)) < 200:
        assert asked(llm, "and then?", **spelt) == seen
    llm.history = llm.history[:-1]
    assert asked(llm, "and thus?", **spelt) == 0
    llm.backend._whole = False  # as an interrupted forward leaves it
    assert asked(llm, "and so?", **spelt) == 0


def test_every_way_to_take_a_step_has_the_same_loss_and_gradients(architecture):
    """Plainly; with fast layers, and without padding where that may be; at a fixed shape, as a CUDA graph wants it; and
    with activations recomputed."""
    model, tokenizer = load_model(architecture[1], dtype="float32")
    prepare(model)
    settings = {"task_type": "CAUSAL_LM", "target_modules": find_all_linear_names(model), "init_lora_weights": False}
    model = get_peft_model(model, LoraConfig(**settings))
    batch = DataCollator(tokenizer)([encode_example(messages, tokenizer) for messages in CONVERSATIONS])
    AcceleratorState._reset_state()
    runner = StepRunner(model, None, Accelerator(cpu=True, mixed_precision="no"))

    def taken(loss):
        value = loss()
        return value.detach(), torch.cat([grad.flatten() for grad in torch.autograd.grad(value, runner.params)])

    def plain():
        return runner._loss(batch)[0]

    def fixed():
        inputs = of_fixed_shape(batch, *(batch["labels"][:, 1:] != -100).nonzero(as_tuple=True))
        return loss_at(model, inputs, runner.accelerator.autocast)

    expected = taken(plain)
    with fast_layers(model):
        found = [taken(plain), taken(fixed)]
    model.base_model.gradient_checkpointing_enable({"use_reentrant": False})
    for loss, gradients in [*found, taken(plain)]:
        torch.testing.assert_close(loss, expected[0], rtol=1e-4, atol=1e-3)
        assert (gradients - expected[1]).norm() < 1e-3 * expected[1].norm()


METHODS = {
    "adalora": lambda names: adalora_config(10, names, init_r=4, target_r=2, lora_alpha=8),
    "lora": lambda names: LoraConfig(task_type="CAUSAL_LM", target_modules=names, r=2, lora_alpha=4),
}


@pytest.mark.parametrize("architecture", first(1, ARCHITECTURES), indirect=True)
@pytest.mark.parametrize("method", first(1, METHODS))
def test_an_adapter_is_trained_broken_off_merged_and_exported(architecture, method, tmp_path, capsys):
    name, folder, model = architecture
    quantize = "nf4" if method == "adalora" and not experts(model) else None

    def run(path, **settings):
        torch.manual_seed(0)
        model, tokenizer = load_model(folder, quantize=quantize)
        prepare(model)
        model = get_peft_model(model, METHODS[method](find_all_linear_names(model)))
        rows = [row for messages in CONVERSATIONS for row in encode_example(messages, tokenizer)]
        train = DataLoader(rows if method == "lora" else (rows * 2)[:5], 1, collate_fn=DataCollator(tokenizer))
        val = DataLoader(rows[:2], 2, collate_fn=DataCollator(tokenizer))
        return fit(model, path, epochs=1 if method == "lora" else 2, lr=5e-2, train=train, val=val, **settings)

    history = run(tmp_path / "unbroken")
    told = capsys.readouterr().out
    assert ("The experts of this mixture get no adapter" in told) is bool(experts(model))
    padded = name not in FLATTENED or "sliding_window" in ARCHITECTURES[name]
    assert ("Batches are computed with their padding" in told) is padded
    with pytest.raises(TrainingInterrupted):
        run(tmp_path / "broken", runner=runner_that(lambda _: os.kill(os.getpid(), signal.SIGINT), 2))
    losses = ["train_loss", "val_loss", "grad_norm"]
    assert run(tmp_path / "broken", resume=True)[losses].equals(history[losses])
    adapter, other = tmp_path / "unbroken", tmp_path / "broken"
    assert (adapter / "adapter_model.safetensors").read_bytes() == (other / "adapter_model.safetensors").read_bytes()

    base = load_model(folder, dtype="float32")[0]
    without = logits(base)
    expected = logits(PeftModel.from_pretrained(base, adapter))
    change = (expected - without).norm()
    # Onto the published weights, with which PEFT merges too.
    merged = merge_adapter(folder, adapter, tmp_path / "merged", onto="original")
    assert open_weights(merged).keys() == open_weights(folder).keys()
    model, tokenizer = load_model(merged, dtype="float32")
    assert change > 10 and same_but_for_rounding(model, expected, change)
    by_peft = PeftModel.from_pretrained(load_model(folder)[0], adapter).merge_and_unload().state_dict()
    ours = load_model(merged)[0].state_dict()
    assert all(torch.equal(ours[name], weight) for name, weight in by_peft.items())

    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(model))

    if method == "adalora" or is_composite(name):
        exported = adalora_to_lora(adapter, tmp_path / "lora")
        named = {key.removeprefix("base_model.model.").split(".lora_")[0] for key in open_file(exported / ADAPTER)}
        assert {f"{layer}.weight" for layer in named} <= open_weights(folder).keys()
        again, _ = load_model(merge_adapter(folder, exported, tmp_path / "again", onto="original"), dtype="float32")
        assert same_but_for_rounding(again, expected, change)


@pytest.mark.slow
def test_what_was_trained_over_nf4_is_merged_onto_that(architecture, tmp_path):
    """By PEFT to the last bit; a tower beside the language model, whose layers have the same last names, was never in
    NF4. A LoRA adapter that was made of it takes with it what it was trained on."""
    name, folder, model = architecture
    if experts(model):
        return
    expected = trained_over_nf4(folder, tmp_path / "adapter")
    merged = merge_adapter(folder, tmp_path / "adapter", tmp_path / "merged")
    found = load_model(merged, dtype="bfloat16")[0].state_dict()
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    if is_composite(name):
        published, stored = open_weights(folder), open_weights(merged)
        tower = [name for name in published if "vision_tower." in name or "visual." in name]
        assert tower and all(torch.equal(stored[name].tensor, published[name].tensor) for name in tower)
        exported = adalora_to_lora(tmp_path / "adapter", tmp_path / "lora")
        again = open_weights(merge_adapter(folder, exported, tmp_path / "again"))
        for name, (weight, _) in stored.items():
            torch.testing.assert_close(again[name].tensor, weight, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize(
    "name, changes",
    [
        ("mamba2", {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 8}),
        ("minimax", {"num_local_experts": 2, "layer_types": ["linear_attention", "full_attention"], "block_size": 8}),
        ("recurrent_gemma", {"num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 16}),
    ],
)
def test_classes_that_keep_what_they_ran_in_their_own_way_answer_as_ever(name, changes, tokenizer, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, name, TIED | changes)
    llm = ChatLLM(published(name, len(tokenizer)), tokenizer, stream=False, max_new_tokens=10)
    for query in "Who are you?", "And why?":
        ids = encode_prompt(build_messages(query, llm.history), tokenizer)
        expected = plain(llm.model, ids, do_sample=False, max_new_tokens=10, use_cache=False)
        assert llm(query, greedy=True).strip() == tokenizer.decode(expected, skip_special_tokens=True).strip()


def test_what_a_composite_config_says_of_the_whole_alone_is_heard(tokenizer, tmp_path):
    """Qwen3.5's language model has no tied head unless it is told so, and there is no other head in the files."""
    model = write("qwen3_5", tmp_path, tokenizer)
    config = read_json(tmp_path / "config.json")
    assert config["tie_word_embeddings"] and config["text_config"].pop("tie_word_embeddings")
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.testing.assert_close(logits(load_model(tmp_path, dtype="float32")[0]), logits(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen3_5", "gemma3"])
def test_the_tied_head_of_a_composite_checkpoint_becomes_its_own(name, tokenizer, tmp_path):
    """The names that it has on disk stay, and all but its language model."""
    write(name, tmp_path / "base", tokenizer)
    base = load_model(tmp_path / "base", dtype="float32")[0]
    without = logits(base)
    torch.manual_seed(0)
    settings = {"target_modules": ["lm_head", "o_proj"], "r": 4, "lora_alpha": 8, "init_lora_weights": False}
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merged = merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert open_weights(merged).keys() - open_weights(tmp_path / "base").keys() == {"lm_head.weight"}
    config = read_json(merged / "config.json")
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is False
    assert same_but_for_rounding(load_model(merged, dtype="float32")[0], expected, (expected - without).norm())
    whole = AutoModelForImageTextToText.from_pretrained(merged, dtype=torch.float32)
    assert same_but_for_rounding(whole, expected, (expected - without).norm())
