"""The profiles of models that nobody could ask a hub about: their sizes follow from the published shapes; and what
`chatmagic models` says."""

import tomllib
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

from chatmagic import cli, machine
from chatmagic.course import profile as module
from chatmagic.course.profile import GB, get_profile, profiles, smallest_card

SHAPES = tomllib.loads(Path(__file__).with_name("shapes.toml").read_text("utf-8"))


def shaped(name):
    """The model of that shape, without weights."""
    shape = dict(SHAPES[name])
    if every := shape.pop("full_attention_interval", None):
        kinds = ["full_attention" if (layer + 1) % every == 0 else "sliding_attention" for layer in range(99)]
        shape["layer_types"] = kinds[: shape["num_hidden_layers"]]
    config = CONFIG_MAPPING[profiles()[name].architecture](**shape)
    with torch.device("meta"):
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)


@pytest.mark.parametrize("name", SHAPES)
def test_the_size_is_that_of_the_published_shape(name):
    model = shaped(name)
    linear = {layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)}
    quantised = sum(layer.weight.numel() for layer in linear - {model.get_output_embeddings()})
    assert profiles()[name].bytes == 2 * model.num_parameters()
    assert profiles()[name].embedded == 2 * (model.num_parameters() - quantised)


def test_every_profile_of_an_architecture_has_a_shape_or_says_why():
    unknown = [name for name, profile in profiles().items() if profile.architecture and name not in SHAPES]
    assert unknown == ["minicpm5-1b"]
    text = (Path(module.__file__).with_name("profiles.toml")).read_text("utf-8")
    assert "bytes = 2_100_000_000  # of its GGUF of 16 bits" in text


def test_embeddings_stay_in_16_bit_when_a_model_is_quantised():
    """Gemma 4's are half of it: it takes more than a Qwen3 of its size."""
    gemma, qwen = get_profile("gemma-4-e2b-it"), get_profile("qwen3-8b")
    assert gemma.bytes < 0.6 * qwen.bytes and gemma.memory > qwen.memory


def test_cards():
    assert [smallest_card(int(size * GB)) for size in (3, 8, 8.1, 15.5, 16, 90)] == [
        "8 GB", "8 GB", "12 GB", "T4", "24 GB", "several",
    ]  # fmt: skip


@pytest.fixture
def small_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("CHATMAGIC_HOME", str(tmp_path))
    monkeypatch.setattr(module, "gpu_memory", lambda: 8 * GB)
    usage = machine.shutil._ntuple_diskusage(10**12, 0, 10**12)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)


def test_models_lists_those_that_fit_first(small_gpu, capsys):
    assert cli.main(["models"]) == 0
    head, blank, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[0] == "profile" and not blank
    between = lines.index("more than this machine has:")
    here, others = ([line.split()[0] for line in some] for some in (lines[: between - 1], lines[between + 2 :]))
    assert sorted([*here, *others]) == sorted(profiles())
    assert "qwen3-1.7b" in here and "qwen2.5-7b-instruct" in others
    (line,) = [line for line in lines if line.startswith("hunyuan-1.8b-instruct")]
    assert line.split()[1:8] == ["3.6", "GB", "4.3", "GB", "5.6", "GB", "8"]
    assert line.endswith("(not in the EU, the UK or South Korea)")


def test_models_says_all_of_one(small_gpu, capsys):
    assert cli.main(["models", "qwen3.5-4b"]) == 0
    said = capsys.readouterr().out
    for part in (
        "Qwen/Qwen3.5-4B",
        "Apache-2.0",
        "qwen3_5_text",
        "by its published shape",
        "not used",
        "lacks 10.4 GB",
    ):
        assert part in said
    assert cli.main(["models", "qwen3.5"]) == 1
    assert "did you mean 'qwen3.5-4b'" in capsys.readouterr().err


def test_lora_wants_a_smaller_rate():
    profile = get_profile("qwen3-4b-instruct-2507")
    assert (profile.rate("adalora"), profile.rate("lora")) == (2e-3, pytest.approx(4e-4))


@pytest.mark.parametrize("gigabytes, batch", [(0, 2), (8, 2), (14.9, 2), (15.8, 8), (80, 8)])
def test_larger_batches_are_for_a_gpu_that_holds_them(monkeypatch, gigabytes, batch):
    """A T4 has 15.8 GB; in 8 the larger batches ran out of memory."""
    monkeypatch.setattr(module, "gpu_memory", lambda: gigabytes * 10**9)
    assert module.profiles.__wrapped__()["qwen2.5-coder-0.5b-instruct"].batch_size == batch
