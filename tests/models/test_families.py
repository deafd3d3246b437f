"""Each published checkpoint, tiny, as its family's native class: as the publisher's own code answered, where that is at
hand; elsewhere of our own making, and as the libraries say that they stand on."""

import base64
import json
import logging
import subprocess
import sys
import unicodedata
import warnings
from functools import cache

import pytest
import tiktoken
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import AdaLoraConfig, get_peft_model
from safetensors import safe_open
from sentencepiece import SentencePieceProcessor
from transformers import AutoModelForCausalLM, AutoTokenizer

from chatmagic import load_model
from chatmagic.models.families import alibi
from chatmagic.models.load import context_limit
from golden import golden
from published import MODELS, PAGE, WORDS
from quick import first

pytestmark = pytest.mark.usefixtures("tokenizers_built_once")
every = pytest.mark.parametrize("name", MODELS)
of_each_class = pytest.mark.parametrize("name", first(1, MODELS, of=lambda name: MODELS[name].native))
TOKENIZERS = list({MODELS[name].template: name for name in reversed(MODELS)}.values())  # one model of each


@pytest.fixture(scope="session")
def published(shared, loaded):
    """name -> (model, tokenizer, what `golden.json` holds of it)"""

    def load(name):
        file = shared / "models" / name / "golden.json"
        return *loaded(name, "golden"), json.loads(file.read_text("utf-8"))

    return load


def prompts(tokenizer, name):
    """The ids of four conversations, of different lengths."""
    cases = golden("publishers")["prompts"][MODELS[name].template]
    return [tokenizer.apply_chat_template(c["messages"], add_generation_prompt=True)["input_ids"] for c in cases]


def logits(model, ids, **inputs):
    with torch.no_grad():
        return model(torch.tensor([ids]), **inputs).logits[0]


def greedy(model, **batch):
    """24 tokens for each row, whatever they are, without the publisher's sampling."""
    options = {"do_sample": False, "repetition_penalty": 1.0, "eos_token_id": [], "max_new_tokens": 24}
    return model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("name", first(1, MODELS))
@pytest.mark.slow
def test_golden_cases(published, name):
    model, tokenizer, answers = published(name)
    assert type(model).__name__ == MODELS[name].native
    for case in answers["cases"]:
        ids = tokenizer.apply_chat_template(case["messages"], add_generation_prompt=True)["input_ids"]
        assert ids == case["prompt_ids"]
        last = logits(model, ids)[-4:]
        reference = torch.tensor(case["last_logits_at"])
        torch.testing.assert_close(last[:, answers["logit_columns"]], reference, rtol=0, atol=1e-4)
        assert last[-1].topk(5).indices.tolist() == [token for token, _ in case["top5"]]
        ids = torch.tensor([ids])
        assert greedy(model, input_ids=ids, attention_mask=torch.ones_like(ids)) == [case["greedy"]]
    batch = tokenizer.pad({"input_ids": [case["prompt_ids"] for case in answers["cases"]]}, return_tensors="pt")
    assert greedy(model, **batch) == [case["greedy"] for case in answers["cases"]]


@of_each_class
def test_a_batch_padded_on_the_left_answers_as_alone(loaded, name):
    model, tokenizer = loaded(name)
    assert type(model).__name__ == MODELS[name].native
    batch = tokenizer.pad({"input_ids": prompts(tokenizer, name)}, return_tensors="pt")
    assert batch["attention_mask"][:, -1].all() and not batch["attention_mask"].all()
    alone = [torch.tensor([ids]) for ids in prompts(tokenizer, name)]
    alone = [greedy(model, input_ids=ids, attention_mask=torch.ones_like(ids))[0] for ids in alone]
    assert greedy(model, **batch) == alone and len(set(map(tuple, alone))) == len(alone)


@of_each_class
def test_nf4_saved_and_loaded_gives_the_same_logits(tiny_models, tmp_path, name):
    model, tokenizer = load_model(tiny_models / name, quantize="nf4")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.model.layers[0].self_attn.q_proj.weight.dtype == torch.uint8
    ids = prompts(tokenizer, name)[0]
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


@pytest.mark.slow
def test_what_is_saved_is_native_and_plain_transformers_reads_it(loaded, tmp_path):
    """In a process of its own, which has never seen this package until it reaches Baichuan2-13B, the last."""
    names = sorted(MODELS, key="baichuan2-13b-chat".__eq__)
    for name in names:
        model, tokenizer = loaded(name)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert "auto_map" not in config and config["architectures"] == [MODELS[name].native]
        assert not list((tmp_path / name).glob("*.py"))
    asked = [(str(tmp_path / name), prompts(loaded(name)[1], name)[-1]) for name in names]
    run = subprocess.run(
        [sys.executable, "-c", PLAIN], input=json.dumps(asked), capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    answers = [json.loads(line) for line in run.stdout.splitlines()]
    assert answers.pop(-2) == "unknown" and len(answers) == len(names)
    for name, (best, ids, eos, pad) in zip(names, answers, strict=True):
        model, tokenizer = loaded(name)
        top = logits(model, prompts(tokenizer, name)[-1])[-1].topk(5)
        assert [token for token, _ in best] == top.indices.tolist()
        torch.testing.assert_close(torch.tensor([value for _, value in best]), top.values, rtol=0, atol=1e-4)
        assert (ids, eos, pad) == (prompts(tokenizer, name)[0], tokenizer.eos_token_id, tokenizer.pad_token_id)


@of_each_class
@pytest.mark.parametrize("quantize", first(1, ["nf4", None]))
def test_one_adalora_step_changes_the_adapter_alone(tiny_models, tmp_path, name, quantize):
    model, tokenizer = load_model(tiny_models / name, quantize=quantize, dtype="float32")
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
    ids = torch.tensor([prompts(tokenizer, name)[0]])
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
@pytest.mark.parametrize("name", first(1, ["baichuan2-7b-chat", "chatglm2-6b", "internlm-chat-7b", "qwen-7b-chat"]))
def test_tokens_are_the_publishers(published, shared, tmp_path, name):
    """To ChatGLM2's and InternLM's own tokenizers control tokens in a text are text; <eoa> is none."""
    column = name.split("-")[0]
    vectors = json.loads((shared / "vectors" / "tokens.json").read_text())
    modes = [(column, column in ("internlm", "chatglm2"))]
    modes += [("qwen, control tokens in text kept as text", True)] * (column == "qwen")
    tokenizer = published(name)[1]
    tokenizer.save_pretrained(tmp_path)
    for reader in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        for mode, as_text in modes:
            for text, ids in zip(vectors["strings"], vectors[mode], strict=True):
                assert reader(text, add_special_tokens=False, split_special_tokens=as_text).input_ids == ids
                whole = unicodedata.normalize("NFC", text) if column == "qwen" else text
                assert reader.decode(ids) == whole
        assert reader.get_added_vocab() == tokenizer.get_added_vocab()


TEXTS = [
    "你好，世界！ Two  spaces,\n\n　１２３ 🙂🏳️‍🌈 café ꧁ def f(x):\n\treturn x",
    *(" 炉子 ", "", " ", "\n", "\t \n ", "。。。......", "it's THE teacher's", "12345 3.14"),
    *("\x00\x7f\u200b\ufeff", "e\u0301", PAGE),
]


@cache
def reference(folder):
    """text -> ids, by the library that the publisher's tokenizer stands on; control tokens in the text are text."""
    if (folder / "tokenizer.model").is_file():
        return SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).encode
    lines = map(bytes.split, (folder / "qwen.tiktoken").read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    encoding = tiktoken.Encoding("qwen", pat_str=WORDS, mergeable_ranks=ranks, special_tokens={})
    return lambda text: encoding.encode(unicodedata.normalize("NFC", text))


SPELT = st.sampled_from([*PAGE.split(), *PAGE[:400], *TEXTS[:-1], "<reserved_106>", "<eoa>", "<0x0A>", "<unused 3>"])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(text=st.lists(SPELT, max_size=12).map("".join))
@example(text="".join(TEXTS))
@pytest.mark.parametrize("name", first(2, TOKENIZERS))
def test_tokens_are_those_of_sentencepiece_and_tiktoken(tiny_models, loaded, name, text):
    """SentencePiece finds Baichuan2's and InternLM's user-defined pieces in any text."""
    tokenizer = loaded(name)[1]
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=name != "baichuan2-7b-chat").input_ids
    assert ids == reference(tiny_models / name)(text)
    assert tokenizer.decode(ids) == (unicodedata.normalize("NFC", text) if "qwen" in name else text)


READ_ALONE = """
import json, sys
sys.modules |= dict.fromkeys(["sentencepiece", "tiktoken", "google", "google.protobuf"])  # not to be imported
from chatmagic import load_model
for folder in sys.argv[1:]:
    print(json.dumps(load_model(folder)[1]("你好").input_ids))
"""


@pytest.mark.slow
def test_no_other_library_is_needed_to_read_them(tiny_models, loaded):
    """Those that the tests compare with are there only for the tests."""
    folders = [tiny_models / name for name in TOKENIZERS]
    done = subprocess.run([sys.executable, "-c", READ_ALONE, *folders], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [*map(json.loads, done.stdout.splitlines())] == [loaded(name)[1]("你好").input_ids for name in TOKENIZERS]


def test_control_tokens_and_their_ids(loaded):
    def facts(name):
        t = loaded(name)[1]
        lead = t("你好").input_ids[: -len(t("你好", add_special_tokens=False).input_ids)]
        return (t.bos_token_id, t.eos_token_id, t.pad_token_id, t.padding_side, t.model_max_length, lead)

    assert facts("baichuan2-7b-chat") == (1, 2, 0, "left", 4096, [])
    assert facts("qwen-7b-chat") == (None, 151645, 151643, "left", 8192, [])
    assert facts("internlm-chat-7b") == (1, 2, 2, "left", 2048, [1])
    assert facts("chatglm2-6b") == (None, 2, 0, "left", 32768, [64790, 64792])
    assert facts("llama-2-13b-chat") == (1, 2, 0, "left", 4096, [1])
    assert loaded("qwen-7b-chat")[1]("<|extra_0|><|extra_204|>").input_ids == [151646, 151850]
    glm = loaded("chatglm2-6b")[1]
    assert glm("[gMASK]sop", add_special_tokens=False).input_ids == [64790, 64792]
    assert 64792 not in glm("sophisticated", add_special_tokens=False).input_ids
    assert glm.convert_ids_to_tokens([64789, 64791, 64793]) == ["[MASK]", "[sMASK]", "eop"]


def test_chatglm2_has_no_place_for_a_system_text(loaded):
    with pytest.raises(Exception, match="ChatGLM2 knows no system text"):
        loaded("chatglm2-6b")[1].apply_chat_template([{"role": "system", "content": "你是老师。"}])


@every
def test_the_published_generation_config_is_honoured_without_a_warning(tiny_models, loaded, caplog, name):
    model, tokenizer = loaded(name)
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
    assert (config["eos_token_id"], config["max_length"]) == (MODELS[name].stops, None)
    ids = torch.tensor([prompts(tokenizer, name)[0]])
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
    limits = {name: context_limit(loaded(name)[0]) for name in MODELS}
    assert {name: limit for name, (limit, _) in limits.items()} == {name: MODELS[name].limit for name in MODELS}
    assert "dynamic NTK, log-n" in limits["qwen-7b-chat"][1]
    assert "InternLM's own code rescales" in limits["internlm-chat-7b"][1]


def test_a_reloaded_native_checkpoint_keeps_the_reason(loaded, tmp_path):
    model, tokenizer = loaded("qwen-7b-chat")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert context_limit(load_model(tmp_path)[0]) == context_limit(model)


# Baichuan2-13B's attention


@pytest.mark.slow
def test_alibi_under_each_attention(published):
    model, _, answers = published("baichuan2-13b-chat")
    before = model.config._attn_implementation
    for attention in "eager", "sdpa":
        model.set_attn_implementation(attention)
        for case in answers["cases"]:
            best = logits(model, case["prompt_ids"])[-1].topk(5)
            torch.testing.assert_close(best.values, torch.tensor(case["top5"])[:, 1], rtol=0, atol=1e-4)
        assert statically_cached(model, answers["cases"][2]["prompt_ids"]) == [answers["cases"][2]["greedy"]]
    model.set_attn_implementation(before)


def statically_cached(model, ids):
    batch = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    return greedy(model, **batch, cache_implementation="static", disable_compile=True)


def test_eager_and_sdpa_attention_have_the_same_alibi(loaded):
    model, tokenizer = loaded("baichuan2-13b-chat")
    ids, before = prompts(tokenizer, "baichuan2-13b-chat")[2], model.config._attn_implementation
    found = {}
    for attention in "eager", "sdpa":
        model.set_attn_implementation(attention)
        alone = greedy(model, input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long))
        assert statically_cached(model, ids) == alone
        found[attention] = logits(model, ids), alone
    model.set_attn_implementation(before)
    torch.testing.assert_close(found["eager"][0], found["sdpa"][0], rtol=0, atol=1e-4)
    assert found["eager"][1] == found["sdpa"][1]


def test_alibi_slopes():
    """Those of BLOOM (build_alibi_tensor): eight heads, and forty, the 13B's."""
    assert alibi.alibi_slopes(8).tolist() == [2.0**-n for n in range(1, 9)]
    forty = alibi.alibi_slopes(40)
    torch.testing.assert_close(forty[[0, 31]], torch.tensor([2.0**-0.25, 2.0**-8]))
    torch.testing.assert_close(forty[32:], torch.tensor([2.0 ** -(n / 8) for n in range(1, 16, 2)]))


def test_alibi_trains_as_it_evaluates_with_and_without_checkpointing(tiny_models):
    model, tokenizer = load_model(tiny_models / "baichuan2-13b-chat", dtype="float32")
    ids = torch.tensor([prompts(tokenizer, "baichuan2-13b-chat")[2]])

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
