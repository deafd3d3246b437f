"""Who can hear an address, and that others than this machine need a key."""

from ipaddress import ip_address
from urllib.parse import urlsplit

from ..backends.presets import check_key
from ..errors import ChatmagicError


def is_here(host: str) -> bool:
    """Whether a host is this machine, by a name or address that no other machine can mean."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def is_asked_here(header: str) -> bool:
    """Whether a Host header names this machine so; one that is none names nothing."""
    try:
        return is_here(urlsplit(f"//{header}").hostname or "")
    except ValueError:
        return False


def check_reach(host: str, key: str | None) -> None:
    """Raise ChatmagicError where others than this machine would hear an address, and there is no key; and for a key
    that no asker can send."""
    if key:
        check_key(key, "CHATMAGIC_KEY")
    if not key and not is_here(host):
        raise ChatmagicError(
            f"{host} is heard beyond this machine, and anybody could ask: set a key, which askers are to send.\n"
            "  export CHATMAGIC_KEY=$(python -c 'import secrets; print(secrets.token_hex(16))')"
        )
