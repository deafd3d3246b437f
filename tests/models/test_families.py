"""Each published checkpoint, tiny, as its family's native class: as the publisher's own code answered."""

import functools
import json
import logging
import subprocess
import sys
import unicodedata
import warnings

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from chatmagic import load_model
from chatmagic.models.families import FAMILIES, alibi
from chatmagic.models.load import context_limit

NATIVE = {
    "baichuan2-7b-chat": "LlamaForCausalLM",
    "baichuan2-13b-chat": "BaichuanAlibiForCausalLM",
    "qwen-7b-chat": "Qwen2ForCausalLM",
    "qwen-14b-chat": "Qwen2ForCausalLM",
    "internlm-chat-7b": "LlamaForCausalLM",
    "chatglm2-6b": "GlmForCausalLM",
    "llama-2-13b-chat": "LlamaForCausalLM",
}
every = pytest.mark.parametrize("name", NATIVE)


@pytest.fixture(scope="module", autouse=True)
def tokenizers_built_once():
    """Building one takes seconds, and it never changes: each folder's is built at its first load only."""
    built = {}

    def once(build):
        @functools.wraps(build)
        def tokenizer(folder, config):
            if folder not in built:
                built[folder] = build(folder, config)
            return built[folder]

        return tokenizer

    with pytest.MonkeyPatch.context() as patch:
        for family in FAMILIES.values():
            patch.setattr(family, "tokenizer", once(family.tokenizer))
        yield


@pytest.fixture(scope="module")
def loaded(tiny_models):
    """name -> (model in fp32, tokenizer), each loaded once."""
    cache = {}

    def load(name):
        if name not in cache:
            cache[name] = load_model(tiny_models / name, dtype="float32")
        return cache[name]

    return load


@pytest.fixture(scope="module")
def golden(shared):
    return lambda name: json.loads((shared / "models" / name / "golden.json").read_text())


def logits(model, ids, **inputs):
    with torch.no_grad():
        return model(torch.tensor([ids]), **inputs).logits[0]


def greedy(model, **batch):
    """24 tokens for each row, whatever they are, without the publisher's sampling."""
    options = {"do_sample": False, "repetition_penalty": 1.0, "eos_token_id": [], "max_new_tokens": 24}
    return model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :].tolist()


@every
def test_golden_cases(loaded, golden, name):
    model, tokenizer = loaded(name)
    answers = golden(name)
    assert type(model).__name__ == NATIVE[name]
    for case in answers["cases"]:
        ids = tokenizer.apply_chat_template(case["messages"], add_generation_prompt=True)["input_ids"]
        assert ids == case["prompt_ids"]
        last = logits(model, ids)[-4:]
        reference = torch.tensor(case["last_logits_at"])
        torch.testing.assert_close(last[:, answers["logit_columns"]], reference, rtol=0, atol=1e-4)
        assert last[-1].topk(5).indices.tolist() == [token for token, _ in case["top5"]]
        ids = torch.tensor([ids])
        assert greedy(model, input_ids=ids, attention_mask=torch.ones_like(ids)) == [case["greedy"]]


@every
def test_a_batch_padded_on_the_left_answers_as_alone(loaded, golden, name):
    model, tokenizer = loaded(name)
    cases = golden(name)["cases"]
    batch = tokenizer.pad({"input_ids": [case["prompt_ids"] for case in cases]}, return_tensors="pt")
    assert batch["attention_mask"][:, -1].all() and not batch["attention_mask"].all()
    assert greedy(model, **batch) == [case["greedy"] for case in cases]


@every
def test_nf4_saved_and_loaded_gives_the_same_logits(tiny_models, golden, tmp_path, name):
    model, _ = load_model(tiny_models / name, quantize="nf4")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.model.layers[0].self_attn.q_proj.weight.dtype == torch.uint8
    ids = golden(name)["cases"][0]["prompt_ids"]
    assert torch.equal(logits(model, ids), logits(again, ids))


PLAIN = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder, prompt in json.load(sys.stdin):
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    except ValueError:  # Baichuan2-13B, before the import that the docs name
        print(json.dumps("unknown"))
        import chatmagic.models.families
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    with torch.no_grad():
        best = model(torch.tensor([prompt])).logits[0, -1].topk(5)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    hello = [{"role": "user", "content": "你好"}]
    ids = tokenizer.apply_chat_template(hello, add_generation_prompt=True)["input_ids"]
    best = list(zip(best.indices.tolist(), best.values.tolist()))
    print(json.dumps([best, ids, tokenizer.eos_token_id, tokenizer.pad_token_id]))
"""


def test_what_is_saved_is_native_and_plain_transformers_reads_it(loaded, golden, tmp_path):
    """In a process of its own, which has never seen this package until it reaches Baichuan2-13B, the last."""
    names = sorted(NATIVE, key="baichuan2-13b-chat".__eq__)
    for name in names:
        model, tokenizer = loaded(name)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert "auto_map" not in config and config["architectures"] == [NATIVE[name]]
        assert not list((tmp_path / name).glob("*.py"))
    asked = [(str(tmp_path / name), golden(name)["cases"][-1]["prompt_ids"]) for name in names]
    run = subprocess.run(
        [sys.executable, "-c", PLAIN], input=json.dumps(asked), capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    answers = [json.loads(line) for line in run.stdout.splitlines()]
    assert answers.pop(-2) == "unknown" and len(answers) == len(names)
    for name, (best, ids, eos, pad) in zip(names, answers, strict=True):
        cases, tokenizer = golden(name)["cases"], loaded(name)[1]
        torch.testing.assert_close(torch.tensor(best), torch.tensor(cases[-1]["top5"]), rtol=0, atol=1e-4)
        assert (ids, eos, pad) == (cases[0]["prompt_ids"], tokenizer.eos_token_id, tokenizer.pad_token_id)


@every
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_one_adalora_step_changes_the_adapter_alone(tiny_models, golden, tmp_path, name, quantize):
    model, _ = load_model(tiny_models / name, quantize=quantize, dtype="float32")
    torch.manual_seed(0)
    config = AdaLoraConfig(
        task_type="CAUSAL_LM",
        init_r=3,
        target_r=2,
        total_step=10,
        tinit=1,
        tfinal=2,
        target_modules="all-linear",
    )
    model = get_peft_model(model, config).train()
    assert model.peft_config["default"].base_model_name_or_path == str(tiny_models / name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    ids = torch.tensor([golden(name)["cases"][0]["prompt_ids"]])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    model.base_model.update_and_allocate(0)
    model.save_pretrained(tmp_path)
    saved = safe_open(tmp_path / "adapter_model.safetensors", "pt").keys()
    assert saved and all("lora_" in key for key in saved)
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed and all("lora_" in key for key in changed)
    layers = {key.rsplit(".lora_", 1)[0] for key in changed}
    assert layers == {key.rsplit(".lora_", 1)[0] for key in before if "lora_" in key}


# The second sizes have the tokenizer of the first; Llama-2 has no column of strings, but its prompts are golden.
@pytest.mark.parametrize("name", ["baichuan2-7b-chat", "chatglm2-6b", "internlm-chat-7b", "qwen-7b-chat"])
def test_tokens_are_the_publishers(loaded, shared, tmp_path, name):
    """To ChatGLM2's and InternLM's own tokenizers control tokens in a text are text; <eoa> is none."""
    column = name.split("-")[0]
    vectors = json.loads((shared / "vectors" / "tokens.json").read_text())
    modes = [(column, column in ("internlm", "chatglm2"))]
    modes += [("qwen, control tokens in text kept as text", True)] * (column == "qwen")
    tokenizer = loaded(name)[1]
    tokenizer.save_pretrained(tmp_path)
    for reader in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        for mode, as_text in modes:
            for text, ids in zip(vectors["strings"], vectors[mode], strict=True):
                assert reader(text, add_special_tokens=False, split_special_tokens=as_text).input_ids == ids
                whole = unicodedata.normalize("NFC", text) if column == "qwen" else text
                assert reader.decode(ids) == whole
        assert reader.get_added_vocab() == tokenizer.get_added_vocab()


def test_control_tokens_and_their_ids(loaded):
    def facts(name):
        t = loaded(name)[1]
        return (
            t.bos_token_id,
            t.eos_token_id,
            t.pad_token_id,
            t.padding_side,
            t.model_max_length,
            t("你好").input_ids,
        )

    assert facts("baichuan2-7b-chat") == (1, 2, 0, "left", 4096, [16829])
    assert facts("qwen-7b-chat") == (None, 151645, 151643, "left", 8192, [108386])
    assert facts("internlm-chat-7b") == (1, 2, 2, "left", 2048, [1, 76379])
    assert facts("chatglm2-6b") == (None, 2, 0, "left", 32768, [64790, 64792, 36474, 54591])
    assert facts("llama-2-13b-chat") == (1, 2, 0, "left", 4096, [1, 29871, 30919, 31076])
    assert loaded("qwen-7b-chat")[1]("<|extra_0|><|extra_204|>").input_ids == [151646, 151850]
    glm = loaded("chatglm2-6b")[1]
    assert glm("[gMASK]sop", add_special_tokens=False).input_ids == [64790, 64792]
    assert 64792 not in glm("sophisticated", add_special_tokens=False).input_ids
    assert glm.convert_ids_to_tokens([64789, 64791, 64793]) == ["[MASK]", "[sMASK]", "eop"]


def test_chatglm2_has_no_place_for_a_system_text(loaded):
    with pytest.raises(Exception, match="ChatGLM2 knows no system text"):
        loaded("chatglm2-6b")[1].apply_chat_template([{"role": "system", "content": "你是老师。"}])


@every
def test_the_published_generation_config_is_honoured_without_a_warning(tiny_models, loaded, golden, caplog, name):
    model, _ = loaded(name)
    config = model.generation_config.to_dict()
    published = json.loads((tiny_models / name / "generation_config.json").read_text())
    for key in "temperature", "top_k", "top_p", "repetition_penalty", "do_sample", "max_new_tokens":
        assert config[key] == published.get(key)
    assert {key for key in published if key not in config} <= {
        "chat_format",
        "max_window_size",
        "user_token_id",
        "assistant_token_id",
    }
    stops = {
        "baichuan2": [2],
        "qwen": [151645, 151643, 151644],
        "internlm": [103028, 2],
        "chatglm2": [2],
        "llama": [2],
    }
    assert (config["eos_token_id"], config["max_length"]) == (stops[name.split("-")[0]], None)
    ids = torch.tensor([golden(name)["cases"][0]["prompt_ids"]])
    logging.getLogger("transformers").addHandler(caplog.handler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    logging.getLogger("transformers").removeHandler(caplog.handler)
    assert not caplog.records


def test_generation_stops_at_internlms_eoa(loaded):
    model, _ = loaded("internlm-chat-7b")
    ids = torch.tensor([[1, 333, 352]])
    model.lm_head.bias = torch.nn.Parameter(torch.eye(model.config.vocab_size, 1).roll(103028, 0)[:, 0] * 1e3)
    reply = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9)
    model.lm_head.bias = None
    assert reply[0, 3:].tolist() == [103028]


def test_context_limits_and_their_reasons(loaded):
    limits = {name: context_limit(loaded(name)[0]) for name in NATIVE}
    assert {name: limit for name, (limit, _) in limits.items()} == {
        "baichuan2-7b-chat": 4096,
        "baichuan2-13b-chat": 4096,
        "qwen-7b-chat": 8192,
        "qwen-14b-chat": 8192,
        "internlm-chat-7b": 2048,
        "chatglm2-6b": 32768,
        "llama-2-13b-chat": 4096,
    }
    assert "dynamic NTK, log-n" in limits["qwen-7b-chat"][1]
    assert "InternLM's own code rescales" in limits["internlm-chat-7b"][1]


def test_a_reloaded_native_checkpoint_keeps_the_reason(loaded, tmp_path):
    model, tokenizer = loaded("qwen-7b-chat")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert context_limit(load_model(tmp_path)[0]) == context_limit(model)


# Baichuan2-13B's attention


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_alibi_under_each_attention(loaded, golden, attention):
    model, _ = loaded("baichuan2-13b-chat")
    cases = golden("baichuan2-13b-chat")["cases"]
    before = model.config._attn_implementation
    model.set_attn_implementation(attention)
    for case in cases:
        best = logits(model, case["prompt_ids"])[-1].topk(5)
        torch.testing.assert_close(best.values, torch.tensor(case["top5"])[:, 1], rtol=0, atol=1e-4)
    ids = torch.tensor([cases[2]["prompt_ids"]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert greedy(model, **batch, cache_implementation="static", disable_compile=True) == [cases[2]["greedy"]]
    model.set_attn_implementation(before)


def test_alibi_slopes():
    """Those of BLOOM (build_alibi_tensor): eight heads, and forty, the 13B's."""
    assert alibi.alibi_slopes(8).tolist() == [2.0**-n for n in range(1, 9)]
    forty = alibi.alibi_slopes(40)
    torch.testing.assert_close(forty[[0, 31]], torch.tensor([2.0**-0.25, 2.0**-8]))
    torch.testing.assert_close(forty[32:], torch.tensor([2.0 ** -(n / 8) for n in range(1, 16, 2)]))


def test_alibi_trains_as_it_evaluates_with_and_without_checkpointing(tiny_models, golden):
    model, _ = load_model(tiny_models / "baichuan2-13b-chat", dtype="float32")
    ids = torch.tensor([golden("baichuan2-13b-chat")["cases"][2]["prompt_ids"]])

    def step():
        model.zero_grad()
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        return out.loss.item(), model.model.layers[0].self_attn.q_proj.weight.grad.clone()

    evaluated = model(input_ids=ids, labels=ids).loss.item()
    model.train()
    loss, gradient = step()
    model.gradient_checkpointing_enable()
    again, checkpointed = step()
    assert loss == evaluated == again and gradient.abs().max() > 0
    torch.testing.assert_close(checkpointed, gradient)
