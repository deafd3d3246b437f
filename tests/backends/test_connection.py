"""What is wrong with an address, a key, a certificate or a model is said in one sentence that tells what to type."""

import socket
import ssl
import subprocess

import pytest

from chatmagic import ChatmagicError, connect
from chatmagic.backends.presets import SERVERS
from fake_server import FakeServer, refuses, running, says

KEYS = ["OPENAI_API_KEY", "OPENAI_BASE_URL", *(server.key for server in SERVERS.values() if server.key)]


@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    for variable in KEYS:
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def server():
    with running() as server:
        yield server


def sent(server, url=None, **settings):
    """The headers that a question came with."""
    connect(url or server.url, "parrot", stream=False, **settings)("hi")
    return server.headers[-1]


@pytest.mark.parametrize(
    "url, words",
    [
        ("localhost:8000/v1", "lacks its scheme: write http://localhost:8000/v1"),
        ("127.0.0.1:8000/v1", "lacks its scheme: write http://127.0.0.1:8000/v1"),
        ("//gpu:8000/v1", "lacks its scheme: write http://gpu:8000/v1"),
        ("api.example.com/v1", "lacks its scheme: write https://api.example.com/v1"),
        ("http:/localhost:8000", "scheme"),
        ("http：//localhost：8000/v1", "Chinese punctuation in it: write http://localhost:8000/v1$"),
        ("ftp://localhost/v1", "write http:// or https://"),
        ("htp://localhost/v1", "write http:// or https://"),
        ("http://", "is none: write it as http://localhost:8000/v1"),
        ("http://localhost:80 00/v1", "is none"),
        ("http://localhost:eight/v1", "is none"),
        ("http://gpu/v1?version=2", "is none"),
        ("http://gpu/v1#chat", "is none"),
        ("http://me:secret@gpu/v1", "name or password: pass them in headers="),
        ("http://gpu/v1/chat/completions", "goes too far: .*Write http://gpu/v1$"),
        ("http://gpu/v1/completions/", "goes too far: .*Write http://gpu/v1$"),
        ("http://gpu/v1/models", "goes too far: .*Write http://gpu/v1$"),
        ("http://gpu/api/chat", "goes too far: .*Write http://gpu/api$"),
        ("olama", "no server is called 'olama'; did you mean 'ollama'"),
        ("", "takes an address, or one of chatmagic, vllm, ollama"),
        (None, "takes an address, or one of chatmagic, vllm, ollama"),
    ],
)
def test_an_address_that_is_none(url, words):
    with pytest.raises(ChatmagicError, match=words) as caught:
        connect(url, "parrot")
    assert "secret" not in str(caught.value)


def test_where_something_else_listens(server):
    root = server.url.removesuffix("/v1")
    for url in root, f"{root}/", f"{root}/v1/v1", f"{root}/v1/chat/v2", f"{root}/api":
        with pytest.raises(ChatmagicError, match=f"has nothing at that address: write {server.url}$"):
            connect(url, "parrot")("hi")
    server.models = []
    server.moods = [refuses(200, "<!doctype html><title>Open WebUI</title>")]
    with pytest.raises(ChatmagicError, match="no model loaded: load 'parrot' there"):
        connect(server.url, "parrot")("hi")


def test_a_page_in_the_place_of_a_reply(monkeypatch):
    monkeypatch.setattr(FakeServer, "prefix", "/api")
    with running() as server:
        server.moods = [refuses(200, "<!doctype html><title>Open WebUI</title>")]
        monkeypatch.setattr("fake_server.Handler.do_GET", lambda handler: handler.answer(200, "<html></html>"))
        with pytest.raises(ChatmagicError, match="has no chat at that address, which may lack its /v1"):
            connect(server.url, "parrot")("hi")


def test_a_server_that_moved(server):
    server.moods = [refuses(301, "", Location="https://example.com/v1/chat/completions")]
    with pytest.raises(ChatmagicError, match="another address: write https://example.com/v1$"):
        connect(server.url, "parrot")("hi")


def test_a_dead_server():
    with pytest.raises(ChatmagicError, match="server at http://127.0.0.1:9/v1 does not answer: start it"):
        connect("http://127.0.0.1:9/v1", "parrot")("hi")


def test_a_host_that_there_is_not(monkeypatch):
    def unknown(*_args, **_keywords):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ChatmagicError, match="there is no host 'gpu', or no network here"):
        connect("http://gpu/v1", "parrot")("hi")


MODELS = {
    "another": (
        ["parrot-7b", "cat"],
        refuses(404, "The model `parrot` does not exist."),
        "no model 'parrot': it has parr",
    ),
    "as LM Studio says it": (["parrot-7b"], refuses(400, "Invalid model identifier 'parrot'"), "it has parrot-7b"),
    "none": ([], refuses(404, "model not found"), "has no model loaded: load 'parrot' there: model not found"),
    "none, in words": (
        ["cat"],
        refuses(400, "No models loaded. Please load one"),
        "has no model loaded: load 'parrot'",
    ),
    "not for a chat": (
        ["parrot"],
        refuses(404, "no chat template"),
        "has 'parrot', but not for a chat: no chat template",
    ),
}


@pytest.mark.parametrize("models, mood, words", MODELS.values(), ids=MODELS)
def test_a_model_that_is_not_there(server, models, mood, words):
    server.models, server.moods = models, [mood]
    with pytest.raises(ChatmagicError, match=words):
        connect(server.url, "parrot")("hi")


@pytest.mark.parametrize("model", ["", " ", None, 7])
def test_a_model_without_a_name(server, model):
    with pytest.raises(ChatmagicError, match="takes the name of a model after the address"):
        connect(server.url, model)


NO_KEYS = [
    ("sk-1\n", "ends with a newline"),
    ("sk-1 ", "ends with a blank"),
    (" sk-1", "begins or ends with a blank"),
    ("sk- 1", "has a blank or newline in it"),
    ("Bearer sk-1", "has a blank or newline in it"),
    ("密钥", "has '密' in it, which no key has"),
    ("sk\u20111", "which no key has"),
    ("“sk-1”", "which no key has"),
]
"""What the environment may hold; a program has more ways."""


@pytest.mark.parametrize(
    "key, words", [*NO_KEYS, ("sk\x001", "which no key has"), (7, "must be text, not of type int")]
)
def test_a_key_that_is_none(server, key, words):
    with pytest.raises(ChatmagicError, match=f"the key from key= .*{words}") as caught:
        connect(server.url, "parrot", key=key)
    assert "sk-1" not in str(caught.value)


@pytest.mark.parametrize("key, words", NO_KEYS)
def test_a_variable_that_holds_none(server, monkeypatch, key, words):
    monkeypatch.setenv("CHATMAGIC_KEY_127_0_0_1", key)
    with pytest.raises(ChatmagicError, match=f"the key from CHATMAGIC_KEY_127_0_0_1 .*{words}") as caught:
        connect(server.url, "parrot")
    assert "sk-1" not in str(caught.value)


def test_keys_that_are_refused_or_missing(server, monkeypatch):
    server.moods = [refuses(401, "Unauthorized")]
    with pytest.raises(ChatmagicError, match="refused the key that came from key=: Unauthorized; pass key="):
        connect(server.url, "parrot", key="sk-1")("hi")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-2")
    with pytest.raises(ChatmagicError, match="wants a key: Unauthorized; OPENAI_API_KEY is sent to its own host alone"):
        connect(server.url, "parrot")("hi")
    monkeypatch.setenv("CHATMAGIC_KEY_127_0_0_1", "sk-3")
    with pytest.raises(ChatmagicError, match="refused the key that came from CHATMAGIC_KEY_127_0_0_1"):
        connect(server.url, "parrot")("hi")
    assert [headers.get("Authorization") for headers in server.headers] == ["Bearer sk-1", None, "Bearer sk-3"]


def test_openais_key_goes_to_its_own_host_alone(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    assert "Authorization" not in sent(server)
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    assert sent(server)["Authorization"] == "Bearer sk-1"
    assert connect("openai", "m").backend._connection._client.headers.get("Authorization") is None
    monkeypatch.delenv("OPENAI_BASE_URL")
    for name in SERVERS:
        authorization = connect(name, "m").backend._connection._client.headers.get("Authorization")
        assert authorization == ("Bearer sk-1" if name == "openai" else None)


@pytest.mark.parametrize("name", SERVERS)
def test_every_name_has_its_address_and_its_key(monkeypatch, name):
    for variable in KEYS:
        if variable != "OPENAI_BASE_URL":
            monkeypatch.setenv(variable, variable)
    by_name, by_address = connect(name, "m").backend._connection, connect(SERVERS[name].url, "m").backend._connection
    assert by_name.url == by_address.url == SERVERS[name].url and by_name.server is by_address.server is SERVERS[name]
    key = f"Bearer {SERVERS[name].key}" if SERVERS[name].key else None
    assert by_name._client.headers.get("Authorization") == by_address._client.headers.get("Authorization") == key
    for other in "https://example.com:8000/v1", "http://gpu/v1", "http://10.0.0.5/v1", "http://localhost:8001/v1":
        assert "Authorization" not in connect(other, "m").backend._connection._client.headers


def test_headers_and_fields_of_ones_own(server):
    assert sent(server, headers={"X-Class": "3b"}, extra_body={"top_k": 5, "temperature": 0.1})["X-Class"] == "3b"
    assert (server.requests[-1]["top_k"], server.requests[-1]["temperature"]) == (5, 0.1)


@pytest.mark.parametrize(
    "setting, words",
    [
        *(({"headers": value}, "cannot be sent") for value in ({"X": "班"}, {"X": None}, ["X"], "X")),
        *(({"headers": value}, "was not asked.*look at headers") for value in ({"X": "a\nb"}, {"a b": "c"})),
        *(({"timeout": value}, "number of seconds above 0") for value in ("long", None, 0, -1, float("nan"), 1e99)),
        *(({"verify": value}, "no certificates") for value in ("nowhere.pem", None, 7)),
        *(({"context": value}, "number of tokens") for value in ("long", 0, -5, 0.5)),
        ({"extra_body": {"x": {1, 2}}}, "look at extra_body"),
        ({"extra_body": ["x"]}, "a dict of fields"),
    ],
    ids=str,
)
def test_a_setting_that_cannot_be(server, setting, words):
    with pytest.raises(ChatmagicError, match=words):
        connect(server.url, "parrot", **setting)("hi")
    assert server.requests == []


def test_settings_are_chatllms_own(server):
    llm = connect(server.url, "parrot", system="s", max_new_tokens=7, name="bird", stream=False)
    llm("hi")
    assert (llm.name, server.requests[-1]["max_tokens"]) == ("bird", 7)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certificate")
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    files = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", folder / "key.pem", "-out", folder / "cert.pem"]
    try:
        subprocess.run([*made, *files], check=True, capture_output=True)
    except OSError:
        pytest.skip("no openssl here")
    return folder


def test_certificates(certificate, server):
    with running() as secret:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
        secret.socket = context.wrap_socket(secret.socket, server_side=True)
        secret.moods = [says()]
        url = secret.url.replace("http:", "https:")
        with pytest.raises(ChatmagicError, match=r"a certificate that is not trusted here .*verify=FILE.*verify=False"):
            connect(url, "parrot")("hi")
        for verify in certificate / "cert.pem", str(certificate / "cert.pem"), False:
            assert connect(url, "parrot", verify=verify, stream=False)("hi") == "你好!"
        with pytest.raises(ChatmagicError, match="hung up without an answer .*https://|does not answer"):
            connect(secret.url, "parrot")("hi")
    with pytest.raises(ChatmagicError, match="does not speak TLS .*write http://"):
        connect(server.url.replace("http:", "https:"), "parrot")("hi")
    with pytest.raises(ChatmagicError, match="holds no certificates"):
        connect("https://127.0.0.1/v1", "parrot", verify=certificate / "key.pem")
    server.moods = [refuses(400, "<html><title>400 The plain HTTP request was sent to HTTPS port</title></html>")]
    with pytest.raises(ChatmagicError, match="wants TLS: write https://127"):
        connect(server.url, "parrot")("hi")


def test_a_host_that_says_nothing():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with pytest.raises(ChatmagicError, match="sent nothing for 0.3 s: .*timeout="):
            connect(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", "parrot", timeout=0.3)("hi")
