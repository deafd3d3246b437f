"""Who can hear an address, and that others than this machine need a key."""

from ipaddress import ip_address

from ..errors import ChatmagicError


def is_here(host: str) -> bool:
    """Whether a host is this machine, by a name or address that no other machine can mean."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def check_reach(host: str, key: str | None) -> None:
    """Raise ChatmagicError where others than this machine would hear an address, and there is no key."""
    if not key and not is_here(host):
        raise ChatmagicError(
            f"{host} is heard beyond this machine, and anybody could ask: set a key, which askers are to send.\n"
            "  export CHATMAGIC_KEY=$(python -c 'import secrets; print(secrets.token_hex(16))')"
        )
