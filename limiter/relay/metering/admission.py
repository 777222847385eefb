"""Whom the relay lets in beside its credits: installs on a licence's seats, and new installs at a bounded rate.

An install that has a row is never asked for anything here but its seat. A refusal creates nothing.
"""

import asyncio
import ipaddress
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from weakref import WeakValueDictionary

from aiohttp import web

from limiter._util.cancellation import run_to_completion
from limiter.credits.models import Decision, Status
from limiter.errors import SettingsError
from limiter.licences.tokens import Licence
from limiter.relay.http.problems import Problem, ProblemRaised
from limiter.relay.metering.claims import MintStatus, SeatStatus, Stores

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Reserve = Callable[[bool], Awaitable[Decision]]  # its argument: may_create
MINT_PERIOD_MS = 3_600_000
_SITE_BITS = 56  # what one customer of an IPv6 provider usually has
_SEAT_TRUSTED_S = 60  # a freed install may go on for so long; a seat's last use is as exact
_MOST_SEATS = 10_000  # remembered by this node
_NO_ADDRESS = IPv4Address(0)  # of a peer on a unix socket


def trusted_networks(texts: Sequence[str]) -> tuple[Network, ...]:
    """Read the setting `relay.trusted_proxies`: addresses and CIDR ranges. Raises SettingsError."""
    try:
        return tuple(ipaddress.ip_network(text.strip()) for text in texts)
    except ValueError as error:
        raise SettingsError(f"relay.trusted_proxies: {error}; give addresses or ranges like 10.0.0.0/8") from None


def client_address(request: web.Request, trusted_proxies: Sequence[Network]) -> Address:
    """Tell which address a request comes from.

    It is the peer's, unless that is a trusted proxy: then the last one of `X-Forwarded-For` that is none. What stands
    before that one was written by the client, or by nobody we know.
    """
    address = _address(request.remote or "") or _NO_ADDRESS
    hops = [hop for line in request.headers.getall("X-Forwarded-For", []) for hop in line.split(",")]
    while hops and any(address in network for network in trusted_proxies):
        before = _address(hops.pop())
        if before is None:  # "unknown", or damaged: whoever wrote it is as far as we can see
            break
        address = before
    return address


class Admission:
    """Counts seats and new installs, over all nodes.

    mint_per_ip, mint_overall: new installs an hour for one IPv4 address or IPv6 /56, and for all; 0 for no limit.
    limit_loopback: whether this machine's own addresses have the first limit, too. By default they do not: who comes
    from there tries the relay out, or is a proxy that trusted_proxies forgot, behind which all clients look alike.
    """

    def __init__(
        self,
        stores: Stores,
        *,
        mint_per_ip: int = 20,
        mint_overall: int = 10_000,
        trusted_proxies: Sequence[Network] = (),
        limit_loopback: bool = False,
    ) -> None:
        self._stores = stores
        self._per_ip, self._overall = mint_per_ip, mint_overall
        self._trusted_proxies = trusted_proxies
        self._limit_loopback = limit_loopback
        self._minting: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._seated: dict[tuple[str, str, int], float] = {}

    async def seat(self, install_id: str, licence: Licence | None) -> None:
        """Let an install use a licence, if a seat is free or it has one. Without a bound of installs nothing is asked.

        Raises ProblemRaised (403), LimiterUnavailable.
        """
        if licence is None or licence.expired or licence.installs is None:
            return
        known = (licence.subject, install_id, licence.installs)
        now_s = time.monotonic()
        if self._seated.get(known, 0) > now_s:
            return
        self._seated.pop(known, None)
        status = await self._stores.seat(
            licence.subject, install_id, seats=licence.installs, expires_s=licence.expires_s
        )
        if status is SeatStatus.FULL:
            problem = Problem(
                403,
                "licence_seats_taken",
                "Licence in use elsewhere",
                f"This licence is for {licence.installs} installs, and others use it already. "
                "Ask whoever issued it to free a seat.",
                may_retry=False,
            )
            raise ProblemRaised(problem)
        while len(self._seated) >= _MOST_SEATS:
            del self._seated[next(iter(self._seated))]
        self._seated[known] = now_s + _SEAT_TRUSTED_S

    async def reserve(
        self, request: web.Request, install_id: str, licence: Licence | None, reserve: Reserve
    ) -> Decision:
        """Reserve for an install that is known, or else count it as a new one and create it.

        A client that leaves is heard of at once, but for a new install when that is made. Raises ProblemRaised (429)
        when there are too many new ones, and what `reserve` raises. Such a one, which was never served, does not keep
        the seat that it was just given.
        """
        decision = await reserve(False)
        if decision.status is not Status.UNKNOWN_INSTALL:
            return decision
        return await run_to_completion(
            self._reserve_new(request, install_id, licence, reserve), if_it_fails="The new install was not made"
        )

    async def _reserve_new(
        self, request: web.Request, install_id: str, licence: Licence | None, reserve: Reserve
    ) -> Decision:
        # An app's first requests often come together: they are one new install.
        minting = self._minting.setdefault(install_id, asyncio.Lock())
        waits = minting.locked()
        async with minting:
            if waits and (decision := await reserve(False)).status is not Status.UNKNOWN_INSTALL:
                return decision
            try:
                await self.mint(client_address(request, self._trusted_proxies))
            except ProblemRaised:
                await self._unseat(install_id, licence)
                raise
            return await reserve(True)

    async def _unseat(self, install_id: str, licence: Licence | None) -> None:
        if licence is not None and licence.installs is not None:
            self._seated.pop((licence.subject, install_id, licence.installs), None)
            await self._stores.free(licence.subject, install_id)

    async def mint(self, address: Address) -> None:
        """Count a new install from an address. Raises ProblemRaised (429), LimiterUnavailable."""
        network = str(_network_of(address))
        per_ip = self._per_ip if self._limit_loopback or not address.is_loopback else 0
        if per_ip:
            mint = await self._stores.mint(network, limit=per_ip, period_ms=MINT_PERIOD_MS)
            if mint.status is MintStatus.LIMITED:
                raise _limited("your network", mint.wait_ms)
        if self._overall:
            mint = await self._stores.mint(None, limit=self._overall, period_ms=MINT_PERIOD_MS)
            if mint.status is MintStatus.LIMITED:
                if per_ip:
                    await self._stores.return_mint(network, limit=per_ip, period_ms=MINT_PERIOD_MS)
                raise _limited("all clients together", mint.wait_ms)


def _limited(whose: str, wait_ms: int) -> ProblemRaised:
    return ProblemRaised(
        Problem(
            429,
            "install_mint_limited",
            "Too many new installs",
            f"Too many new installs came from {whose}. Those that are known already are served.",
            retry_after_s=max(1, math.ceil(wait_ms / 1000)),
        )
    )


def _network_of(address: Address) -> Address | Network:
    """Give what one client can be held to: an IPv4 address, an IPv6 /56."""
    if isinstance(address, IPv4Address):
        return address
    return IPv6Network((int(address), _SITE_BITS), strict=False)  # by number: without a scope


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
