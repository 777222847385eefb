"""The address that a request comes from, also behind trusted proxies."""

import ipaddress
from collections.abc import Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from aiohttp import web

from limiter.errors import SettingsError

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
_NO_ADDRESS = IPv4Address(0)  # for a peer on a unix socket
_SITE_BITS = 56  # the usual prefix of one customer of an IPv6 provider


def parse_networks(setting: str, texts: Sequence[str]) -> tuple[Network, ...]:
    """Parse a setting with addresses and CIDR ranges, which is named for the error. Raises SettingsError."""
    try:
        return tuple(ipaddress.ip_network(text.strip()) for text in texts)
    except ValueError as error:
        raise SettingsError(f"{setting}: {error}; use addresses or ranges like 10.0.0.0/8") from None


def is_within(address: Address, networks: Sequence[Network]) -> bool:
    """Return whether one of the networks has the address."""
    return any(address in network for network in networks)


def network_of(address: Address) -> str:
    """Return the unit by which clients are limited: an IPv4 address, or an IPv6 /56."""
    if isinstance(address, IPv4Address):
        return str(address)
    return str(IPv6Network((int(address), _SITE_BITS), strict=False))  # as a number, it has no scope id


def client_address(request: web.Request, trusted_proxies: Sequence[Network]) -> Address:
    """Return the address of the client.

    It is the peer's, unless the peer is a trusted proxy: then it is the last address of `X-Forwarded-For` that is not a
    trusted proxy. Addresses before that one were written by the client or by unknown proxies.
    """
    address = parse_address(request.remote or "") or _NO_ADDRESS
    if not trusted_proxies:
        return address
    hops = [hop for line in request.headers.getall("X-Forwarded-For", []) for hop in line.split(",")]
    while hops and is_within(address, trusted_proxies):
        before = parse_address(hops.pop())
        if before is None:  # "unknown", or malformed: the proxy that wrote it is the last known address
            break
        address = before
    return address


class ClientAddresses:
    """The addresses of clients, and the units by which they are limited.

    trusted_proxies: whose `X-Forwarded-For` is believed. exempt: networks in which addresses are not limited.
    """

    def __init__(self, trusted_proxies: Sequence[Network] = (), exempt: Sequence[Network] = ()) -> None:
        self.trusted_proxies, self._exempt = trusted_proxies, exempt
        self._limited_unit = lru_cache(maxsize=4096)(self._unit)

    def of(self, request: web.Request) -> Address:
        """Return the address of a request's client."""
        return client_address(request, self.trusted_proxies)

    def limited(self, request: web.Request) -> str | None:
        """Return the unit that a request's client belongs to; None if it is exempt."""
        return self._limited_unit(self.of(request))

    def _unit(self, address: Address) -> str | None:
        return None if is_within(address, self._exempt) else network_of(address)


@lru_cache(maxsize=4096)
def parse_address(text: str) -> Address | None:
    """Parse an address as proxies write it: bare, in brackets, or with a port; return None for anything else."""
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
