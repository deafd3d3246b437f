"""Fixtures that several test files share: the golden data beside the checkout, and models to chat with."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FAMILIES = ["baichuan2-13b-chat", "chatglm2-6b", "internlm-chat-7b", "qwen-7b-chat"]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden data. Absent elsewhere: skipped there, but a failure where CI demands it."""
    if not (SHARED / "vectors").is_dir():
        reason = f"golden data not found at {SHARED}"
        (pytest.fail if os.environ.get("CHATMAGIC_REQUIRE_SHARED") else pytest.skip)(reason)
    return SHARED


@pytest.fixture(scope="session")
def tiny_models(shared, tmp_path_factory) -> Path:
    """A folder with one tiny checkpoint a family, in its publisher's layout (see `shared/models`)."""
    out = tmp_path_factory.mktemp("tiny")
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


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, shared, tiny_models):
    """A published family, tiny: model, tokenizer, and cases of what its publisher's code says."""
    from chatmagic import load_model

    model, tokenizer = load_model(tiny_models / request.param, dtype="float32")
    if tokenizer is None:  # the 13B folder leaves it to the 7B's
        tokenizer = load_model(tiny_models / "baichuan2-7b-chat")[1]
    golden = shared / "models" / request.param / "golden.json"
    return model, tokenizer, json.loads(golden.read_text("utf-8"))["cases"]
