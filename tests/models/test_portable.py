"""What others than transformers 5 find in a folder. That transformers 4.57 reads it so was tried by hand: its releases
and 5's cannot be installed side by side. That llama.cpp's converter does: tests/models/test_gguf.py."""

import json
import re

import pytest
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


def test_rotary_positions_that_are_scaled_are_told_to_others(tmp_path):
    scaled = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled["original_max_position_embeddings"] = 1024
    config = config_of("llama", 300, rope_parameters=scaled | {"rope_theta": 500000.0})
    config.save_pretrained(tmp_path)
    make_portable(tmp_path)
    saved = read(tmp_path, "config")
    assert (saved["rope_theta"], saved["rope_scaling"]) == (500000.0, scaled)
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == config.rope_parameters


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


def told_once(folder):
    """The fingerprint as it was before: an adapter that was trained then fits."""
    config = read(folder, "config")
    del config["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config))
    return base_fingerprint(folder)
