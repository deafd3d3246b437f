"""load_model on ordinary checkpoints: what comes back, and what is said when a folder is not whole."""

import json
import os

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, SiglipConfig

from chatmagic import ChatmagicError, load_model
from chatmagic.models.checkpoint import CheckpointError, open_weights
from chatmagic.models.load import _resolve_dtype, check_config, context_limit, load_trained
from chatmagic.training.states import save_adapter

IDS = torch.tensor([[1, 5, 9, 2, 7, 7, 3]])


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama of random weights in three shards, wide enough for bitsandbytes' packed CPU kernel."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=99,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="70KB")
    vocabulary = {f"w{i}": i for i in range(64)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "w0"))).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(llama, tmp_path):
    """The same folder, free to be broken: its files are links that a test replaces."""
    for file in llama.iterdir():
        os.link(file, tmp_path / file.name)
    return tmp_path


def as_bin(folder):
    """Rewrite a folder of safetensors as one pytorch_model.bin."""
    weights = {name: tensor.clone() for name, (tensor, _) in open_weights(folder).items()}
    for file in folder.glob("model*"):
        file.unlink()
    torch.save(weights, folder / "pytorch_model.bin")


def logits(model):
    with torch.no_grad():
        return model(IDS.to(model.device)).logits.float().cpu()


def test_auto_dtype_is_the_checkpoints(llama):
    model, tokenizer = load_model(llama, device_map="cpu")
    assert model.dtype == torch.bfloat16 and not model.training
    assert tokenizer("w5").input_ids == [5]
    assert load_model(llama, dtype="float32", device_map="cpu")[0].dtype == torch.float32


def test_nf4_has_double_quantisation_and_is_smaller(llama):
    model, _ = load_model(llama, quantize="nf4")
    config = model.config.quantization_config
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("nf4", True)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    assert (logits(model) - logits(load_model(llama)[0])).abs().max() < 5


def test_int8_stays_near(llama):
    reference = logits(load_model(llama)[0])
    assert (logits(load_model(llama, quantize="int8")[0]) - reference).abs().max() < 0.1 * reference.abs().max()


@pytest.mark.parametrize("spoken", [False, True])
def test_nf4_saves_exactly_before_and_after_a_forward(llama, tmp_path, spoken):
    model, tokenizer = load_model(llama, quantize="nf4")
    before = logits(model) if spoken else None
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = load_model(tmp_path, quantize="nf4")
    with pytest.raises(ChatmagicError, match=r"is quantised already \(nf4\), and cannot become int8"):
        load_model(tmp_path, quantize="int8")
    assert torch.equal(logits(again), logits(model) if before is None else before)


def test_nf4_gradients_reach_the_first_layer_after_an_evaluation(llama):
    model, _ = load_model(llama, quantize="nf4", dtype="bfloat16")
    embedded = model.get_input_embeddings()(IDS.to(model.device)).detach()

    def gradient():
        leaf = embedded.clone().requires_grad_()
        model.train()(inputs_embeds=leaf).logits.float().square().sum().backward()
        return leaf.grad

    fresh = gradient()
    logits(model.eval())
    assert torch.equal(gradient(), fresh) and fresh.abs().max() > 0


@pytest.mark.parametrize("model_type, expected", [("llama", torch.float16), ("gemma3_text", torch.float32)])
def test_auto_dtype_of_a_gpu_without_bfloat16(monkeypatch, model_type, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert _resolve_dtype("auto", {"model_type": model_type, "torch_dtype": "bfloat16"}) == expected
    composite = {"model_type": model_type, "text_config": {"dtype": "bfloat16"}}
    assert _resolve_dtype("auto", composite) == expected


def test_a_token_to_pad_with_is_none_that_a_conversation_holds(copy):
    """Of the marks that a tokenizer has beside its eos: one that is for it, or one that its template does not write."""
    tokenizer = load_model(copy)[1]
    tokenizer.add_special_tokens({"eos_token": "</s>", "additional_special_tokens": ["<|user|>", "[MASK]"]})
    tokenizer.chat_template, tokenizer.pad_token = "{{ '<|user|>' }}", "</s>"
    tokenizer.save_pretrained(copy)
    assert load_model(copy)[1].pad_token == "[MASK]"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "[MASK]", "<|finetune_right_pad_id|>"]})
    tokenizer.save_pretrained(copy)
    assert load_model(copy)[1].pad_token == "<|finetune_right_pad_id|>"
    tokenizer.pad_token = "[MASK]"
    tokenizer.save_pretrained(copy)
    assert load_model(copy)[1].pad_token == "[MASK]"


def test_what_has_no_language_model_is_no_model_to_talk_to(copy):
    (copy / "config.json").unlink()
    SiglipConfig().save_pretrained(copy)
    with pytest.raises(CheckpointError, match="is a siglip, of which transformers has no causal language model"):
        load_model(copy)


@pytest.mark.parametrize("experts", [8, [64, 64], 1, None])
def test_a_mixture_is_told_by_its_config_alone(tmp_path, capsys, experts):
    """ERNIE-4.5-VL counts those of its text and those of its pictures."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "ernie4_5_vl_moe", "moe_num_experts": experts}))
    check_config(tmp_path, "author/name")
    assert ("author/name is a mixture of experts" in capsys.readouterr().err) is (experts in (8, [64, 64]))


def test_context_limit(llama):
    assert context_limit(load_model(llama)[0]) == (99, "the model was trained on no longer texts")


def test_unknown_quantisation(llama):
    with pytest.raises(ChatmagicError, match="quantize='fp4' is not known: give 'nf4', 'int8' or None"):
        load_model(llama, quantize="fp4")


def test_unknown_dtype(llama):
    with pytest.raises(ChatmagicError, match="dtype='fp16' is not known: give 'auto', 'float32'"):
        load_model(llama, dtype="fp16")


def test_missing_folder(tmp_path):
    with pytest.raises(CheckpointError, match="There is no folder .*nowhere"):
        load_model(tmp_path / "nowhere")


def test_a_folder_without_config(tmp_path):
    with pytest.raises(CheckpointError, match="has no config.json"):
        load_model(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is an adapter, not a model"):
        load_model(tmp_path)


def test_a_folder_without_weights(copy):
    for file in copy.glob("model*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="holds no weights.*Found: config.json, generation_config.json"):
        load_model(copy)


def test_missing_shard(copy):
    (copy / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003.safetensors is missing \(1 of 3 shards"):
        load_model(copy)


def test_truncated_safetensors(copy):
    shard = copy / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="model-00002-of-00003.safetensors is cut short"):
        load_model(copy)


def test_truncated_bin(copy):
    as_bin(copy)
    whole = (copy / "pytorch_model.bin").read_bytes()
    (copy / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="pytorch_model.bin is cut short"):
        load_model(copy)


def test_index_that_promises_too_much(copy):
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.extra.weight"] = "model-00001-of-00003.safetensors"
    (copy / "model.safetensors.index.json").unlink()
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="model-00001-of-00003.safetensors does not hold model.extra.weight"):
        load_model(copy)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_wrong_shape(copy, quantize):
    as_bin(copy)
    weights = torch.load(copy / "pytorch_model.bin", weights_only=True)
    weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(128, 60)
    torch.save(weights, copy / "pytorch_model.bin")
    wrong = r"pytorch_model.bin holds model.layers.0.mlp.up_proj.weight of shape \(128, 60\), and .* \(128, 64\)"
    with pytest.raises(CheckpointError, match=wrong):
        load_model(copy, quantize=quantize)


def test_missing_tensor(copy):
    as_bin(copy)
    weights = torch.load(copy / "pytorch_model.bin", weights_only=True)
    del weights["model.layers.1.mlp.up_proj.weight"]
    torch.save(weights, copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="No file in .* holds model.layers.1.mlp.up_proj.weight"):
        load_model(copy)


def test_missing_tokenizer(copy):
    (copy / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer that transformers can read"):
        load_model(copy)


class Payload:
    """Pickles as a call of os.system."""

    def __reduce__(self):
        return os.system, ("touch chatmagic_was_here",)


@pytest.mark.parametrize("payload, said", [(Payload(), "asks to run posix.system"), ("text", "x is a str")])
def test_bin_with_more_than_tensors(copy, payload, said, monkeypatch):
    as_bin(copy)
    monkeypatch.chdir(copy)
    torch.save({"x": payload}, copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=f"pytorch_model.bin holds more than tensors.*{said}"):
        load_model(copy)
    assert not (copy / "chatmagic_was_here").exists()


def test_bin_without_names(copy):
    as_bin(copy)
    torch.save([torch.zeros(1)], copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pytorch_model.bin is no checkpoint but a list"):
        load_model(copy)


# --- an adapter over its base


def setting(**settings):
    def change(folder):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))

    return change


def tensors(change):
    def rewrite(folder):
        file = folder / "adapter_model.safetensors"
        save_file(change(dict(sorted(load_file(file).items()))), file)

    return rewrite


def content(name, written):
    return lambda folder: (folder / name).write_bytes(written)


NO_ADAPTER = "PEFT makes no adapter for .*base of .*adapter: "
BROKEN = {
    "another rank": (setting(r=9), NO_ADAPTER + "Error.*size mismatch for .*lora_A"),
    "a rank that is no number": (setting(r="4"), NO_ADAPTER),
    "a kind that PEFT does not know": (setting(peft_type="NEW"), NO_ADAPTER + "'NEW'"),
    "a task that PEFT does not know": (setting(task_type="NEW"), NO_ADAPTER + "Invalid task type"),
    "layers that the base does not have": (setting(target_modules=["nope"]), NO_ADAPTER + "Target modules .'nope'"),
    "patterns of another kind": (setting(rank_pattern=[1]), NO_ADAPTER),
    "an initialisation that wants more": (setting(init_lora_weights="corda"), NO_ADAPTER),
    "a base that is no name": (setting(base_model_name_or_path=3), "base_model_name_or_path = 3, which is no name"),
    "no base": (setting(base_model_name_or_path=None), "a model that it does not name, which is not here"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    "empty weights": (content("adapter_model.safetensors", b""), "adapter_model.safetensors is cut short"),
    "settings that are cut": (content("adapter_config.json", b'{"r": 4'), "adapter_config.json is no JSON"),
    "half of a layer": (
        tensors(lambda held: dict([*held.items()][1:])),
        "half an adapter: it lacks 1 tensors, the first is .*lora_A",
    ),
    "no tensors": (tensors(lambda held: {}), "half an adapter: it lacks 8 tensors"),
    "a factor of another shape": (
        tensors(lambda held: held | {min(held): torch.zeros(2, 2)}),
        NO_ADAPTER + "Error.*size mismatch",
    ),
    "numbers that are none": (
        tensors(lambda held: held | {min(held): held[min(held)] * torch.nan}),
        "numbers that are not finite, first in .*lora_A",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_adapter_that_cannot_be_put_on_its_base_is_told_in_words(llama, tmp_path, name):
    breaks, words = BROKEN[name]
    (tmp_path / "base").symlink_to(llama)
    model = get_peft_model(
        load_model(tmp_path / "base")[0],
        LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    save_adapter(model, adapter := tmp_path / "adapter")
    ids = torch.arange(40)[None]
    assert torch.equal(load_trained(adapter)[0](ids).logits, model.eval()(ids).logits)
    breaks(adapter)
    with pytest.raises(CheckpointError, match=words):
        load_trained(adapter)
