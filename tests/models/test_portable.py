"""What others than transformers 5 find in a folder. That transformers 4.57 reads it so was tried by hand: its releases
and 5's cannot be installed side by side. That llama.cpp's converter does: tests/models/test_gguf.py."""

import json
import re

import pytest
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer

from architectures import ARCHITECTURES, config_of
from chatmagic import load_model, merge_adapter
from chatmagic.models.portable import make_portable
from chatmagic.models.provenance import base_fingerprint
from chatmagic.models.unpack import unpack_gguf
from odd_texts import texts
from over_nf4 import trained_over_nf4
from published import MODELS
from quick import first
from tiny_gguf import tiny_gguf

# Of the families with a tokenizer.model: does a text begin with a space, and with <s>?
SPACE_AND_BOS = {
    "baichuan2-7b-chat": (False, False),
    "baichuan2-13b-chat": (False, False),
    "internlm-chat-7b": (False, True),
    "chatglm2-6b": (True, False),
    "llama-2-13b-chat": (True, True),
}


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text("utf-8"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_transformers_5_reads_the_same_config_as_before(tmp_path, name):
    config_of(name, 300).save_pretrained(tmp_path)
    before = AutoConfig.from_pretrained(tmp_path).to_dict()
    make_portable(tmp_path)
    after = AutoConfig.from_pretrained(tmp_path).to_dict()
    assert not before.pop("architectures") and re.search(
        "For(CausalLM|ConditionalGeneration)$", *after.pop("architectures")
    )
    assert after == before


LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_3 |= {"original_max_position_embeddings": 1024}
LINEAR, FACTORS = {"rope_type": "linear", "factor": 8.0}, {"short_factor": [1.1] * 6, "long_factor": [2.0] * 6}
LONG = {"rope_type": "longrope", "original_max_position_embeddings": 16} | FACTORS
BY_KIND = {"full_attention": LINEAR | {"rope_theta": 5e5}, "sliding_attention": {"rope_theta": 2e4}}
BY_KIND["sliding_attention"]["rope_type"] = "default"
GEMMA_3 = {"rope_theta": 5e5, "rope_scaling": LINEAR, "rope_local_base_freq": 2e4}
TURNED = {"rope_type": "default", "rope_theta": 1e3, "partial_rotary_factor": 0.25}


@pytest.mark.parametrize(
    "name, changes, told",
    [
        ("llama", {"rope_parameters": LLAMA_3 | {"rope_theta": 5e5}}, {"rope_theta": 5e5, "rope_scaling": LLAMA_3}),
        ("glm4", {"rope_parameters": TURNED}, {"rope_theta": 1e3, "partial_rotary_factor": 0.25}),
        (
            "phi3",
            {"rope_parameters": TURNED | LONG | {"partial_rotary_factor": 0.75}},
            {"partial_rotary_factor": 0.75, "rope_scaling": {"type": "longrope"} | FACTORS},
        ),
        ("gemma3_text", {"rope_parameters": BY_KIND}, GEMMA_3),
        ("gemma3", {"text_config": ARCHITECTURES["gemma3"]["text_config"] | {"rope_parameters": BY_KIND}}, GEMMA_3),
        ("qwen3_moe", {}, {"num_experts": 4}),
    ],
)
def test_what_transformers_4_calls_otherwise_is_told_by_its_names(tmp_path, name, changes, told):
    """By those of its classes of configs; that 4.57.6 computes the same logits of each was tried by hand."""
    config_of(name, 300, **changes).save_pretrained(tmp_path)
    before = AutoConfig.from_pretrained(tmp_path).get_text_config()
    make_portable(tmp_path)
    saved = read(tmp_path, "config")
    saved = saved.get("text_config", saved)
    assert {name: saved[name] for name in told} == told
    after = AutoConfig.from_pretrained(tmp_path).get_text_config().to_dict()
    twice = after.pop("partial_rotary_factor", 0.75), after["rope_parameters"].pop("type", "longrope")
    assert twice == (0.75, "longrope")  # which Phi's keeps beside its own
    assert after | {"architectures": None} == before.to_dict() | {"architectures": None}


@pytest.mark.usefixtures("tokenizers_built_once")
@pytest.mark.parametrize("family", first(3, MODELS))
def test_a_family_that_was_merged_is_told_in_the_words_of_others(tmp_path, tiny_models, family):
    base = tiny_models / family
    _, tokenizer = load_model(base)
    trained_over_nf4(base, tmp_path / "adapter")
    merged = merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    config, said = read(merged, "config"), read(merged, "tokenizer_config")
    assert config["rope_theta"] == 10000.0 and "rope_scaling" not in config
    assert said["tokenizer_class"] == "PreTrainedTokenizerFast"
    again = AutoTokenizer.from_pretrained(merged)
    assert [again(text).input_ids for text in texts(again)] == [tokenizer(text).input_ids for text in texts(again)]
    assert again.added_tokens_decoder == tokenizer.added_tokens_decoder
    if family in SPACE_AND_BOS:
        assert (merged / "tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()
        assert (said["add_prefix_space"], said["add_bos_token"]) == SPACE_AND_BOS[family]
        found = {int(index): token["content"] for index, token in said["added_tokens_decoder"].items()}
        assert found == {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}


def test_the_embedded_model_is_unpacked_so_that_others_read_it(tmp_path):
    tiny_gguf(tmp_path / "made.gguf", tied=True)
    (tmp_path / "model").mkdir()
    unpack_gguf(tmp_path / "made.gguf", tmp_path / "model")
    assert read(tmp_path / "model", "config")["rope_theta"] == 1e6
    assert read(tmp_path / "model", "config")["architectures"] == ["Qwen2ForCausalLM"]
    assert read(tmp_path / "model", "tokenizer_config")["tokenizer_class"] == "Qwen2Tokenizer"
    assert base_fingerprint(tmp_path / "model") == told_once(tmp_path / "model")


def test_a_text_is_split_as_the_file_says(tmp_path):
    """SmolLM2's publisher parts the digits from all else first: a space before them is none of theirs."""
    splits = {}
    for name in ("smollm", "qwen2"):
        tiny_gguf(tmp_path / f"{name}.gguf", tied=True, splits=name)
        (tmp_path / name).mkdir()
        unpack_gguf(tmp_path / f"{name}.gguf", tmp_path / name)
        tokenizer = Tokenizer.from_file(str(tmp_path / name / "tokenizer.json"))
        splits[name] = [part for part, _ in tokenizer.pre_tokenizer.pre_tokenize_str("a  12\r\n3 b")]
    assert splits == {
        "smollm": ["a", "ĠĠ", "1", "2", "čĊ", "3", "Ġb"],
        "qwen2": ["a", "Ġ", "Ġ", "1", "2", "čĊ", "3", "Ġb"],
    }


def told_once(folder):
    """The fingerprint as it was before: an adapter that was trained then fits."""
    config = read(folder, "config")
    del config["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config))
    return base_fingerprint(folder)
