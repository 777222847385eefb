"""The rate limit for new installs, counted in Redis for all nodes: by network, and for all clients together."""

import math
from dataclasses import dataclass
from enum import StrEnum

from limiter.credits.session import Session
from limiter.relay.http.client_address import Address, network_of
from limiter.relay.http.problems import Problem, ProblemRaised

PERIOD_MS = 3_600_000


class MintStatus(StrEnum):
    """The status that install_mint.lua returns."""

    MINTED = "MINTED"
    LIMITED = "LIMITED"
    RETURNED = "RETURNED"


@dataclass(frozen=True, slots=True)
class Mint:
    """The reply of install_mint.lua. wait_ms: until the next new install is allowed; 0 unless LIMITED."""

    status: MintStatus
    wait_ms: int


class InstallRateLimit:
    """Limits the rate of new installs.

    Args:
        session: for the counters in Redis.
        per_ip: new installs an hour for one IPv4 address or IPv6 /56; 0 for no limit.
        overall: new installs an hour for all clients together; 0 for no limit.
        limit_loopback: whether per_ip applies to loopback addresses, too. By default it does not: such a client is
            somebody trying the relay out, or a proxy missing in trusted_proxies, behind which all clients look alike.
    """

    def __init__(
        self, session: Session, *, per_ip: int = 20, overall: int = 10_000, limit_loopback: bool = False
    ) -> None:
        self._session = session
        self._scripts = session.scripts()
        self._per_ip, self._overall = per_ip, overall
        self._limit_loopback = limit_loopback

    async def count(self, address: Address) -> None:
        """Count a new install from an address. Raises ProblemRaised (429), LimiterUnavailable."""
        network = network_of(address)
        per_ip = self._per_ip if self._limit_loopback or not address.is_loopback else 0
        if per_ip:
            mint = await self.mint(network, limit=per_ip)
            if mint.status is MintStatus.LIMITED:
                raise _limited("your network", mint.wait_ms)
        if self._overall:
            mint = await self.mint(None, limit=self._overall)
            if mint.status is MintStatus.LIMITED:
                if per_ip:
                    await self.return_mint(network, limit=per_ip)
                raise _limited("all clients together", mint.wait_ms)

    async def mint(self, network: str | None, *, limit: int, period_ms: int = PERIOD_MS) -> Mint:
        """Run install_mint.lua to count a new install, of a network or of all. Not retried if it may have counted."""
        return await self._mint(network, limit, period_ms, 0)

    async def return_mint(self, network: str | None, *, limit: int, period_ms: int = PERIOD_MS) -> Mint:
        """Run install_mint.lua to undo a `mint`."""
        return await self._mint(network, limit, period_ms, 1)

    async def _mint(self, network: str | None, limit: int, period_ms: int, returns: int) -> Mint:
        key = self._session.keys.mint(network)
        status, wait_ms = await self._session.retry(
            lambda: self._scripts.call("install_mint", key, limit, period_ms, returns, self._session.now_ms()),
            when_unknown=False,
        )
        return Mint(MintStatus(status.decode()), wait_ms)


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
