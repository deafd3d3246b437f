"""One server's address: what is sent there, and why nothing came back, each cause in one sentence with what to do."""

import json
import os
import re
import socket
import ssl
from collections.abc import Iterator
from contextlib import suppress
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ..conversation.llm import ContextOverflow
from ..errors import ChatmagicError
from ..text import nearest
from .presets import check_key, find_key, find_server
from .proxies import find_proxy, how_to_pass
from .wire import own_words

if TYPE_CHECKING:
    import httpx2

CONNECTING = 15.0
"""Seconds that a server has to take a connection."""
OVERFLOW = re.compile(
    r"context.{0,20}(length|size|window|overflow)|(length|size|window).{0,20}context|exceed.{0,40}context|n_ctx|"
    r"max_(seq|model)_len|range of input length|(prompt|input)\b.{0,40}\b(too long|longer than)|"
    r"too many (input )?tokens|(prompt|input)s?\b.{0,40}exceed|more than max tokens|reduce the length|"
    r"inputs? tokens \+ max_new_tokens|(输入|上下文|消息|对话|提示|prompt|messages?).{0,20}(超[过出限长]|[过太]长)",
    re.IGNORECASE,
)
NO_MODEL = re.compile(r"\bmodel\b.{0,80}(not exist|not found|invalid|unknown)|(invalid|unknown) model", re.IGNORECASE)
NOT_LOADED = re.compile(r"no models? (is |are )?(currently )?loaded|load a model|loading model", re.IGNORECASE)
WANTS_TLS = re.compile(r"HTTP request (was sent )?to (an )?HTTPS", re.IGNORECASE)
"""What servers say of these; a status alone tells little."""


class Connection:
    """What `connect` was told of a server. Raises ChatmagicError for an address, key, proxy or certificate that cannot
    be."""

    def __init__(
        self,
        url: str,
        key: str | None,
        timeout: float,
        headers: dict[str, str] | None,
        verify: bool | str | Path,
        proxy: str | bool | None,
    ) -> None:
        import httpx2

        self.url, self.server = find_server(url)
        self.host, self.timeout = urlsplit(self.url).hostname or "", timeout
        found, self._key_source = find_key(self.url, self.server) if key is None else (key, "key=")
        self._proxy = find_proxy(self.url, proxy)
        if found:
            check_key(found, self._key_source)
        if not isinstance(timeout, Real) or not 0 < timeout < 1e9:
            raise ChatmagicError(f"timeout must be a number of seconds above 0, not {timeout!r}")
        limit = httpx2.Timeout(float(timeout), connect=min(float(timeout), CONNECTING))
        try:
            transport = httpx2.HTTPTransport(
                verify=_trusted(verify),
                proxy=self._proxy and self._proxy.url,
                limits=httpx2.Limits(max_keepalive_connections=0),  # a reader is slower than servers keep one
            )
        except ImportError:
            way = how_to_pass(self.host)
            raise ChatmagicError(f"{self._proxy} needs a package: %pip install socksio; {way}") from None
        authorization = {"Authorization": f"Bearer {found}"} if found else {}
        try:
            self._client: httpx2.Client = httpx2.Client(
                headers=authorization | (headers or {}), timeout=limit, transport=transport
            )
        except (TypeError, ValueError, AttributeError) as error:
            raise ChatmagicError(f"these headers cannot be sent: {error}") from None

    def post(self, body: dict[str, Any]) -> "httpx2.Response":
        """The response to a question, its body unread. Raises ChatmagicError where there is none."""
        import httpx2

        try:
            content = json.dumps(body, default=lambda value: value.item())  # of NumPy's numbers
        except (TypeError, ValueError, AttributeError) as error:
            raise ChatmagicError(f"the question cannot be sent as JSON: {error}; look at extra_body") from None
        headers = {"Content-Type": "application/json"}
        request = self._client.build_request("POST", f"{self.url}/chat/completions", content=content, headers=headers)
        try:
            return self._client.send(request, stream=True)
        except httpx2.HTTPError as error:
            raise self.failure(self._lost(error)) from None

    def models(self) -> list[str]:
        """The names of the models there. Raises ChatmagicError where there is no list, or nothing on it."""
        import httpx2

        if names := self._models(self.url):
            return names
        try:
            response = self._client.get(f"{self.url}/models", timeout=10)
        except httpx2.HTTPError as error:
            raise self.failure(self._lost(error)) from None
        status = 404 if response.is_success else response.status_code
        raise self.refusal(status, self.words(body_of(response)), "a model")

    def failure(self, reason: str, kind: type[ChatmagicError] = ChatmagicError) -> ChatmagicError:
        """The error that says so of this server."""
        return kind(f"the server at {self.url} {reason}")

    def words(self, body: Any) -> str:
        """What an error says, without the key that some servers repeat."""
        key = self._client.headers.get("Authorization", "").removeprefix("Bearer ")
        said = own_words(body)
        if key:  # a short one, "token", is none within a word: max_tokens
            said = re.sub(re.escape(key) if len(key) > 8 else rf"(?a:\b){re.escape(key)}(?a:\b)", "…", said)
        return said[:400].rstrip(". ")

    def _lost(self, error: "httpx2.HTTPError") -> str:
        """Why there is no response."""
        import httpx2

        causes = list(_causes(error))
        if certificate := next((cause for cause in causes if isinstance(cause, ssl.SSLCertVerificationError)), None):
            return (
                f"shows a certificate that is not trusted here ({certificate.verify_message or certificate}): pass "
                "connect(..., verify=FILE) the certificate to trust, or verify=False where you know the network"
            )
        if isinstance(error, httpx2.LocalProtocolError):
            return f"was not asked, since no request can be such ({error}): look at headers"
        if isinstance(error, httpx2.ReadTimeout):
            return self.too_slow()
        if self._proxy:
            return f"cannot be reached through {self._proxy} ({error}); {how_to_pass(self.host)}"
        if any(isinstance(cause, ssl.SSLError) for cause in causes):
            return f"does not speak TLS ({error}): write http:// in its address, if it is not in the open net"
        if isinstance(error, httpx2.TimeoutException):
            return f"takes no connection in {CONNECTING:g} s: check the address, and whether a firewall stands between"
        if any(isinstance(cause, socket.gaierror) for cause in causes):
            return f"cannot be found: there is no host {self.host!r}, or no network here"
        if isinstance(error, httpx2.ConnectError):
            return "does not answer: start it, or check the address that connect was given"
        return f"hung up without an answer ({error}); ask again, or write https:// if it wants that"

    def too_slow(self) -> str:
        """What to do where nothing came for so long."""
        return f"sent nothing for {self.timeout:g} s: ask again, or allow more with connect(..., timeout=)"

    def refusal(self, status: int, said: str, name: str, location: str = "") -> ChatmagicError:
        """The error for a response that is none to the question, by its status and the server's own words;
        `name`: the model's."""
        own, kind = said and f": {said}", ChatmagicError
        if status == 407 or self._proxy and status in (502, 504):
            reason = f"was not reached through {self._proxy}, which says {status}{own}; {how_to_pass(self.host)}"
        elif 300 <= status < 400:
            reason = f"sends on to another address: write {location.removesuffix('/chat/completions')}"
        elif status in (401, 403):
            reason = self._locked(own)
        elif WANTS_TLS.search(said):
            reason = f"wants TLS: write https{self.url.removeprefix('http')}"
        elif NOT_LOADED.search(said):
            reason = f"has no model loaded: load {name!r} there{own}"
        elif status == 413 or OVERFLOW.search(said):
            kind, reason = ContextOverflow, f"refuses messages that are too long{own}. Send less, or %chat_reset"
        elif status in (404, 405) or NO_MODEL.search(said):
            reason = self.not_found(name, own)
        else:
            reason = f"failed ({status}){own}"
        return self.failure(reason, kind)

    def _locked(self, own: str) -> str:
        """What to do where a key is wanted, or another."""
        variable = self._key_source if self._key_source != "key=" else None
        how = f"pass key=... to connect{f', or set {variable}' if variable else ''}"
        if "Authorization" in self._client.headers:
            return f"refused the key that came from {self._key_source}{own}; {how}"
        elsewhere = "OPENAI_API_KEY is sent to its own host alone; " * bool(os.environ.get("OPENAI_API_KEY"))
        return f"wants a key{own}; {elsewhere}{how}"

    def not_found(self, name: str, own: str = "") -> str:
        """What is missing there: the model of that name, any model, or the address itself."""
        names = self._models(self.url)
        if names and name in names:
            return f"has {name!r}, but not for a chat{own}"
        if names:
            return f"has no model {name!r}: it has {', '.join(nearest(name, names, cutoff=0))}"
        if names is not None:
            return f"has no model loaded: load {name!r} there{own}"
        root = "/".join(self.url.split("/")[:3])
        path = self.url.removeprefix(root)
        parents = [root + path[:at] for at in range(len(path)) if path[at] == "/"]
        for other in dict.fromkeys([f"{self.url}/v1", *reversed(parents), f"{root}/v1"]):
            if other != self.url and self._models(other) is not None:
                return f"has nothing at that address: write {other}"
        return f"has no chat at that address, which may lack its /v1{own}"

    def _models(self, url: str) -> list[str] | None:
        """The names of the models at that address, None where there is no such list."""
        import httpx2

        try:
            listed = self._client.get(f"{url}/models", timeout=10).json()
            return [model["id"] for model in (listed["data"] or ())]
        except (httpx2.HTTPError, ValueError, LookupError, TypeError):
            return None


def body_of(response: "httpx2.Response") -> Any:
    """The body of a response that is no stream, parsed if it is JSON, as far as it came."""
    import httpx2

    with suppress(httpx2.HTTPError):
        response.read()
        with suppress(ValueError):
            return response.json()
        return response.text
    return ""


def _trusted(verify: bool | str | Path) -> bool | ssl.SSLContext:
    """What httpx2 takes for it."""
    if isinstance(verify, bool):
        return verify
    context = ssl.create_default_context()
    try:
        path = Path(verify).expanduser()
        if path.is_dir():
            context.load_verify_locations(capath=path)
        else:
            context.load_verify_locations(cafile=path)
    except (OSError, ValueError, TypeError) as error:
        raise ChatmagicError(f"verify={str(verify)!r} holds no certificates in PEM form: {error}") from None
    return context


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error:
        yield error
        error = error.__cause__ or error.__context__
