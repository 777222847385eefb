"""The rate limit for new installs, counted in Redis for all nodes: by network, and for all clients together."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Network

from limiter.credits.session import Session
from limiter.relay.http.client_address import Address, network_of
from limiter.relay.http.problems import Problem, ProblemRaised

PERIOD_MS = 3_600_000
_SHARE = 10  # once half of the overall limit is used, a network gets this part of what is free
_SITE_BITS = 56  # the usual prefix of one customer of an IPv6 provider


class MintStatus(StrEnum):
    """The status that install_mint.lua returns."""

    MINTED = "MINTED"
    LIMITED = "LIMITED"


@dataclass(frozen=True, slots=True)
class Mint:
    """The reply of install_mint.lua.

    Attributes:
        status: whether the install was counted.
        wait_ms: until the next new install is allowed; 0 unless LIMITED.
        place: which limit refused it, from 1; 0 unless LIMITED.
    """

    status: MintStatus
    wait_ms: int
    place: int


class InstallRateLimit:
    """Limits the rate of new installs: each limit is a number an hour, 0 for no limit.

    Args:
        session: for the counters in Redis.
        per_ip: for one IPv4 address or IPv6 /56.
        per_ipv4_24: for one IPv4 /24.
        per_ipv6_48: for one IPv6 /48.
        per_ipv6_32: for one IPv6 /32.
        overall: for all clients together.
        limit_loopback: whether loopback addresses are limited like others, and not only overall. By default they are
            not: such a client is somebody trying the relay out, or a proxy missing in trusted_proxies, behind which all
            clients look alike.
    """

    def __init__(
        self,
        session: Session,
        *,
        per_ip: int = 20,
        per_ipv4_24: int = 200,
        per_ipv6_48: int = 100,
        per_ipv6_32: int = 1000,
        overall: int = 10_000,
        limit_loopback: bool = False,
    ) -> None:
        self._session = session
        self._scripts = session.scripts()
        self._per_ip, self._overall = per_ip, overall
        self._per_ipv4, self._per_ipv6 = {24: per_ipv4_24}, {48: per_ipv6_48, 32: per_ipv6_32}
        self._limit_loopback = limit_loopback

    async def count(self, address: Address) -> None:
        """Count a new install from an address. Raises ProblemRaised (429), LimiterUnavailable."""
        limits = self._limits(address)
        if not limits:
            return
        mint = await self.mint(limits)
        if mint.status is MintStatus.LIMITED:
            is_overall = [*limits][mint.place - 1] is None
            raise _limited("all clients together" if is_overall else "your network", mint.wait_ms)

    async def mint(self, limits: Mapping[str | None, int], *, period_ms: int = PERIOD_MS) -> Mint:
        """Run install_mint.lua to count a new install. Not retried if it may have counted.

        limits: by network, from the narrowest on; None, the last one, is of all clients together.
        """
        keys = [self._session.keys.mint(network) for network in limits]
        share = _SHARE if None in limits and len(limits) > 1 else 0
        numbers = ",".join(map(str, limits.values()))
        status, wait_ms, place = await self._session.retry(
            lambda: self._scripts.call("install_mint", keys, numbers, period_ms, share, self._session.now_ms()),
            when_unknown=False,
        )
        return Mint(MintStatus(status.decode()), wait_ms, place)

    def _limits(self, address: Address) -> dict[str | None, int]:
        """Return the limits for an address, by network from the narrowest on."""
        limits: dict[str | None, int] = {}
        if self._limit_loopback or not address.is_loopback:
            limits[network_of(address)] = self._per_ip
            is_ipv4 = isinstance(address, IPv4Address)
            kind, wider = (IPv4Network, self._per_ipv4) if is_ipv4 else (IPv6Network, self._per_ipv6)
            for bits, limit in wider.items():  # as a number, an IPv6 address has no scope id
                limits[str(kind((int(address), bits), strict=False))] = limit
        limits[None] = self._overall
        return {network: limit for network, limit in limits.items() if limit}


def _limited(source: str, wait_ms: int) -> ProblemRaised:
    return ProblemRaised(
        Problem(
            429,
            "install_mint_limited",
            "Too many new installs",
            f"There are too many new installs from {source}. Known installs are still served.",
            retry_after_s=max(1, math.ceil(wait_ms / 1000)),
        )
    )
