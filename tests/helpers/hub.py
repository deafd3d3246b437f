"""A server that speaks what the clients of ModelScope and Hugging Face use of their hubs' protocols, behind a proxy
that cuts, delays, corrupts, throttles and refuses.

The clients reach both through the proxy, by names that no name server knows: what goes past the proxy fails.

    ModelScope      GET /api/v1/models/ID/repo/files?Revision=, GET /api/v1/models/ID/repo?Revision=&FilePath=
    Hugging Face    GET /api/models/ID/revision/REVISION?blobs=true, GET /ID/resolve/COMMIT/FILE
"""

import hashlib
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

MODELSCOPE, HUGGINGFACE = "http://modelscope.test", "http://huggingface.test"
Answer = tuple[int, dict[str, str], bytes]
MISCHIEF = ("cut", "delay", "stall", "corrupt", "throttle", "500", "429", "503 for all")


class Repository(NamedTuple):
    """revision -> {file: content}, on each hub."""

    modelscope: dict[str, dict[str, bytes]]
    huggingface: dict[str, dict[str, bytes]]


def commit(files: dict[str, bytes]) -> str:
    """What stands for a commit's hash. Asked at each request, within the second that a client waits."""
    digest = hashlib.sha1()
    for name, content in sorted(files.items()):
        digest.update(b"%s\0%d\0" % (name.encode(), len(content)))
        digest.update(content)
    return digest.hexdigest()


class Hubs:
    """Both hubs, with the requests that came to them: (host, path and query, whether for a part)."""

    def __init__(self, repositories: dict[str, Repository]) -> None:
        self.repositories, self.asked = repositories, []

    def answer(self, url: str, headers: dict[str, str]) -> Answer:
        parts = urlsplit(url)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        self.asked.append((parts.hostname, unquote(parts.path) + "?" + parts.query, headers.get("range", "")))
        hub = self.modelscope if parts.hostname == "modelscope.test" else self.huggingface
        return hub(unquote(parts.path), query, headers)

    def modelscope(self, path: str, query: dict[str, str], headers: dict[str, str]) -> Answer:
        words = path.strip("/").split("/")
        id = "/".join(words[3:5])
        files = self.repositories[id].modelscope.get(query.get("Revision", "")) if id in self.repositories else None
        if words[:3] != ["api", "v1", "models"]:
            return (200, {}, b"") if path == "/" else (404, {}, b"{}")
        if files is None:
            return 404, {}, json.dumps({"Code": 10010205001, "Message": "no such model or revision"}).encode()
        if words[5:] == ["repo", "files"]:
            listed = [
                {"Path": name, "Size": len(content), "Type": "blob", "Sha256": hashlib.sha256(content).hexdigest()}
                for name, content in files.items()
            ]
            return 200, {}, json.dumps({"Code": 200, "Data": {"Files": listed}}).encode()
        if words[5:] == ["repo"]:
            return self.content(files[query["FilePath"]], headers)
        return 200, {}, json.dumps({"Code": 200, "Data": {"Name": id}}).encode()

    def huggingface(self, path: str, query: dict[str, str], headers: dict[str, str]) -> Answer:
        words = path.strip("/").split("/")
        if path == "/":
            return 200, {}, b""
        if words[:2] == ["api", "models"]:
            id, revision = "/".join(words[2:4]), words[5] if len(words) > 5 else "main"
            files = self.revision(id, revision)
            if files is None:
                code = "RevisionNotFound" if id in self.repositories else "RepoNotFound"
                return 404, {"X-Error-Code": code}, b"{}"
            listed = [
                {"rfilename": name, "size": len(content)} | self.digest(name, content)
                for name, content in files.items()
            ]
            about = {"id": id, "sha": commit(files), "siblings": listed, "private": False, "tags": [], "downloads": 0}
            return 200, {}, json.dumps(about | {"likes": 0}).encode()
        files = self.revision("/".join(words[:2]), words[3]) if words[2:3] == ["resolve"] else None
        return self.content(files[words[4]], headers) if files and words[4] in files else (404, {}, b"")

    def revision(self, id: str, revision: str) -> dict[str, bytes] | None:
        known = self.repositories[id].huggingface if id in self.repositories else {}
        return known.get(revision) or next((each for each in known.values() if commit(each) == revision), None)

    @staticmethod
    def digest(name: str, content: bytes) -> dict:
        """Of large files their SHA-256, of small ones git's."""
        if name.endswith((".safetensors", ".bin")):
            return {
                "blobId": "0" * 40,
                "lfs": {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 9},
            }
        return {"blobId": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}

    @staticmethod
    def content(content: bytes, headers: dict[str, str]) -> Answer:
        if not (asked := headers.get("range")):
            return 200, {"Accept-Ranges": "bytes"}, content
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last or len(content) - 1), len(content) - 1)
        if start >= len(content):
            return 416, {"Content-Range": f"bytes */{len(content)}"}, b""
        return 206, {"Content-Range": f"bytes {start}-{end}/{len(content)}"}, content[start : end + 1]


@contextmanager
def proxied(hubs: Hubs, mischief: Callable[[str], str] = lambda url: "") -> Iterator[str]:
    """The proxy's address; `mischief` says what befalls a request, one of MISCHIEF or ""."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            what = mischief(self.path)
            status, more, body = hubs.answer(self.path, headers)
            if what == "500":
                status, more, body = 500, {}, b"broken"
            elif what.startswith("503"):
                status, more, body = 503, {}, b"closed"
            elif what == "429":
                status, more, body = 429, {"Retry-After": "1"}, b"slowly"
            if what == "delay":
                time.sleep(0.5)
            if what == "corrupt" and len(body) > 999:
                body = body[:500] + bytes([body[500] ^ 1]) + body[501:]
            self.send_response(status)
            for name, value in (more | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            half = len(body) // 2
            if what in ("cut", "stall"):
                self.wfile.write(body[:half])
                self.wfile.flush()
                if what == "stall":
                    time.sleep(3)
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
            elif what == "throttle":
                for start in range(0, len(body), size := len(body) // 10 + 1):
                    self.wfile.write(body[start : start + size])
                    time.sleep(0.05)
            else:
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

        def handle(self) -> None:
            try:
                super().handle()
            except OSError:  # a client that was killed
                pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def seeded(random: random.Random, rate: float) -> Callable[[str], str]:
    """What befalls each request, by chance; now and then a hub is closed for good."""
    closed = {host for host in ("modelscope.test", "huggingface.test") if random.random() < rate / 4}

    def befalls(url: str) -> str:
        host = urlsplit(url).hostname
        if host in closed:
            return MISCHIEF[-1]
        return random.choice(MISCHIEF[:-1]) if random.random() < rate else ""

    return befalls


def environment(proxy: str, home: str) -> dict[str, str]:
    """Of a process whose clients reach the hubs through the proxy alone, and are as patient as a test."""
    return {
        "http_proxy": proxy,
        "https_proxy": proxy,
        "no_proxy": "",
        "MODELSCOPE_ENDPOINT": MODELSCOPE,
        "HF_ENDPOINT": HUGGINGFACE,
        "HF_HUB_DOWNLOAD_TIMEOUT": "1",
        "HF_HUB_ETAG_TIMEOUT": "1",
        "MODELSCOPE_DOWNLOAD_TIMEOUT": "1",
        "MODELSCOPE_DOWNLOAD_MAX_RETRIES": "2",
        "MODELSCOPE_API_MAX_RETRIES": "1",
        "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "2",
        "CHATMAGIC_HOME": home,
        "HOME": home,
        "XDG_CACHE_HOME": f"{home}/.cache",
        "OMP_NUM_THREADS": "1",
    }
