"""Admission of installs, apart from their credits: the seats of a licence, and the rate limit for new installs.

An install that has a row needs only its seat here. A refusal creates nothing.
"""

import asyncio
import time
from collections.abc import Awaitable, Sequence
from typing import NamedTuple, Protocol
from weakref import WeakValueDictionary

from aiohttp import web

from limiter._util.cancellation import run_to_completion
from limiter.credits.models import Decision, DecisionStatus
from limiter.licences.seats import Seats, SeatStatus
from limiter.licences.tokens import Licence
from limiter.relay.http.client_address import Network, client_address
from limiter.relay.http.problems import Problem, ProblemRaised
from limiter.relay.metering.install_rate_limit import InstallRateLimit

_SEAT_TRUSTED_S = 60  # a freed install may be served for so long; the last use of a seat is only that exact
_MAX_SEATS = 10_000  # remembered by this node


class CreditRequest(NamedTuple):
    """The arguments of a request's reserve.

    has_hardware, has_gemini: which backends can serve it. hold_id: unique to this attempt.
    """

    install_id: str
    tier: str
    has_hardware: bool
    has_gemini: bool
    cost: int
    hold_id: str


class Reserver(Protocol):
    """A `CreditLimiter`, or a `WatchedLimiter`."""

    async def reserve(
        self,
        install_id: str,
        *,
        tier: str,
        has_hardware: bool,
        has_gemini: bool,
        cost: int,
        hold_id: str,
        may_create: bool,
    ) -> Decision:
        """Reserve, as `CreditLimiter.reserve`."""
        ...


class Admission:
    """The admission of one relay."""

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
        """Take a seat of a licence for an install, unless it has one. An unlimited licence has no seats.

        Raises ProblemRaised (403) if no seat is free, and LimiterUnavailable.
        """
        if licence is None or licence.expired or licence.installs is None:
            return
        seat = (licence.subject, install_id, licence.installs)
        now_s = time.monotonic()
        if self._seated.get(seat, 0) > now_s:
            return
        self._seated.pop(seat, None)
        status = await self._seats.take(
            licence.subject, install_id, seats=licence.installs, expires_s=licence.expires_s
        )
        if status is SeatStatus.FULL:
            problem = Problem(
                403,
                "licence_seats_taken",
                "Licence in use elsewhere",
                f"This licence is for {licence.installs} installs, and others use all of its seats. "
                "Ask its issuer to free a seat.",
                may_retry=False,
            )
            raise ProblemRaised(problem)
        while len(self._seated) >= _MAX_SEATS:
            del self._seated[next(iter(self._seated))]
        self._seated[seat] = now_s + _SEAT_TRUSTED_S

    async def reserve(self, request: web.Request, licence: Licence | None, credit: CreditRequest) -> Decision:
        """Reserve credits for a known install, or else count it as a new one and create it.

        When the client leaves, this is cancelled at once, but for a new install only after that is created. A new
        install that is refused, and so was never served, loses the seat that it has just taken.

        Raises ProblemRaised (429) if there are too many new installs, and everything that `CreditLimiter.reserve`
        raises.
        """
        decision = await self._reserve(credit, may_create=False)
        if decision.status is not DecisionStatus.UNKNOWN_INSTALL:
            return decision
        return await run_to_completion(
            self._reserve_new(request, licence, credit), if_it_fails="The new install was not created"
        )

    async def _reserve_new(self, request: web.Request, licence: Licence | None, credit: CreditRequest) -> Decision:
        # An app often sends its first requests at once: they count as one new install.
        creating = self._creating.setdefault(credit.install_id, asyncio.Lock())
        is_concurrent = creating.locked()
        async with creating:
            if is_concurrent:
                decision = await self._reserve(credit, may_create=False)
                if decision.status is not DecisionStatus.UNKNOWN_INSTALL:
                    return decision
            try:
                await self._new_installs.count(client_address(request, self._trusted_proxies))
            except ProblemRaised:
                await self._unseat(credit.install_id, licence)
                raise
            return await self._reserve(credit, may_create=True)

    def _reserve(self, credit: CreditRequest, *, may_create: bool) -> Awaitable[Decision]:
        return self._limiter.reserve(
            credit.install_id,
            tier=credit.tier,
            has_hardware=credit.has_hardware,
            has_gemini=credit.has_gemini,
            cost=credit.cost,
            hold_id=credit.hold_id,
            may_create=may_create,
        )

    async def _unseat(self, install_id: str, licence: Licence | None) -> None:
        if licence is not None and licence.installs is not None:
            self._seated.pop((licence.subject, install_id, licence.installs), None)
            await self._seats.free(licence.subject, install_id)
