"""ChatLLM over a server: what is asked of it, and what it refuses, breaks off or does not have."""

import json
import subprocess
import sys
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from chatmagic import ChatmagicError, build_messages, connect
from chatmagic.conversation.llm import Interrupted
from generation import interrupt_after

BREAKING_OFF = ["ends early", "dies", "sends half an event"]


class Handler(BaseHTTPRequestHandler):
    """An OpenAI-compatible server that knows the model "parrot" and the key "sesame"."""

    def do_GET(self):
        if self.path != "/v1/models":
            return self.answer(404, {"detail": "Not Found"})
        self.answer(200, {"object": "list", "data": [{"id": "parrot", "object": "model"}]})

    def do_POST(self):
        if self.path != "/v1/chat/completions":
            return self.answer(404, {"detail": "Not Found"})
        self.server.request = request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Authorization"] != "Bearer sesame":
            return self.answer(401, {"error": {"message": "wrong key"}})
        if request["model"] != "parrot":
            return self.answer(404, {"error": {"message": "no such model"}})
        if len(request["messages"][-1]["content"]) > 100:
            return self.answer(400, {"error": {"message": "maximum context length is 100"}})
        how = request["messages"][-1]["content"]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        if how == "dies":
            self.send_header("Content-Length", "9999")
        self.end_headers()
        for word in ["你", "好", "!"]:
            self.event({"choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}]})
            time.sleep(self.server.delay)
        if how == "sends half an event":
            self.wfile.write(b'data: {"choices": [{"ind\n\n')
        if how in BREAKING_OFF:
            return
        self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
        self.event({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, data):
        self.wfile.write(b"data: " + json.dumps({"object": "chat.completion.chunk", **data}).encode() + b"\n\n")

    def answer(self, status, data):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(data).encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.delay, server.handle_error = 0.0, lambda *_: None  # who interrupts hangs up
    Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def url(server):
    return f"http://127.0.0.1:{server.server_port}/v1"


def test_a_server_streams_and_counts(server, capsys):
    llm = connect(url(server), "parrot", system="s", max_chat_rounds=5)
    reply = llm("hi", temperature=0.5, top_p=0.9, seed=3, max_new_tokens=20)
    assert reply == "你好!" and capsys.readouterr().out == "你好!\n"
    assert (reply.stats.tokens_in, reply.stats.tokens_out, reply.stats.stop_reason) == (9, 3, "length")
    assert llm.history == [("hi", "你好!")]
    asked = server.request
    assert asked["messages"] == build_messages("hi", system="s")
    assert (asked["temperature"], asked["top_p"], asked["seed"], asked["max_tokens"]) == (0.5, 0.9, 3, 20)
    llm("again", greedy=True, stream=False)
    assert server.request["messages"] == build_messages("again", [("hi", "你好!")], "s")
    assert server.request["temperature"] == 0 and server.request["max_tokens"] == 512


def test_the_key_is_nowhere_to_be_seen(server, tmp_path, monkeypatch, capsys):
    llm = connect(url(server), "parrot")
    llm("hi")
    llm.save(tmp_path / "chat.jsonl")
    seen = (tmp_path / "chat.jsonl").read_text() + repr(llm) + repr(vars(llm)) + repr(vars(llm.backend))
    monkeypatch.setenv("OPENAI_API_KEY", "sesame seed")
    for model, query in [("parrot", "hi"), ("gpt", "hi"), ("parrot", "dies"), ("parrot", "x" * 101)]:
        with pytest.raises(ChatmagicError) as caught:
            connect(url(server), model)(query)
        seen += "".join(traceback.format_exception(caught.value))
    assert "sesame" not in seen + "".join(capsys.readouterr())


@pytest.mark.parametrize(
    "model, key, query, reason",
    [
        ("parrot", "open", "hi", "refused the key.*OPENAI_API_KEY"),
        ("gpt", "sesame", "hi", "no model 'gpt': it has parrot"),
        ("parrot", "sesame", "x" * 101, "maximum context length is 100"),
    ],
)
def test_what_a_server_refuses(server, monkeypatch, model, key, query, reason):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    llm = connect(url(server), model)
    with pytest.raises(ChatmagicError, match=reason):
        llm(query)
    assert llm.history == []


@pytest.mark.parametrize("how", BREAKING_OFF)
def test_a_server_that_breaks_off(server, capsys, how):
    llm = connect(url(server), "parrot")
    with pytest.raises(ChatmagicError, match=f"{url(server)} broke off in the middle of a reply; ask again"):
        llm(how)
    assert capsys.readouterr().out == "你好!\n" and llm.history == []
    assert llm("hi") == "你好!"


def test_a_dead_server():
    with pytest.raises(ChatmagicError, match="server at http://127.0.0.1:9/v1 does not answer: start it"):
        connect("http://127.0.0.1:9/v1", "parrot")("hi")


def test_an_address_without_its_v1(server):
    with pytest.raises(ChatmagicError, match="no model 'parrot'.* may lack its /v1"):
        connect(url(server).removesuffix("/v1"), "parrot")("hi")


@pytest.mark.parametrize("key", [None, ""])
def test_a_server_that_wants_no_key(server, monkeypatch, key):
    monkeypatch.delenv("OPENAI_API_KEY") if key is None else monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ChatmagicError, match="refused the key"):  # it was asked: no key is needed to ask
        connect(url(server), "parrot")("hi")


def test_an_option_no_server_has(server):
    with pytest.raises(ChatmagicError, match="no option 'top_k'"):
        connect(url(server), "parrot")("hi", top_k=5)


def test_stop_ends_a_servers_reply(server):
    server.delay = 1.0
    llm = connect(url(server), "parrot")
    interrupt_after(0.5)
    start = time.perf_counter()
    with pytest.raises(Interrupted) as caught:
        llm("hi")
    assert time.perf_counter() - start < 0.7 and caught.value.reply == "你"
    server.delay = 0.0
    assert llm("hi") == "你好!"


def test_chatting_with_a_server_needs_no_torch():
    code = (
        "import sys, chatmagic; chatmagic.connect('http://localhost:1/v1', 'm')\n"
        "assert not {'torch', 'transformers', 'IPython'} & set(sys.modules), set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
