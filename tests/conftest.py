"""Fixtures that several test files share: the golden data beside the checkout, and models to chat with."""

import gc
import json
import os
import re
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from golden import PUBLISHED, SHARED
from quick import first

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pytest_configure():
    """Some tests interrupt themselves; a shell that runs pytest in the background has interrupts ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


# jsonschema does without it where it is missing, and to import it builds a grammar in two seconds.
sys.modules.setdefault("rfc3987_syntax", None)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """All that torch and transformers are made of, a million objects, is looked through for garbage neither while the
    tests' modules are imported, which took a third of that time, nor afterwards."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_unconfigure():
    """Or nanobind takes what is left at the end for leaks."""
    gc.unfreeze()


def pytest_collection_modifyitems(items):
    """What is asked of a real model needs the network, if only once."""
    for item in items:
        if {"small", "embedded"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("network")


_kept_inside = False


def _stay_inside(event, arguments):
    """Refuse what would leave this machine, name servers included, while a test runs that is not marked `network`."""
    if _kept_inside and event in ("socket.connect", "socket.sendto", "socket.getaddrinfo"):
        host = arguments[0] if event == "socket.getaddrinfo" else arguments[1][0]
        if isinstance(host, str) and not re.match(r"127\.|::1$|localhost$|0\.0\.0\.0$|/|$", host):
            raise OSError(f"A test that is not marked `network` would reach {host}.")


sys.addaudithook(_stay_inside)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    global _kept_inside
    _kept_inside = item.get_closest_marker("network") is None
    try:
        return (yield)
    finally:
        _kept_inside = False


@pytest.fixture(autouse=True)
def course_of_a_test(tmp_path, monkeypatch):
    """No test writes to the courses of whoever runs it."""
    monkeypatch.setenv("CHATMAGIC_COURSE", str(tmp_path / "home" / "course"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden data. Absent elsewhere: skipped there, but a failure where CI demands it."""
    if not (SHARED / "vectors").is_dir():
        reason = f"needs the publishers' tokenizers, the ids and logits of their own code, and the seed, in {SHARED}"
        (pytest.fail if os.environ.get("CHATMAGIC_REQUIRE_SHARED") else pytest.skip)(reason)
    return SHARED


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> Path:
    """A folder with one tiny checkpoint a published model, in its publisher's layout, all made by us."""
    from published import MODELS, write

    out = tmp_path_factory.mktemp("tiny")
    for name in MODELS:
        write(name, out / name)
    return out


@pytest.fixture(scope="session")
def golden_models(shared, tmp_path_factory) -> Path:
    """The same with the publishers' tokenizers, and in `golden.json` what their own code answers."""
    out = tmp_path_factory.mktemp("golden")
    subprocess.run([sys.executable, shared / "models" / "build.py", out], check=True, stdout=subprocess.DEVNULL)
    return out


@pytest.fixture(scope="session")
def small() -> Path:
    """The folder of the quick real model, SmolLM2-135M-Instruct."""
    from chatmagic import snapshot_download

    return snapshot_download("smollm2-135m")


@pytest.fixture(scope="session")
def embedded() -> Path:
    """The folder of the embedded model, Qwen2.5-Coder-0.5B-Instruct: 20 s where it is not there yet."""
    from chatmagic import snapshot_download

    return snapshot_download("qwen2.5-coder-0.5b-instruct")


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes, one token each, and ChatML's marks: any random model with it speaks broken UTF-8."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE({character: index for index, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=CHATML
    )


@pytest.fixture
def model(tokenizer):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokenizers_built_once():
    """Building one takes a second or more, and it never changes: each folder's is built at its first load only."""
    from chatmagic.models.families import FAMILIES

    built = {}

    def once(build):
        def tokenizer(folder, config):
            if folder not in built:
                built[folder] = build(folder, config)
            return built[folder]

        return tokenizer

    with pytest.MonkeyPatch.context() as patch:
        for family in FAMILIES.values():
            patch.setattr(family, "tokenizer", once(family.tokenizer))
        yield


@pytest.fixture(scope="session")
def loaded(request):
    """(name, kind) -> model in fp32 and tokenizer, each loaded once; to be left as they are."""
    from chatmagic import load_model

    @cache
    def load(name, kind="tiny"):
        return load_model(request.getfixturevalue(f"{kind}_models") / name, dtype="float32")

    return load


@pytest.fixture(scope="module", params=first(2, PUBLISHED))
def family(request, loaded):
    """A family's model, its tokenizer, and cases: messages, their ids and 24 greedy tokens, as `golden.json` has them
    from the publisher's code; of our own, as transformers' generate says."""
    from chatmagic import encode_prompt
    from generation import plain
    from golden import golden
    from published import MODELS

    kind, name = request.param.split()
    model, tokenizer = loaded(name, kind)
    if kind == "golden":
        file = request.getfixturevalue("golden_models") / name / "golden.json"
        return model, tokenizer, json.loads(file.read_text("utf-8"))["cases"]
    cases = [{"messages": case["messages"]} for case in golden("publishers")["prompts"][MODELS[name].template]]
    for case in cases:
        case["prompt_ids"] = encode_prompt(case["messages"], tokenizer)
        options = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": 24}
        case["greedy"] = plain(model, case["prompt_ids"], **options)
    return model, tokenizer, cases
