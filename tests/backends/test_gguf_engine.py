"""A GGUF file answers as any chat model does, by llama.cpp's engine; nobody else can ask it."""

import sys

import httpx2
import pytest

from chatmagic import ChatLLM, ChatmagicError, build_messages
from chatmagic.backends.gguf import GGUFModel, open_gguf
from tiny_gguf import tiny_gguf


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tiny_gguf(path, True, "{% for message in messages %}{{ message.content }}{% endfor %}=")
    return path


def test_it_answers_and_counts(file):
    llm = open_gguf(file, context=128, stream=False, max_new_tokens=8)
    assert isinstance(llm, ChatLLM) and llm.name == "tiny" and llm.backend.context == 128
    first, again = (llm.chat(build_messages("ab"), greedy=True) for _ in range(2))
    assert first == again != "" and first.stats.tokens_in == 2 and 1 < first.stats.tokens_out <= 8
    assert first != llm.chat(build_messages("abcdefgh"), greedy=True)


def test_only_who_opened_it_can_ask(file):
    model = GGUFModel(file, 128)
    address = model._engine.listening_address
    assert address.startswith("http://127.0.0.1:")
    answer = httpx2.post(f"{address}/v1/chat/completions", json={"messages": build_messages("hi")})
    assert answer.status_code == 401


def test_what_cannot_be_opened(tmp_path, monkeypatch):
    with pytest.raises(ChatmagicError, match="no file.*chatmagic export"):
        open_gguf(tmp_path / "none.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ChatmagicError, match="cannot load .*bad.gguf"):
        open_gguf(tmp_path / "bad.gguf")
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(ChatmagicError, match=r"pip install 'chatmagic\[gguf\]'"):
        open_gguf(tmp_path / "bad.gguf")
