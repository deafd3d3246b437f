"""Merging against PEFT's own `merge_and_unload`, and what a merge refuses."""

import errno
import json
import math
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from architectures import write
from chatmagic import ChatmagicError, adalora_to_lora, load_model, merge_adapter
from chatmagic.files import WriteError
from chatmagic.models import merge
from chatmagic.models.checkpoint import CheckpointError
from chatmagic.models.load import load_trained
from chatmagic.models.merge import MergeError
from chatmagic.models.provenance import BASE, PROVENANCE, base_fingerprint, base_folder, base_name
from over_nf4 import trained_over_nf4
from published import MODELS
from quick import first

IDS = torch.tensor([[5, 17, 3, 250, 9, 9, 41, 2]])


def make_base(folder: Path, dtype=torch.bfloat16) -> Path:
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 300, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder, max_shard_size="60KB")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def make_adapter(folder: Path, model, config) -> Path:
    """An adapter with random factors, saved by PEFT; under AdaLoRA with ranks 4, 3, 2, 1, 0, 4, ..."""
    torch.manual_seed(1)
    model = get_peft_model(model, config)
    layers = [name for name, _ in model.base_model.model.named_modules() if name.endswith("lora_A")]
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    if isinstance(config, AdaLoraConfig) and config.total_step == 10:
        config.rank_pattern = {
            f"{name[:-1]}E.default": [rank >= i % 5 for rank in range(4)] for i, name in enumerate(layers)
        }
    model.save_pretrained(folder, save_embedding_layers=False)
    model.unload()
    return folder


def adalora(total_step=10):
    modules = ["q_proj", "k_proj", "o_proj", "up_proj", "gate_up_proj", "down_proj"]
    return AdaLoraConfig(init_r=4, target_r=2, total_step=total_step, lora_alpha=16, target_modules=modules)


def lora(**settings):
    return LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], **settings)


CONFIGS = {
    "adalora": adalora,
    "adalora, nothing allocated yet": lambda: adalora(total_step=11),
    "lora": lora,
    "lora, patterns": lambda: lora(
        use_rslora=True, rank_pattern={"layers.1.*q_proj": 7}, alpha_pattern={"down_proj": 5}
    ),
}


@pytest.fixture
def base(tmp_path):
    return make_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path, base):
    return make_adapter(tmp_path / "adapter", AutoModelForCausalLM.from_pretrained(base), adalora())


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def assert_same_but_for_rounding(merged, unmerged, base, ids=IDS):
    """Three models in float32: a merge into 16-bit weights may lose 2 % of what the adapter does to the logits."""
    change = (logits(unmerged, ids) - logits(base, ids)).norm()
    assert (logits(merged, ids) - logits(unmerged, ids)).norm() < 0.02 * change


def weights(folder):
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("dtype", first(1, [torch.bfloat16, torch.float32, torch.float16]))
@pytest.mark.parametrize("kind", CONFIGS)
def test_merged_weights_equal_those_of_peft_to_the_last_bit(tmp_path, kind, dtype):
    base = make_base(tmp_path / "base", dtype)
    adapter = make_adapter(tmp_path / "adapter", AutoModelForCausalLM.from_pretrained(base), CONFIGS[kind]())
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    expected = model.merge_and_unload().state_dict()

    merged = weights(merge_adapter(base, adapter, tmp_path / "merged"))

    assert merged.keys() == expected.keys() and len(merged) == 21
    for name, weight in merged.items():
        assert weight.dtype == dtype and torch.equal(weight, expected[name]), name
    unchanged = [name for name, weight in weights(base).items() if torch.equal(weight, merged[name])]
    assert len(unchanged) < len(merged) - 3


def test_one_is_told_what_an_adapter_trained_over_nf4_was_merged_onto(tmp_path, base, adapter, capsys):
    """That it is what it was trained on: tests/test_architectures.py, and below for the families."""
    plain = weights(merge_adapter(base, adapter, tmp_path / "plain"))
    assert not capsys.readouterr().err
    name_nf4(adapter, ["model.layers.0.mlp.gate_proj.weight"])
    merged = weights(merge_adapter(base, adapter, tmp_path / "merged"))
    assert "as NF4 leaves them, as in training; the other way: onto='original', --onto orig" in capsys.readouterr().err
    assert [name for name in plain if not torch.equal(merged[name], plain[name])] == [
        "model.layers.0.mlp.gate_proj.weight"
    ]
    original = weights(merge_adapter(base, adapter, tmp_path / "original", onto="original"))
    assert "as they are published; the other way: onto='trained', --onto trained" in capsys.readouterr().err
    assert all(torch.equal(original[name], plain[name]) for name in plain)
    with pytest.raises(MergeError, match="onto is 'nf4'; expected 'trained' or 'original'"):
        merge_adapter(base, adapter, tmp_path / "third", onto="nf4")


def name_nf4(adapter: Path, names: list[str]) -> None:
    """Note beside an adapter that these weights were in NF4 while it was trained."""
    (adapter / PROVENANCE).write_text(json.dumps({"nf4": names}))


@pytest.mark.usefixtures("tokenizers_built_once")
@pytest.mark.parametrize("family", first(1, MODELS, of=lambda name: MODELS[name].native))
def test_a_published_family_trained_over_nf4_is_merged_onto_that(tmp_path, tiny_models, family):
    expected = trained_over_nf4(tiny_models / family, tmp_path / "adapter")
    merged = weights(merge_adapter(tiny_models / family, tmp_path / "adapter", tmp_path / "merged"))
    assert merged.keys() == expected.keys()
    assert [name for name in merged if not torch.equal(merged[name], expected[name])] == []


def test_how_an_adapter_was_trained_to_think_goes_with_the_merged_tokenizer(tmp_path, base, adapter):
    path = adapter / PROVENANCE
    said = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(said | {"thinking": False}))
    merged = merge_adapter(base, adapter, tmp_path / "merged")
    assert json.loads((merged / "tokenizer_config.json").read_text())["chat_thinking"] is False


def test_the_merged_folder_is_a_whole_checkpoint_in_the_shards_of_the_base(tmp_path, base, adapter):
    merged = merge_adapter(base, adapter, tmp_path / "new" / "merged")

    assert merged == tmp_path / "new" / "merged"
    assert len(list(base.glob("*.safetensors"))) > 2
    assert {file.name for file in merged.iterdir()} == {file.name for file in base.iterdir()}
    for file in merged.iterdir():
        same = file.suffix == ".safetensors" or file.read_bytes() == (base / file.name).read_bytes()
        assert same or file.name == "config.json"  # which tells one setting twice: tests/models/test_portable.py
    assert [folder.name for folder in merged.parent.iterdir()] == ["merged"]
    assert_same_but_for_rounding(load(merged), PeftModel.from_pretrained(load(base), adapter), load(base))


@pytest.mark.usefixtures("tokenizers_built_once")
@pytest.mark.parametrize("family", first(1, MODELS, of=lambda name: MODELS[name].native))
def test_a_published_family_merges_into_a_native_checkpoint(tmp_path, tiny_models, family):
    base = tiny_models / family
    model, tokenizer = load_model(base, dtype=torch.bfloat16)
    adapter = make_adapter(tmp_path / "adapter", model, adalora())
    plain = deepcopy(model).float()
    unmerged = PeftModel.from_pretrained(deepcopy(plain), adapter)
    expected = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()

    merged = merge_adapter(base, adapter, tmp_path / "merged")

    tensors = weights(merged)
    assert tensors.keys() == expected.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], expected[name])] == []
    native = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    assert_same_but_for_rounding(native, unmerged, plain, IDS + 3)
    assert native.generation_config.eos_token_id == model.generation_config.eos_token_id
    merged_tokenizer = AutoTokenizer.from_pretrained(merged)
    assert merged_tokenizer("你好 <|im_end|>").input_ids == tokenizer("你好 <|im_end|>").input_ids
    assert merged_tokenizer.chat_template == tokenizer.chat_template
    config = json.loads((merged / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "auto_map" not in config
    assert not list(merged.glob("*.py")) and not list(merged.glob("*.bin*"))


def test_adalora_becomes_a_lora_adapter_with_equal_logits(tmp_path):
    base = make_base(tmp_path / "base", torch.float32)
    adapter = make_adapter(tmp_path / "adapter", AutoModelForCausalLM.from_pretrained(base), adalora())

    folded = adalora_to_lora(adapter, tmp_path / "lora")

    config = json.loads((folded / "adapter_config.json").read_text())
    tensors = load_file(folded / "adapter_model.safetensors")
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 4)
    assert not config["rank_pattern"]
    kept = [k for k, v in load_file(adapter / "adapter_model.safetensors").items() if "lora_A" in k and len(v)]
    assert sorted(k for k in tensors if "lora_A" in k) == sorted(f"{k}.weight" for k in kept)
    assert len(kept) == 8 == len(config["target_modules"])
    assert {v.shape[0] for k, v in tensors.items() if "lora_A" in k} == {4}
    assert {v.shape[1] for k, v in tensors.items() if "lora_B" in k} == {4}
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    ours = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folded)
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-4)
    merged = merge_adapter(base, folded, tmp_path / "merged")
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(merged)), logits(theirs), atol=1e-4)


def test_only_adalora_that_kept_a_rank_is_folded(tmp_path, base, adapter):
    with pytest.raises(MergeError, match="not ADALORA"):
        adalora_to_lora(adalora_to_lora(adapter, tmp_path / "lora"), tmp_path / "again")
    file = adapter / "adapter_model.safetensors"
    empty = {k: v[:, :0] if "lora_B" in k else v[:0] for k, v in load_file(file).items()}
    save_file({k: v.contiguous() for k, v in empty.items()}, file)
    with pytest.raises(MergeError, match="are of rank 0, and adapter_config.json says 1"):
        adalora_to_lora(adapter, tmp_path / "empty")
    change_config(adapter, lambda c: c | {"rank_pattern": {k: [False] * 4 for k in c["rank_pattern"]}})
    with pytest.raises(MergeError, match="kept no rank"):
        adalora_to_lora(adapter, tmp_path / "empty")


def test_fingerprint_sees_the_config_and_every_layer(tmp_path, base):
    first = base_fingerprint(base)
    assert first == base_fingerprint(shutil.copytree(base, tmp_path / "copy"))
    for shard in base.glob("*.safetensors"):
        for name, weight in (tensors := load_file(shard)).items():
            if weight.dim() == 2:
                save_file(tensors | {name: weight + 1}, tmp_path / "copy" / shard.name, metadata={"format": "pt"})
                assert base_fingerprint(tmp_path / "copy") != first, name
        shutil.copy(shard, tmp_path / "copy")
    assert base_fingerprint(tmp_path / "copy") == first
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config | {"rope_theta": 5}))
    assert base_fingerprint(tmp_path / "copy") != first


def test_a_base_other_than_the_one_trained_on_is_refused(tmp_path, base, adapter):
    (adapter / PROVENANCE).write_text(json.dumps({BASE: base_fingerprint(base)}))
    merge_adapter(base, adapter, tmp_path / "merged")
    with pytest.raises(MergeError, match=rf"trained on another model.*base='{base}'.*any_base=True.*--any-base"):
        merge_adapter(tmp_path / "merged", adapter, tmp_path / "twice")
    settings = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(MergeError, match=r"config or weights differ. If you know"):
        merge_adapter(tmp_path / "merged", adapter, tmp_path / "twice")
    assert not (tmp_path / "twice").exists()
    assert merge_adapter(tmp_path / "merged", adapter, tmp_path / "twice", any_base=True) == tmp_path / "twice"
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(base)}))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    with pytest.raises(MergeError, match=rf"names '{base}', and that is this folder: its files were changed since. If"):
        merge_adapter(base, adapter, tmp_path / "third")


@pytest.mark.parametrize(
    "place, name",
    [
        ("models/qwen3.5-2b", "qwen3.5-2b"),
        ("models/Qwen/Qwen3-0.6B@main", "Qwen/Qwen3-0.6B@main"),
        (
            "me/.cache/hub/models--Qwen--Qwen3-0.6B/snapshots/0123abc",
            "~/.cache/hub/models--Qwen--Qwen3-0.6B/snapshots/0123abc",
        ),
        ("disk/mine", None),
        ("models", None),
    ],
)
def test_what_files_call_a_base(tmp_path, monkeypatch, place, name):
    monkeypatch.setenv("CHATMAGIC_HOME", str(tmp_path / "models"))
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    name = name or str(tmp_path / place)
    assert base_name(tmp_path / place) == str(tmp_path / place), "no folder yet"
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / place / "config.json").write_text("{}")
    assert base_folder(name) == base_folder(str(tmp_path / place)) == tmp_path / place and base_folder("") is None
    monkeypatch.chdir(tmp_path)
    assert base_name(tmp_path / place) == base_name(place) == name
    (tmp_path / place).rename(tmp_path / "moved")
    assert base_folder(name) is None
    if place != "models":
        (tmp_path / "models").mkdir(exist_ok=True)
        (tmp_path / "moved").rename(there := tmp_path / "models" / (tmp_path / place).name)
        assert base_folder(name) == there, "a friend has put it with his own"


def test_an_adapter_that_was_moved_to_another_machine_serves_there(tmp_path, monkeypatch, tokenizer):
    """Where its base lies elsewhere, or, for what needs no weight of it, not at all."""
    monkeypatch.setenv("CHATMAGIC_HOME", str(tmp_path / "here"))
    write("qwen3_5", tmp_path / "here" / "qwen3.5-2b", tokenizer)
    expected = trained_over_nf4(tmp_path / "here" / "qwen3.5-2b", tmp_path / "adapter")
    names = load_file(adalora_to_lora(tmp_path / "adapter", tmp_path / "lora") / "adapter_model.safetensors").keys()
    assert names != load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    (tmp_path / "here").rename(tmp_path / "there")
    moved = (tmp_path / "adapter").rename(tmp_path / "from a friend")
    assert load_file(adalora_to_lora(moved, tmp_path / "again") / "adapter_model.safetensors").keys() == names
    merged = load_model(merge_adapter(tmp_path / "there" / "qwen3.5-2b", moved, tmp_path / "merged"))[0].state_dict()
    assert [name for name in expected if not torch.equal(merged[name], expected[name])] == []
    write("qwen3", tmp_path / "other", tokenizer)
    with pytest.raises(MergeError, match="names 'qwen3.5-2b', which is not here. If you know"):
        merge_adapter(tmp_path / "other", moved, tmp_path / "wrong")
    with pytest.raises(CheckpointError, match=f"an adapter for qwen3.5-2b, which is not here.*{tmp_path}/here/qwen3.5"):
        load_trained(moved)
    monkeypatch.setenv("CHATMAGIC_HOME", str(tmp_path / "there"))
    assert load_trained(moved)[0].peft_config["default"].r == 4
    with pytest.raises(MergeError, match=rf"merge_adapter\(base='{tmp_path}/there/qwen3.5-2b', ...\). If you know"):
        merge_adapter(tmp_path / "other", moved, tmp_path / "wrong")


def laid_out_otherwise(base: Path, other: Path) -> Path:
    """The same model: in one file, in `.bin`, with other line ends, and without a cache."""
    model = AutoModelForCausalLM.from_pretrained(base)
    other.mkdir()
    torch.save(dict(reversed(model.state_dict().items())), other / "pytorch_model.bin")
    config = json.loads((base / "config.json").read_text()) | {"use_cache": False, "transformers_version": "4.1"}
    (other / "config.json").write_bytes(json.dumps(config, indent=4).replace("\n", "\r\n").encode("utf-8-sig"))
    return other


def test_the_fingerprint_is_of_the_model_not_of_its_files(tmp_path, base, adapter):
    other = laid_out_otherwise(base, tmp_path / "other")
    assert base_fingerprint(other) == base_fingerprint(base)
    (adapter / PROVENANCE).write_text(json.dumps({BASE: base_fingerprint(base)}))
    merge_adapter(other, adapter, tmp_path / "merged")


def test_a_base_in_bin_files_comes_out_as_safetensors(tmp_path, base, adapter):
    """In one file, and in several; of weights that were in NF4, too."""
    name_nf4(adapter, ["model.layers.0.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"])
    expected = weights(merge_adapter(base, adapter, tmp_path / "expected"))
    one = laid_out_otherwise(base, tmp_path / "one")
    several = tmp_path / "several"
    several.mkdir()
    shutil.copy(base / "config.json", several)
    tensors = [*torch.load(one / "pytorch_model.bin").items()]
    files = {"pytorch_model-00001-of-00002.bin": tensors[:9], "pytorch_model-00002-of-00002.bin": tensors[9:]}
    for name, some in files.items():
        torch.save(dict(some), several / name)
    index = {"weight_map": {key: name for name, some in files.items() for key, _ in some}}
    (several / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for folder in (one, several):
        merged = merge_adapter(folder, adapter, tmp_path / f"merged-{folder.name}")
        found = weights(merged)
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
        assert not list(merged.glob("*.bin*"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged-several").state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


@pytest.mark.parametrize("stored_twice", [False, True])
def test_a_tied_head_becomes_its_own(tmp_path, stored_twice):
    """As the model with its adapter computes: the embedding stays, the head changes."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base", max_shard_size="30KB")
    if stored_twice:
        file = next(f for f in (tmp_path / "base").glob("*.safetensors") if "model.embed_tokens.weight" in load_file(f))
        tensors = load_file(file)
        save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
        index = json.loads((tmp_path / "base" / "model.safetensors.index.json").read_text())
        index["weight_map"]["lm_head.weight"] = file.name
        (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    settings = LoraConfig(r=4, lora_alpha=16, target_modules=["lm_head", "q_proj"])
    adapter = make_adapter(tmp_path / "adapter", load(tmp_path / "base"), settings)
    expected = logits(PeftModel.from_pretrained(load(tmp_path / "base"), adapter))
    merged = merge_adapter(tmp_path / "base", adapter, tmp_path / "merged")
    assert torch.allclose(logits(load(merged)), expected, atol=1e-4)
    assert (logits(load(tmp_path / "base")) - expected).norm() > 1
    with pytest.raises(MergeError, match="not ADALORA"):  # the base lacks a name, and that is no other name
        adalora_to_lora(adapter, tmp_path / "lora")


# --- adapters as other tools leave them


def change_config(adapter: Path, change) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def change_factors(adapter: Path, change) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def as_bin(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    torch.save(load_file(file), adapter / "adapter_model.bin")
    file.unlink()


def with_a_mark(adapter: Path) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(file.read_text(), encoding="utf-8-sig")


OPTIONAL = ["fan_in_fan_out", "revision", "bias", "task_type", "init_lora_weights", "inference_mode", "auto_mapping"]
HARMLESS = {
    "keys of other tools": lambda a: change_config(a, lambda c: c | {"unsloth_fixed": True, "trained_by": {"x": 1}}),
    "optional ones missing": lambda a: change_config(a, lambda c: {k: v for k, v in c.items() if k not in OPTIONAL}),
    "a byte order mark": with_a_mark,
    "adapter_model.bin": as_bin,
}


@pytest.mark.parametrize("name", HARMLESS)
def test_adapters_of_other_tools_merge_as_ever(tmp_path, base, adapter, name):
    expected = weights(merge_adapter(base, adapter, tmp_path / "expected"))
    HARMLESS[name](adapter)
    found = weights(merge_adapter(base, adapter, tmp_path / "merged"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def cut(adapter: Path, name: str, size: int) -> None:
    (adapter / name).write_bytes((adapter / name).read_bytes()[:size])


def without(factors: dict, part: str) -> dict:
    return {name: tensor for name, tensor in factors.items() if part not in name}


BROKEN = {
    "cut factors": (lambda a: cut(a, "adapter_model.safetensors", 3000), "cut short"),
    "empty factors": (lambda a: cut(a, "adapter_model.safetensors", 0), "cut short"),
    "empty bin": (lambda a: (as_bin(a), cut(a, "adapter_model.bin", 0)), "cut short"),
    "cut bin": (lambda a: (as_bin(a), cut(a, "adapter_model.bin", 900)), "cut short"),
    "cut config": (lambda a: cut(a, "adapter_config.json", 100), "is no JSON"),
    "empty config": (lambda a: cut(a, "adapter_config.json", 0), "is no JSON"),
    "a list as config": (lambda a: (a / "adapter_config.json").write_text("[1]"), "no object of settings"),
    "no kind": (lambda a: change_config(a, lambda c: c | {"peft_type": None}), "not plain LoRA"),
    "no B": (
        lambda a: change_factors(a, lambda f: without(f, "lora_B")),
        "half an adapter.*has lora_A, lora_B, lora_E",
    ),
    "no E": (lambda a: change_factors(a, lambda f: without(f, "lora_E")), "half an adapter"),
    "other ranks": (
        lambda a: change_factors(a, lambda f: {n: t[:1].clone() if "lora_A" in n else t for n, t in f.items()}),
        "do not fit: ranks",
    ),
    "no tensors": (lambda a: change_factors(a, lambda f: {}), "holds no tensors"),
    "a pointer of Git LFS": (
        lambda a: (a / "adapter_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1"),
        "cut short or no checkpoint",
    ),
    "deep config": (lambda a: (a / "adapter_config.json").write_text("[" * 100_000), "is no JSON"),
    "alpha as text": (
        lambda a: change_config(a, lambda c: c | {"lora_alpha": "16"}),
        "lora_alpha = '16'.*never writes",
    ),
    "no finite alpha": (lambda a: change_config(a, lambda c: c | {"lora_alpha": math.inf}), "lora_alpha = inf"),
    "a switch as text": (lambda a: change_config(a, lambda c: c | {"use_rslora": "false"}), "use_rslora = 'false'"),
    "a pattern as list": (lambda a: change_config(a, lambda c: c | {"rank_pattern": [1]}), r"rank_pattern = \[1\]"),
    "no pattern": (lambda a: change_config(a, lambda c: c | {"alpha_pattern": {"(": 3}}), "alpha_pattern = "),
    "the base as number": (
        lambda a: change_config(a, lambda c: c | {"base_model_name_or_path": 7}),
        "base_model_name_or_path = 7",
    ),
    "rank 0": (lambda a: change_config(a, lambda c: c | {"init_r": 0}), "init_r = 0"),
    "another rank in the config": (
        lambda a: change_config(a, lambda c: c | {"init_r": 9}),
        "are of rank [0-4], and adapter_config.json says 9",
    ),
    "whole numbers": (
        lambda a: change_factors(a, lambda f: {n: t.to(torch.int64) for n, t in f.items()}),
        "of torch.int64, which is no number to multiply by",
    ),
    "a scalar": (
        lambda a: change_factors(a, lambda f: {n: t.sum() if "lora_A" in n else t for n, t in f.items()}),
        r"a lora_A of .* of shape \(\), which is no linear layer's",
    ),
    "names that are numbers": (
        lambda a: (as_bin(a), torch.save({1: torch.ones(1)}, a / "adapter_model.bin")),
        "holds more than tensors",
    ),
    "odd provenance": (lambda a: (a / PROVENANCE).write_text('{"nf4": 7}'), "has nf4 = 7, which no training writes"),
    "cut provenance": (lambda a: (a / PROVENANCE).write_text('{"base_te'), "is no JSON"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_adapter_is_told_in_words(tmp_path, base, adapter, name):
    spoil, words = BROKEN[name]
    spoil(adapter)
    with pytest.raises(ChatmagicError, match=words):
        merge_adapter(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    "setting", [{"r": 99}, {"rank_pattern": {"q_proj": 2}}, {"r": "4"}, {"lora_alpha": [16]}, {"fan_in_fan_out": "no"}]
)
def test_what_a_lora_adapter_is_scaled_by_is_known_or_refused(tmp_path, base, setting):
    """Factors of rank 4 under a config that says 99 were scaled by 4, and PEFT does not load them."""
    adapter = make_adapter(tmp_path / "lora", AutoModelForCausalLM.from_pretrained(base), lora())
    change_config(adapter, lambda c: c | setting)
    with pytest.raises(MergeError, match="adapter_config.json (says|has)"):
        merge_adapter(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    "weight_map", [["a"], {"a": 3}, {"a": "../weights.safetensors"}, {"a": "/weights.safetensors"}]
)
def test_an_index_names_files_beside_it(base, weight_map):
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="index.json names .* as a file of weights"):
        load_model(base)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_a_broken_file_of_the_base_is_named_where_it_lies(tmp_path, base, adapter, name):
    (base / name).write_text("{")
    with pytest.raises(CheckpointError, match=f"{base / name} is no JSON"):
        merge_adapter(base, adapter, tmp_path / "merged")


@pytest.mark.parametrize("size", [0, 7, 3000])
def test_a_cut_base_is_told_in_words(tmp_path, base, adapter, size):
    cut(base, max(file.name for file in base.glob("*.safetensors")), size)
    with pytest.raises(CheckpointError, match="cut short or no checkpoint"):
        merge_adapter(base, adapter, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.slow
def test_the_second_of_two_merges_is_told(tmp_path, base, adapter, monkeypatch):
    """While the first is at work, and without spoiling it."""
    real, told = merge.write_shard, []

    def meanwhile(*arguments):
        if not told:
            told.append("")
            command = [sys.executable, "-m", "chatmagic.cli", "merge", base, adapter, tmp_path / "merged"]
            second = subprocess.run([*map(str, command)], capture_output=True, text=True)
            told[0] = (second.returncode, second.stderr)
        return real(*arguments)

    monkeypatch.setattr(merge, "write_shard", meanwhile)
    merge_adapter(base, adapter, tmp_path / "merged")
    code, words = told[0]
    assert code == 1 and "Another process is making" in words
    assert load(tmp_path / "merged")


def test_without_a_fingerprint_the_shapes_decide(tmp_path, base, adapter):
    shard = next(file for file in base.glob("*.safetensors") if any("up_proj" in k for k in load_file(file)))
    tensors = {k: v[:-1] if "up_proj" in k else v for k, v in load_file(shard).items()}
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(MergeError, match=r"up_proj.weight, \(300, 32\),.*holds a \(299, 32\) of torch.bfloat16"):
        merge_adapter(base, adapter, tmp_path / "merged")


def test_a_quantised_base_is_refused_by_name(tmp_path, base, adapter):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(MergeError, match="16-bit"):
        merge_adapter(base, adapter, tmp_path / "merged")
    assert base_fingerprint(base) is None


def test_nothing_is_written_over_a_folder(tmp_path, base, adapter):
    (tmp_path / "merged").mkdir()
    for act in (lambda: merge_adapter(base, adapter, tmp_path / "merged"),
                lambda: adalora_to_lora(adapter, tmp_path / "merged")):  # fmt: skip
        with pytest.raises(WriteError, match="rm -r"):
            act()
    assert not any((tmp_path / "merged").iterdir())


def test_a_full_disk_is_told_before_the_start(tmp_path, base, adapter, monkeypatch):
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("usage", "free")(size - 1))
    monkeypatch.setattr("chatmagic.models.merge.write_shard", lambda *_: pytest.fail("the merge began"))
    with pytest.raises(WriteError, match="Make room"):
        merge_adapter(base, adapter, tmp_path / "merged")
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.slow
def test_a_merge_that_breaks_leaves_nothing_and_a_killed_one_nothing_in_the_way(tmp_path, base, adapter, monkeypatch):
    def full(target, *_):
        target.write_bytes(b"half a shard")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(WriteError, match="is full"):
        patch.setattr("chatmagic.models.merge.write_shard", full)
        merge_adapter(base, adapter, tmp_path / "merged")
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["adapter", "base"]

    script = (
        "import os, signal, sys; from chatmagic.models import merge; step = merge.write_shard\n"
        "def dies(*arguments): step(*arguments); os.kill(os.getpid(), signal.SIGKILL)\n"
        "merge.write_shard = dies; merge.merge_adapter(*sys.argv[1:])"
    )
    killed = subprocess.run([sys.executable, "-c", script, base, adapter, tmp_path / "merged"], check=False)
    assert killed.returncode == -9 and not (tmp_path / "merged").exists()
    for part in tmp_path.glob(".merged.*.part"):
        os.utime(part, (0, 0))
    merge_adapter(base, adapter, tmp_path / "merged")
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["adapter", "base", "merged"]


@pytest.mark.parametrize(
    "setting", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"init_lora_weights": "pissa"}]
)
def test_more_than_plain_lora_is_refused_with_the_way_to_go(tmp_path, base, adapter, setting):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | setting))
    with pytest.raises(MergeError, match="merge_and_unload"):
        merge_adapter(base, adapter, tmp_path / "merged")


def test_folders_that_are_no_model_or_no_adapter(tmp_path, base, adapter):
    with pytest.raises(MergeError, match="config.json"):
        merge_adapter(tmp_path, adapter, tmp_path / "merged")
    with pytest.raises(MergeError, match="adapter_config.json"):
        merge_adapter(base, base, tmp_path / "merged")
    min(base.glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="model-00001-of-00004.safetensors is missing"):
        merge_adapter(base, adapter, tmp_path / "merged")


@pytest.mark.slow
@pytest.mark.parametrize("trained_in", ["16 bit", "NF4"])
def test_host_memory_stays_below_twice_the_largest_shard(tmp_path, trained_in):
    """Four shards of 64 MiB in tensors of 1 MiB: a merge that held two shards would be seen."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir(), adapter.mkdir()
    (base / "config.json").write_text('{"model_type": "llama"}')
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "fan_in_fan_out": False}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    factors, weight_map = {}, {}
    for shard in range(4):
        layers = {f"layer.{shard}.{i}": torch.ones(1024, 512, dtype=torch.bfloat16) for i in range(64)}
        save_file({f"{name}.weight": w for name, w in layers.items()}, base / f"model-{shard}.safetensors")
        weight_map |= dict.fromkeys((f"{name}.weight" for name in layers), f"model-{shard}.safetensors")
        for name in layers:
            factors[f"base_model.model.{name}.lora_A.weight"] = torch.ones(2, 512)
            factors[f"base_model.model.{name}.lora_B.weight"] = torch.ones(1024, 2)
    save_file(factors, adapter / "adapter_model.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    if trained_in == "NF4":
        name_nf4(adapter, [*weight_map])
    script = (
        "import re, sys; from pathlib import Path; import bitsandbytes, chatmagic.models.families\n"
        "from chatmagic.models.merge import merge_adapter\n"
        "peak = lambda: 1024 * int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "before = peak(); merge_adapter(*sys.argv[1:]); print(peak() - before)"
    )
    command = [sys.executable, "-c", script, base, adapter, tmp_path / "merged"]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert grown < 2 * 64 * 2**20
    assert load_file(tmp_path / "merged" / "model-3.safetensors")["layer.3.63.weight"][7, 9] == 1 + 2 * 2
