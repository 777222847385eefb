"""Which installs are let in beside their credits: those on a licence's seats, and new ones at a bounded rate.

An install that has a row needs nothing here but its seat. A refusal creates nothing.
"""

import asyncio
import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol
from weakref import WeakValueDictionary

from aiohttp import web

from limiter._util.cancellation import run_to_completion
from limiter.credits.models import Decision, Status
from limiter.licences.seats import Seats, SeatStatus
from limiter.licences.tokens import Licence
from limiter.relay.http.client_address import Network, client_address
from limiter.relay.http.problems import Problem, ProblemRaised
from limiter.relay.metering.install_rate_limit import InstallRateLimit

_SEAT_TRUSTED_S = 60  # a freed install may go on for so long; a seat's last use is as exact
_MAX_SEATS = 10_000  # remembered by this node


class Wanted(NamedTuple):
    """What a request reserves. hold_id: the attempt's own."""

    install_id: str
    tier: str
    has_hardware: bool
    cost: int
    hold_id: str


class Reserver(Protocol):
    """What reserves: a limiter, or one that watches it."""

    async def reserve(
        self, install_id: str, *, tier: str, has_hardware: bool, cost: int, hold_id: str, may_create: bool
    ) -> Decision:
        """Reserve, as `CreditLimiter.reserve`."""
        ...


class Admission:
    """Seats and new installs of one relay."""

    def __init__(
        self,
        limiter: Reserver,
        seats: Seats,
        new_installs: InstallRateLimit,
        *,
        trusted_proxies: Sequence[Network] = (),
    ) -> None:
        self._limiter, self._seats, self._new_installs = limiter, seats, new_installs
        self._trusted_proxies = trusted_proxies
        self._creating: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._seated: dict[tuple[str, str, int], float] = {}

    async def seat(self, install_id: str, licence: Licence | None) -> None:
        """Let an install use a licence, if a seat is free or it has one. A licence without a bound has no seats.

        Raises ProblemRaised (403), LimiterUnavailable.
        """
        if licence is None or licence.expired or licence.installs is None:
            return
        known = (licence.subject, install_id, licence.installs)
        now_s = time.monotonic()
        if self._seated.get(known, 0) > now_s:
            return
        self._seated.pop(known, None)
        status = await self._seats.take(
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
        while len(self._seated) >= _MAX_SEATS:
            del self._seated[next(iter(self._seated))]
        self._seated[known] = now_s + _SEAT_TRUSTED_S

    async def reserve(self, request: web.Request, licence: Licence | None, wanted: Wanted) -> Decision:
        """Reserve for an install that is known, or else count it as a new one and create it.

        A client that leaves ends it at once, but for a new install only when that is created. An install that is
        refused as one too many, and so was never served, loses the seat that it was just given.

        Raises ProblemRaised (429) when there are too many new installs, and what `CreditLimiter.reserve` raises.
        """
        decision = await self._reserve(wanted, may_create=False)
        if decision.status is not Status.UNKNOWN_INSTALL:
            return decision
        return await run_to_completion(
            self._reserve_new(request, licence, wanted), if_it_fails="The new install was not made"
        )

    async def _reserve_new(self, request: web.Request, licence: Licence | None, wanted: Wanted) -> Decision:
        # An app's first requests often come together: they are one new install.
        creating = self._creating.setdefault(wanted.install_id, asyncio.Lock())
        waits = creating.locked()
        async with creating:
            if waits:
                decision = await self._reserve(wanted, may_create=False)
                if decision.status is not Status.UNKNOWN_INSTALL:
                    return decision
            try:
                await self._new_installs.count(client_address(request, self._trusted_proxies))
            except ProblemRaised:
                await self._unseat(wanted.install_id, licence)
                raise
            return await self._reserve(wanted, may_create=True)

    async def _reserve(self, wanted: Wanted, *, may_create: bool) -> Decision:
        return await self._limiter.reserve(
            wanted.install_id,
            tier=wanted.tier,
            has_hardware=wanted.has_hardware,
            cost=wanted.cost,
            hold_id=wanted.hold_id,
            may_create=may_create,
        )

    async def _unseat(self, install_id: str, licence: Licence | None) -> None:
        if licence is not None and licence.installs is not None:
            self._seated.pop((licence.subject, install_id, licence.installs), None)
            await self._seats.free(licence.subject, install_id)
