"""Which address a request comes from, also behind proxies that are trusted."""

import ipaddress
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from aiohttp import web

from limiter.errors import SettingsError

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
_NO_ADDRESS = IPv4Address(0)  # of a peer on a unix socket


def trusted_networks(texts: Sequence[str]) -> tuple[Network, ...]:
    """Read the setting `relay.trusted_proxies`: addresses and CIDR ranges. Raises SettingsError."""
    try:
        return tuple(ipaddress.ip_network(text.strip()) for text in texts)
    except ValueError as error:
        raise SettingsError(f"relay.trusted_proxies: {error}; give addresses or ranges like 10.0.0.0/8") from None


def client_address(request: web.Request, trusted_proxies: Sequence[Network]) -> Address:
    """Return the address of the client.

    It is the peer's, unless that is a trusted proxy: then the last one of `X-Forwarded-For` that is none. What stands
    before that one was written by the client, or by nobody we know.
    """
    address = _address(request.remote or "") or _NO_ADDRESS
    hops = [hop for line in request.headers.getall("X-Forwarded-For", []) for hop in line.split(",")]
    while hops and any(address in network for network in trusted_proxies):
        before = _address(hops.pop())
        if before is None:  # "unknown", or damaged: the proxy that wrote it is the furthest that is known
            break
        address = before
    return address


def _address(text: str) -> Address | None:
    """Read an address as proxies write it: bare, in brackets, with a port; None for anything else."""
    text = text.strip().strip('"')
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
