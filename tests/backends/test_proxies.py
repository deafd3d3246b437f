"""A server near is asked past every proxy; one far away through the one that is named, by whatever named it."""

import socketserver
from threading import Thread

import pytest

from chatmagic import ChatmagicError, connect
from chatmagic.backends.proxies import find_proxy, is_near
from fake_server import refuses, running, says

FAR = "http://llm.example.com/v1"


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in ("http", "https", "all", "no"):
        for variable in (f"{name}_proxy", f"{name}_PROXY".upper()):
            monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def proxy(monkeypatch):
    """A fake server is a proxy too, once it takes whole addresses as paths."""
    with running() as server:
        server.prefix = FAR
        server.address = f"http://127.0.0.1:{server.server_port}"
        yield server


@pytest.mark.parametrize(
    "host, near",
    [
        *(
            (host, True)
            for host in ("localhost", "127.0.0.1", "::1", "10.0.0.5", "192.168.1.7", "172.20.0.1", "fd00::1")
        ),
        *((host, True) for host in ("gpu", "gpu.local", "host.docker.internal", "box.lan", "169.254.1.1")),
        *(
            (host, False)
            for host in ("api.deepseek.com", "8.8.8.8", "172.15.0.1", "localhost.example.com", "2001:4860::1")
        ),
    ],
)
def test_what_is_near(host, near):
    assert is_near(host) is near


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "socks5://127.0.0.1:9", "127.0.0.1:9", "nonsense://x"])
def test_no_proxy_stands_between_a_reader_and_a_server_near(monkeypatch, variable, proxy):
    monkeypatch.setenv(variable, proxy)
    with running() as server:
        assert connect(server.url, "parrot", stream=False)("hi") == "你好!"
        assert connect(server.url.replace("127.0.0.1", "localhost"), "parrot", stream=False)("hi") == "你好!"


@pytest.mark.parametrize("variable", ["http_proxy", "all_proxy", "ALL_PROXY"])
def test_a_server_far_away_is_asked_through_the_proxy(monkeypatch, proxy, variable):
    monkeypatch.setenv(variable, proxy.address)
    assert connect(FAR, "parrot", stream=False)("hi") == "你好!" and len(proxy.requests) == 1


def test_a_proxy_that_is_told(proxy, monkeypatch):
    """By `proxy=`, even for what is near, and against what the environment says."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert connect(FAR, "parrot", proxy=proxy.address, stream=False)("hi") == "你好!"
    proxy.prefix = "http://10.0.0.5:8000/v1"
    assert connect(proxy.prefix, "parrot", proxy=proxy.address, stream=False)("hi") == "你好!"
    assert find_proxy(FAR, False) is None


def test_no_proxy(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "other.com,.example.com")
    assert find_proxy(FAR) is None and find_proxy("http://example.org/v1") is not None
    monkeypatch.setenv("no_proxy", "*")
    assert find_proxy("http://example.org/v1") is None


def test_that_of_the_scheme_comes_first(monkeypatch):
    """Clash's snippet sets all three: what is asked over HTTP needs no SOCKS."""
    monkeypatch.setenv("all_proxy", "socks5://127.0.0.1:7890")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:7890")
    assert find_proxy("https://api.deepseek.com/v1") == ("http://127.0.0.1:7890", "https_proxy")
    assert find_proxy(FAR) == ("socks5://127.0.0.1:7890", "all_proxy")


class Socks(socketserver.StreamRequestHandler):
    """SOCKS 5 without a password (RFC 1928); whatever is asked for, the fake server answers."""

    def handle(self):
        self.request.recv(2 + self.request.recv(2)[1])
        self.request.sendall(b"\5\0")
        head = self.request.recv(5)
        self.server.wanted = self.request.recv(head[4]).decode()
        self.request.recv(2)
        self.request.sendall(b"\5\0\0\1" + bytes(6))
        self.server.fake.finish_request(self.request, self.client_address)


@pytest.mark.parametrize("scheme", ["socks5", "socks5h", "socks"])
def test_socks(monkeypatch, scheme):
    with running() as fake, socketserver.ThreadingTCPServer(("127.0.0.1", 0), Socks) as socks:
        socks.fake, socks.daemon_threads = fake, True
        Thread(target=socks.serve_forever, args=[0.01], daemon=True).start()
        monkeypatch.setenv("all_proxy", f"{scheme}://127.0.0.1:{socks.server_address[1]}")
        assert connect(FAR, "parrot", stream=False)("hi") == "你好!" and socks.wanted == "llm.example.com"
        socks.shutdown()


def test_socks_without_its_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "socksio", None)
    monkeypatch.setenv("all_proxy", "socks5://127.0.0.1:7890")
    words = r"the proxy socks5://127.0.0.1:7890 of all_proxy needs a package: %pip install socksio; .*no_proxy"
    with pytest.raises(ChatmagicError, match=words):
        connect(FAR, "parrot")


@pytest.mark.parametrize("wrong", ["socks4://127.0.0.1:1", "http://", "://", "http://a b:1", "quic://x:1"])
def test_a_proxy_that_is_none(monkeypatch, wrong):
    monkeypatch.setenv("all_proxy", wrong)
    with pytest.raises(
        ChatmagicError, match="all_proxy names a proxy whose address is not like .*proxy=False.*no_proxy"
    ):
        connect(FAR, "parrot")


def test_a_proxy_that_fails_is_named_with_its_variable_and_never_its_password(monkeypatch, proxy):
    monkeypatch.setenv("HTTP_PROXY", "http://me:secret@127.0.0.1:9")
    with pytest.raises(ChatmagicError, match="through the proxy http://127.0.0.1:9 of HTTP_PROXY .*no_proxy") as caught:
        connect(FAR, "parrot")("hi")
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("HTTP_PROXY", proxy.address)
    for status in 407, 502, 504:
        proxy.moods = [refuses(status, "<html><title>Bad Gateway</title></html>")]
        with pytest.raises(ChatmagicError, match=rf"of HTTP_PROXY, which says {status}: Bad Gateway; .*no_proxy"):
            connect(FAR, "parrot")("hi")
    proxy.moods = [says()]
    assert connect(FAR, "parrot", stream=False)("hi") == "你好!"
