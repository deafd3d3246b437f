"""Which proxy a server is asked through, and by whose word."""

import os
import re
from ipaddress import ip_address
from typing import NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from ..errors import ChatmagicError


class Proxy(NamedTuple):
    """A proxy, and what names it."""

    url: str
    source: str

    def __str__(self) -> str:
        parts = urlsplit(self.url)  # never with the password that may stand in it
        return f"the proxy {parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''} of {self.source}"


def is_near(host: str) -> bool:
    """Whether a host is this machine or in its own network, as far as its name or address tells."""
    try:
        address = ip_address(host)
    except ValueError:
        return "." not in host or host.lower().endswith((".localhost", ".local", ".lan", ".internal", ".home.arpa"))
    return address.is_private or address.is_loopback or address.is_link_local


def find_proxy(url: str, told: str | bool | None = None) -> Proxy | None:
    """The proxy to ask that address through, None for none.

    `told`: the proxy's own address; False: none; None: as the environment says (`https_proxy`, `all_proxy` and so on,
    but for what `no_proxy` names), except for this machine and its own network, which no proxy reaches. Raises
    ChatmagicError for a proxy of a kind that is not known.
    """
    scheme, host = urlsplit(url).scheme, urlsplit(url).hostname or ""
    if told:
        proxy = Proxy(str(told), "proxy=")
    elif told is False or is_near(host) or proxy_bypass(host):
        return None
    else:
        known = getproxies()
        name = next((name for name in (scheme, "all") if known.get(name)), None)
        if name is None:
            return None
        variables = [f"{name}_proxy", f"{name}_proxy".upper()]
        source = next((variable for variable in variables if os.environ.get(variable)), "this system's settings")
        proxy = Proxy(known[name], source)
    if "://" not in proxy.url:
        proxy = proxy._replace(url=f"http://{proxy.url}")
    proxy = proxy._replace(url=re.sub("^socks://", "socks5://", proxy.url))  # as GNOME writes it
    if not re.match(r"(https?|socks5h?)://([^/@]*@)?[^/@\s]+/?$", proxy.url):
        raise ChatmagicError(
            f"{proxy.source} names a proxy whose address is not like http://HOST:PORT or socks5://HOST:PORT; "
            f"{how_to_pass(host)}"
        )
    return proxy


def how_to_pass(host: str) -> str:
    """How to ask that host without a proxy."""
    return f"to go without it, pass proxy=False to connect, or put {host} into no_proxy"
