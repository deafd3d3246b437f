"""Published folders read into native classes: where the weights come from and go, and what is refused."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from chatmagic import load_model
from chatmagic.models.checkpoint import CheckpointError, open_weights
from chatmagic.models.families import FAMILIES, baichuan, find_family, nearest_family
from chatmagic.models.families.native import native_names, native_weights
from chatmagic.models.load import RemoteCodeError


@pytest.fixture
def copy(tiny_models, tmp_path):
    """A family's folder, free to be broken."""
    return lambda name: shutil.copytree(tiny_models / name, tmp_path / name)


def test_weights_are_views_of_the_mapped_files(tiny_models):
    folder = tiny_models / "baichuan2-7b-chat"
    config = json.loads((folder / "config.json").read_text())
    stored = open_weights(folder)
    weights = native_weights(stored, baichuan.TENSORS, LlamaForCausalLM, baichuan.native_config(config))
    mapped = {tensor.untyped_storage().data_ptr() for tensor, _ in stored.values()}
    assert {tensor.untyped_storage().data_ptr() for tensor in weights.values()} <= mapped
    packed = stored["model.layers.1.self_attn.W_pack.weight"].tensor
    assert torch.equal(weights["model.layers.1.self_attn.k_proj.weight"], packed[16:32])


def test_native_names():
    assert native_names("model.layers.3.self_attn.W_pack.weight", baichuan.TENSORS) == [
        "model.layers.3.self_attn.q_proj.weight",
        "model.layers.3.self_attn.k_proj.weight",
        "model.layers.3.self_attn.v_proj.weight",
    ]
    qwen = FAMILIES["Qwen"].TENSORS
    assert native_names("transformer.h.3.attn.c_proj.weight", qwen) == ["model.layers.3.self_attn.o_proj.weight"]


def test_norm_head_is_normalised_once_in_the_dtype_that_is_loaded(tiny_models, tmp_path):
    folder = tiny_models / "baichuan2-7b-chat"
    stored = open_weights(str(folder))["lm_head.weight"].tensor
    model, tokenizer = load_model(folder, dtype="bfloat16")
    assert torch.equal(model.lm_head.weight, torch.nn.functional.normalize(stored.to(torch.bfloat16)))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert torch.equal(load_model(tmp_path)[0].lm_head.weight, model.lm_head.weight)


def test_baichuan_1_has_a_plain_head():
    weights = {"lm_head.weight": torch.ones(2, 2)}
    baichuan.adapt(weights, {"vocab_size": 64000}, torch.float32)
    assert torch.equal(weights["lm_head.weight"], torch.ones(2, 2))


def test_a_family_changes_nothing_for_a_llama(tiny_models, tmp_path):
    """Llama's saved tensors are the same before and after its class has read a Baichuan."""

    def saved(folder):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        return safe_open(folder / "model.safetensors", "pt").keys()

    before = saved(tmp_path / "before")
    model, _ = load_model(tiny_models / "baichuan2-7b-chat")
    model.save_pretrained(tmp_path / "baichuan")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "before")
    again.save_pretrained(tmp_path / "after")
    assert "model.layers.0.self_attn.q_proj.weight" in before
    assert safe_open(tmp_path / "after" / "model.safetensors", "pt").keys() == before
    assert saved(tmp_path / "new") == before


# Refusals


def test_unknown_remote_code_is_refused(copy):
    folder = copy("qwen-7b-chat")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | {"visual": {}}))
    with pytest.raises(RemoteCodeError) as refused:
        load_model(folder)
    assert "type 'qwen'" in str(refused.value)
    assert "its own modeling_qwen.py to be run to make a QWenLMHeadModel" in str(refused.value)
    assert str(refused.value).endswith("the nearest is Qwen.")


@pytest.mark.parametrize(
    "config, nearest",
    [
        ({"model_type": "baichuan_m1", "architectures": ["BaichuanM1ForCausalLM"]}, "Baichuan2"),
        ({"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"]}, "InternLM"),
        ({"model_type": "chatglm", "architectures": ["ChatGLMModel"]}, "ChatGLM2"),
        ({"model_type": "zzz"}, "Llama"),
    ],
)
def test_nearest_family(tmp_path, config, nearest):
    assert find_family(config, tmp_path) is None
    assert nearest_family(config) == nearest


def test_a_missing_shard_is_named(copy):
    folder = copy("baichuan2-7b-chat")
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    missing = r"pytorch_model-00002-of-00002.bin is missing \(1 of 2 .* with it model.layers.1.self_attn"
    with pytest.raises(CheckpointError, match=missing):
        load_model(folder)


@pytest.mark.parametrize("name, file", [("qwen-7b-chat", "qwen.tiktoken"), ("chatglm2-6b", "tokenizer.model")])
def test_a_missing_tokenizer_is_named(copy, name, file):
    folder = copy(name)
    (folder / file).unlink()
    family = find_family(json.loads((folder / "config.json").read_text()), folder)
    with pytest.raises(CheckpointError, match=f"{file} is missing"):
        family.tokenizer(folder, json.loads((folder / "config.json").read_text()))


def rewrite(folder, change):
    file = folder / "pytorch_model.bin"
    weights = torch.load(file, weights_only=True)
    change(weights)
    torch.save(weights, file)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_wrong_shape_is_named(copy, quantize):
    folder = copy("chatglm2-6b")
    name = "transformer.encoder.layers.1.self_attention.query_key_value.weight"
    rewrite(folder, lambda weights: weights.update({name: weights[name][:-8]}))
    wrong = rf"pytorch_model.bin holds {name} of shape \(56, 32\), and config.json asks for \(64, 32\)"
    with pytest.raises(CheckpointError, match=wrong):
        load_model(folder, quantize=quantize)


def test_a_missing_tensor_is_named(copy):
    folder = copy("chatglm2-6b")
    rewrite(folder, lambda weights: weights.pop("transformer.encoder.layers.1.mlp.dense_h_to_4h.weight"))
    with pytest.raises(CheckpointError, match="No file holds transformer.encoder.layers.1.mlp.dense_h_to_4h.weight"):
        load_model(folder)


def test_an_unknown_tensor_is_named(copy):
    folder = copy("chatglm2-6b")
    rewrite(folder, lambda weights: weights.update({"transformer.prefix_encoder.weight": torch.zeros(1)}))
    with pytest.raises(
        CheckpointError,
        match="pytorch_model.bin holds transformer.prefix_encoder.weight, for which this model",
    ):
        load_model(folder)
