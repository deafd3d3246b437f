"""The servers that people run: where each listens, whose key it takes, and how it is told to think."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ..errors import ChatmagicError
from ..text import did_you_mean
from .proxies import is_near


def _to_template(thinking: bool) -> dict[str, Any]:
    # Templates know the one or the other.
    return {"chat_template_kwargs": {"enable_thinking": thinking, "thinking": thinking}}


def _at_top(thinking: bool) -> dict[str, Any]:
    return {"enable_thinking": thinking}


def _by_effort(thinking: bool) -> dict[str, Any]:
    return {"reasoning_effort": "medium" if thinking else "none"}


@dataclass(frozen=True)
class Server:
    """A kind of server.

    url       where it listens, if nobody says otherwise
    key       the environment variable that holds its key, if there is such a custom
    told      what is added to a request to have the model think, or not
    budgets   the fields that say how many tokens it may think, as its documentation or its users name them
    """

    url: str
    key: str | None = None
    told: Callable[[bool], dict[str, Any]] = _to_template
    budgets: tuple[str, ...] = ()


SERVERS = {
    "chatmagic": Server("http://localhost:8484/v1", "CHATMAGIC_KEY", budgets=("thinking_budget",)),
    "vllm": Server("http://localhost:8000/v1", "VLLM_API_KEY", budgets=("thinking_token_budget",)),
    "ollama": Server("http://localhost:11434/v1", told=_by_effort),
    "llama.cpp": Server("http://localhost:8080/v1", "LLAMA_API_KEY", budgets=("thinking_budget_tokens",)),
    "lmstudio": Server("http://localhost:1234/v1", "LM_API_TOKEN"),
    "deepseek": Server(
        "https://api.deepseek.com/v1",
        "DEEPSEEK_API_KEY",
        lambda thinking: {"thinking": {"type": "enabled" if thinking else "disabled"}},
    ),
    "dashscope": Server(
        "https://dashscope.aliyuncs.com/compatible-mode/v1", "DASHSCOPE_API_KEY", _at_top, ("thinking_budget",)
    ),
    "siliconflow": Server("https://api.siliconflow.cn/v1", "SILICONFLOW_API_KEY", _at_top, ("thinking_budget",)),
    "openai": Server("https://api.openai.com/v1", "OPENAI_API_KEY", _by_effort),
}
TYPED = str.maketrans("：／．，。　", ":/.,. ")
OTHER = Server("", budgets=("thinking_token_budget", "thinking_budget", "thinking_budget_tokens"))


def find_server(url: str) -> tuple[str, Server]:
    """The address to ask, and the kind of server there, for an address or a name of SERVERS.

    Raises ChatmagicError for what is neither, with what to write instead.
    """
    if not isinstance(url, str) or not url.strip():
        raise ChatmagicError(f"connect takes an address, or one of {', '.join(SERVERS)}; not {url!r}")
    if server := SERVERS.get(url.lower()):
        return server.url, server
    if (plain := url.translate(TYPED)) != url:
        raise ChatmagicError(f"the address {url!r} has Chinese punctuation in it: write {plain}")
    scheme, separator, rest = url.lstrip("/").partition("://")
    if not separator:
        if not re.search(r"[./:]|^localhost$", url):
            raise ChatmagicError(
                f"no server is called {url!r}{did_you_mean(url, SERVERS)}; connect takes an address, or one of "
                + ", ".join(SERVERS)
            )
        near = "http" if is_near(re.split("[:/]", scheme)[0]) else "https"
        raise ChatmagicError(f"the address {url!r} lacks its scheme: write {near}://{scheme}")
    if scheme not in ("http", "https"):
        raise ChatmagicError(f"the address {url!r} begins with {scheme}://: write http:// or https://")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ChatmagicError(f"the address {url!r} is none: {error}") from None
    if not host or parts.query or parts.fragment or re.search(r"\s", url):
        raise ChatmagicError(f"the address {url!r} is none: write it as http://localhost:8000/v1")
    if parts.username or parts.password:
        raise ChatmagicError(f"the address at {host} holds a name or password: pass them in headers=, or as key=")
    if longer := re.search(r"/(chat(/completions)?|completions|models|embeddings|responses)/?$", parts.path):
        shorter = url[: url.rindex(longer[0])]
        raise ChatmagicError(f"the address goes too far: {longer[0]} is added to it here. Write {shorter}")
    for server in SERVERS.values():
        known = urlsplit(server.url)
        if port and port == known.port if is_near(host) else host == known.hostname:
            return url.rstrip("/"), server
    return url.rstrip("/"), OTHER


def find_key(url: str, server: Server) -> tuple[str | None, str]:
    """The key that the environment has for that host, and the variable that holds it, or should.

    CHATMAGIC_KEY_ and the host's name, then the custom of that kind of server. OPENAI_API_KEY is for the host of
    OPENAI_BASE_URL, where that is set, else for OpenAI's: it is sent to no other.
    """
    host = urlsplit(url).hostname or ""
    own = "CHATMAGIC_KEY_" + re.sub(r"\W", "_", host, flags=re.ASCII).upper()
    home = urlsplit(os.environ.get("OPENAI_BASE_URL") or SERVERS["openai"].url).hostname
    custom = "OPENAI_API_KEY" if host == home else server.key if server.key != "OPENAI_API_KEY" else None
    for variable in (own, custom):
        if variable and os.environ.get(variable):
            return os.environ[variable], variable
    return None, custom or own


def check_key(key: str, source: str) -> None:
    """Raise ChatmagicError for a key that no request can carry, or that was pasted with more than the key."""
    if not isinstance(key, str):
        raise ChatmagicError(f"the key from {source} must be text, not of type {type(key).__name__}")
    if key != key.strip():
        which = "a newline" if "\n" in key or "\r" in key else "a blank"
        raise ChatmagicError(f"the key from {source} begins or ends with {which}: leave that out, as by key.strip()")
    if any(char.isspace() for char in key):
        raise ChatmagicError(
            f"the key from {source} has a blank or newline in it: it was pasted with more than the key"
        )
    if not key.isascii() or not key.isprintable():
        strange = next(char for char in key if not char.isascii() or not char.isprintable())
        raise ChatmagicError(f"the key from {source} has {strange!r} in it, which no key has: paste the key itself")
