"""GGUF files: what the converter makes of each family, read back by llama.cpp's engine, and how weights are stored."""

import json
import urllib.request
from contextlib import contextmanager

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from chatmagic import encode_prompt, merge_adapter
from chatmagic.conversation.messages import build_messages
from chatmagic.models.gguf import CONVERTER, ExportError, _q4_0, write_gguf
from chatmagic.prompts.templates import get_template
from odd_texts import texts
from over_nf4 import trained_over_nf4
from tiny_gguf import tiny_gguf

F16, F32, Q4, Q8 = (gguf.GGMLQuantizationType[name] for name in ("F16", "F32", "Q4_0", "Q8_0"))


@pytest.fixture
def stand_in(tmp_path):
    """A converter that copies what lies beside the model, or says that it cannot, and the folder of a model."""
    (tmp_path / CONVERTER).write_text(
        "import sys, shutil, pathlib\n"
        "model, out = pathlib.Path(sys.argv[1]), sys.argv[sys.argv.index('--outfile') + 1]\n"
        "made = model / 'made.gguf'\n"
        "sys.exit('Model X is not supported') if not made.is_file() else shutil.copy(made, out)\n"
    )
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    return model


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "f16"])
def test_matrices_are_quantised_and_all_else_stays(tmp_path, stand_in, kind):
    before = tiny_gguf(stand_in / "made.gguf", tied=False, kind="F16")
    write_gguf(stand_in, tmp_path / "out.gguf", kind, tmp_path, "小炉", [95])
    reader, old = gguf.GGUFReader(tmp_path / "out.gguf"), gguf.GGUFReader(stand_in / "made.gguf")
    types = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
    outer = {"token_embd.weight", "output.weight"}
    inner = {name for name, tensor in before.items() if tensor.ndim == 2} - outer
    assert {types[name] for name in inner} == {{"q8_0": Q8, "q4_0": Q4, "f16": F16}[kind]}
    assert {types[name] for name in outer} == {F16 if kind == "f16" else Q8}
    assert {types[name] for name in before.keys() - inner - outer} == {F32}
    bound = {"q8_0": 1e-4, "q4_0": 1e-2, "f16": 1e-6}[kind]
    for tensor in reader.tensors:
        error = gguf.dequantize(tensor.data, tensor.tensor_type) - before[tensor.name]
        assert np.square(error).mean() < bound * np.square(before[tensor.name]).mean(), tensor.name
    ours = {"general.file_type", "general.quantization_version", "tokenizer.ggml.eot_token_id"}
    same = [field for name, field in old.fields.items() if name not in ours and not name.startswith("GGUF.")]
    assert len(same) > 10 and all(reader.fields[field.name].contents() == field.contents() for field in same)
    assert reader.fields["tokenizer.ggml.eot_token_id"].contents() == 95  # eos is another
    assert not list(tmp_path.glob("16-bit*"))


def test_four_bits_lose_less_than_by_gguf_itself():
    rng = np.random.default_rng(0)
    numbers = rng.standard_normal((64, 256)).astype(np.float32)
    numbers[0], numbers[1, :32] = 0, 3.0
    ours, theirs = (gguf.dequantize(blocks, Q4) for blocks in (_q4_0(numbers), gguf.quantize(numbers, Q4)))
    assert np.square(ours - numbers).sum() < 0.93 * np.square(theirs - numbers).sum()
    assert (ours[0] == 0).all() and (ours[1, :32] == 3).all()


def test_what_llama_cpp_does_not_know_is_refused_in_words(tmp_path, stand_in):
    out = tmp_path / "out.gguf"
    with pytest.raises(ExportError, match="says: Model X is not supported Serve it as it is: chatmagic serve"):
        write_gguf(stand_in, out, "q8_0", tmp_path, "x", [])
    for config, said in [
        ({"quantization_config": {"bits": 4}}, "is quantised. Export the 16-bit model"),
        ({"model_type": "baichuan_alibi"}, "reads no Baichuan-13B"),
        ({"model_type": "glm", "vocab_size": 65024}, "reads no ChatGLM2"),
    ]:
        (stand_in / "config.json").write_text(json.dumps(config))
        with pytest.raises(ExportError, match=said):
            write_gguf(stand_in, out, "q8_0", tmp_path, "x", [])
    assert not out.exists()


def test_numbers_beyond_float16_are_refused(tmp_path, stand_in):
    tiny_gguf(stand_in / "made.gguf", tied=True, kind="BF16", times=1e6)
    with pytest.raises(ExportError, match="holds numbers that float16 does not"):
        write_gguf(stand_in, tmp_path / "out.gguf", "f16", tmp_path, "x", [])


# --- each family, by the real converter and the real engine


@pytest.fixture(scope="module")
def converter(tmp_path_factory):
    """The real one; what `chatmagic export` brings."""
    from chatmagic.course.converter import find_converter

    return find_converter()


@contextmanager
def engine(path):
    """Asks llama.cpp's server for a GGUF file: ask(path, **fields)."""
    from xllamacpp import CommonParams, Server

    params = CommonParams()
    params.model.path, params.n_ctx, params.port, params.verbosity, params.ui = str(path), 512, 0, -1, False
    server = Server(params)

    def ask(where, **fields):
        request = urllib.request.Request(server.listening_address + where, json.dumps(fields).encode())
        return json.load(urllib.request.urlopen(request))

    yield ask


CONVERSATIONS = [
    build_messages("你好"),
    build_messages("who are you?", [("你好", "Hi there"), ("a b", "c\nd")]),
]
FAMILIES = ["tiny baichuan2-7b-chat", "tiny internlm-chat-7b", "tiny llama-2-13b-chat", "golden qwen-7b-chat"]
# Qwen's needs the published tokenizer: llama.cpp knows a byte-level BPE by what it makes of one text.


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.parametrize("name", [*FAMILIES, *(each.replace("tiny", "golden") for each in FAMILIES[:3])])
def test_a_family_reads_and_answers_the_same_in_llama_cpp(tmp_path, request, converter, name):
    """Token ids of 1000 texts, ids of prompts, greedy answers, and the token that ends them."""
    kind, family = name.split()
    base = request.getfixturevalue(f"{kind}_models") / family
    trained_over_nf4(base, tmp_path / "adapter")
    merged = merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(merged)
    template = get_template(None, tokenizer)
    write_gguf(merged, file := tmp_path / "x.gguf", "f16", converter, "x", template.stop_token_ids(tokenizer))
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    odd = [text for text in texts(tokenizer) if "</s>" not in text or family != "qwen-7b-chat"]
    with engine(file) as ask:
        for text in odd:
            got = ask("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
            assert got == tokenizer(text).input_ids, text
        for messages in CONVERSATIONS:
            prompt = ask("/apply-template", messages=messages)["prompt"]
            ids = ask("/tokenize", content=prompt, add_special=True, parse_special=True)["tokens"]
            assert ids == encode_prompt(messages, tokenizer)
            answer = ask("/completion", prompt=ids, n_predict=8, temperature=0, return_tokens=True)["tokens"]
            out = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, repetition_penalty=1.0)
            assert answer == out[0, len(ids) :].tolist()
    fields = gguf.GGUFReader(file).fields
    ends = [
        fields[f"tokenizer.ggml.{each}_token_id"].contents()
        for each in ("eos", "eot")
        if f"tokenizer.ggml.{each}_token_id" in fields
    ]
    assert template.stop_token_ids(tokenizer)[0] in ends
