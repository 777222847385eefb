"""The public interface: reserve, commit, release, debit and balance, each within a deadline.

It generates hold ids and decides which calls may be repeated. The only state that it keeps of installs is refusals, for
a moment.
"""

import re
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager

from redis.asyncio import Redis

from limiter._util.ids import random_id
from limiter.credits.denial_cache import DenialCache
from limiter.credits.hold import Hold, hold_context
from limiter.credits.keys import normalise_install_id
from limiter.credits.models import (
    MAX_COST,
    Backend,
    Balance,
    Decision,
    Leave,
    PutStatus,
    Row,
    Settlement,
    SettlementStatus,
    StreamStatus,
    Tiers,
)
from limiter.credits.rows import read_row
from limiter.credits.scripts import PutMode
from limiter.credits.session import Session
from limiter.errors import LimiterUnavailable

_HOLD_ID = re.compile(r"[A-Za-z0-9._-]{1,48}", re.ASCII)


class CreditLimiter:
    """Credits of installs on one Redis, for any number of nodes at once.

    Args:
        redis: from `connect`.
        tiers: the limits that are configured.
        clock: `() -> epoch ms`, for tests; without one, the server's time is used.
        prefix: of every key.
        hold_ms: how long a hold lives without commit or release.
        timeout_ms: bounds one attempt.
        deadline_ms: bounds a whole call with its retries.
        deny_cache_ms: how long a refusal for lack of credits is repeated without a call to Redis. A change made through
            this limiter is seen at once, one made elsewhere up to this much later.
        enforces_bounds: whether a tier's rate refuses, and leaves that are not free are debited. If not, only
            `Decision.rate_wait_ms` and `Settlement.is_beyond` say what would have been.
    """

    def __init__(
        self,
        redis: "Redis",
        tiers: Tiers,
        *,
        clock: Callable[[], int] | None = None,
        prefix: str = "credits",
        hold_ms: int = 600_000,
        timeout_ms: int = 1000,
        deadline_ms: int = 3000,
        deny_cache_ms: int = 0,
        enforces_bounds: bool = True,
    ) -> None:
        self.tiers = tiers
        self.hold_ms = hold_ms
        self.enforces_bounds = enforces_bounds
        self.session = Session(redis, prefix=prefix, clock=clock, timeout_ms=timeout_ms, deadline_ms=deadline_ms)
        self._scripts = self.session.scripts()
        self._denial_cache = DenialCache(deny_cache_ms, clock)
        self.session.on_bulk_change(self._denial_cache.invalidate_all)

    async def reserve(
        self,
        install_id: str,
        *,
        tier: str,
        has_hardware: bool,
        has_gemini: bool = True,
        cost: int = 1,
        hold_id: str | None = None,
        may_create: bool = True,
    ) -> Decision:
        """Plan a request and hold its credits, until commit, release or `hold_ms`.

        has_hardware, has_gemini: which backends can serve this request; one of them must.

        A repeat with the same hold_id returns the same answer (REPLAY) and holds nothing more. A refusal stores only
        the roll-over and a new row. Raises UnknownTier, InvalidInstallId, BrokenRow, LimiterUnavailable.
        """
        limits = self.tiers[tier]
        key = self.session.keys.install(install_id)
        hold = _checked_hold_id(hold_id) if hold_id else random_id()
        _check_cost(cost)
        _check_backends(has_hardware, has_gemini)
        return await self._decided(
            key,
            tier,
            cost,
            lambda: self._scripts.reserve(
                key,
                hold_id=hold,
                tier=limits,
                has_hardware=has_hardware,
                has_gemini=has_gemini,
                cost=cost,
                hold_ms=self.hold_ms,
                may_create=may_create,
                enforces_rate=self.enforces_bounds,
                now_ms=self.session.now_ms(),
            ),
            hold_id=hold,
        )

    async def commit(
        self,
        install_id: str,
        hold_id: str,
        *,
        backend: Backend | None = None,
        cost: int | None = None,
        stream_ms: int | None = None,
    ) -> Settlement:
        """Turn a hold into a debit, with the backend and cost passed or else with those held.

        stream_ms: for a stream that still runs, the lease for which it stays in flight; end it with `end_stream`.

        Returns COMMITTED; LATE if the hold had expired, debited all the same; or GONE if there is no such hold, as for
        the second of two commits. Raises InvalidInstallId, BrokenRow, LimiterUnavailable.
        """
        key = self.session.keys.install(install_id)
        hold = _checked_hold_id(hold_id)
        if cost is not None:
            _check_cost(cost)
        if backend not in (None, "gemini", "hardware"):
            raise ValueError(f"backend is {backend!r}, want 'gemini' or 'hardware'")
        try:
            return await self.session.retry(
                lambda: self._scripts.commit(
                    key,
                    hold_id=hold,
                    backend=backend,
                    cost=cost,
                    lifetime_tiers=self.tiers.lifetime_names,
                    mark_ms=stream_ms,
                    now_ms=self.session.now_ms(),
                ),
                when_overloaded=True,
            )
        finally:
            self._denial_cache.invalidate(key)

    async def renew_stream(self, install_id: str, hold_id: str, *, stream_ms: int) -> StreamStatus:
        """Renew the lease of a stream that still runs. Return RENEWED, or GONE if it is in flight no more.

        Raises as `commit`.
        """
        key = self.session.keys.install(install_id)
        hold = _checked_hold_id(hold_id)
        return await self.session.retry(
            lambda: self._scripts.stream(key, hold_id=hold, lease_ms=stream_ms, now_ms=self.session.now_ms())
        )

    async def end_stream(self, install_id: str, hold_id: str) -> StreamStatus:
        """End a stream, which is then in flight no more. Return ENDED, or GONE. Raises as `commit`."""
        key = self.session.keys.install(install_id)
        hold = _checked_hold_id(hold_id)
        return await self.session.retry(
            lambda: self._scripts.stream(key, hold_id=hold, lease_ms=0, now_ms=self.session.now_ms()),
            when_overloaded=True,
        )

    async def leave(self, install_id: str, hold_id: str, *, tier: str, leave: Leave) -> Settlement:
        """Release the hold of a request that its client left while a backend worked for it, or debit it.

        Returns RELEASED for one of the tier's free leaves; else COMMITTED or LATE; or GONE. Raises as `commit`.
        """
        limits = self.tiers[tier]
        key = self.session.keys.install(install_id)
        hold = _checked_hold_id(hold_id)
        try:
            return await self.session.retry(
                lambda: self._scripts.leave(
                    key,
                    hold_id=hold,
                    leave=leave,
                    tier=limits,
                    enforces=self.enforces_bounds,
                    lifetime_tiers=self.tiers.lifetime_names,
                    now_ms=self.session.now_ms(),
                ),
                when_overloaded=True,
            )
        finally:
            self._denial_cache.invalidate(key)

    async def release(self, install_id: str, hold_id: str) -> SettlementStatus:
        """Release a hold. Return RELEASED, or GONE if there is no such hold. Raises as `commit`."""
        key = self.session.keys.install(install_id)
        hold = _checked_hold_id(hold_id)
        try:
            return await self.session.retry(
                lambda: self._scripts.release(key, hold_id=hold, now_ms=self.session.now_ms()), when_overloaded=True
            )
        finally:
            self._denial_cache.invalidate(key)

    async def debit(
        self,
        install_id: str,
        *,
        tier: str,
        has_hardware: bool,
        has_gemini: bool = True,
        cost: int = 1,
        may_create: bool = True,
    ) -> Decision:
        """Plan and debit in one step, for callers that need no hold.

        It is not repeated after a lost answer: LimiterUnavailable then means that it may have been debited.
        """
        limits = self.tiers[tier]
        key = self.session.keys.install(install_id)
        _check_cost(cost)
        _check_backends(has_hardware, has_gemini)
        return await self._decided(
            key,
            tier,
            cost,
            lambda: self._scripts.debit(
                key,
                tier=limits,
                has_hardware=has_hardware,
                has_gemini=has_gemini,
                cost=cost,
                lifetime_tiers=self.tiers.lifetime_names,
                may_create=may_create,
                enforces_rate=self.enforces_bounds,
                now_ms=self.session.now_ms(),
            ),
            when_unknown=False,
        )

    async def balance(self, install_id: str, *, tier: str) -> Balance:
        """Return the balance of a tier on a row; that of a new row for an unknown install. Write nothing."""
        limits = self.tiers[tier]
        key = self.session.keys.install(install_id)
        return await self.session.retry(lambda: self._scripts.balance(key, tier=limits, now_ms=self.session.now_ms()))

    async def row(self, install_id: str) -> Row | None:
        """Read a row as it is stored, without a roll-over; None if unknown."""
        install_id = normalise_install_id(install_id)
        return await self.session.retry(lambda: read_row(self.session, install_id))

    async def put_row(self, row: Row, *, mode: PutMode) -> PutStatus:
        """Store a row: `create` keeps an existing one, `replace` overwrites it, `merge` keeps the larger counters.

        Returns CREATED, SAME, REPLACED, MERGED or EXISTS. Live holds stay. Raises as `commit`.
        """
        key = self.session.keys.install(row.install_id)
        try:
            return await self.session.retry(lambda: self._scripts.put_row(key, row, mode=mode))
        finally:
            self._denial_cache.invalidate(key)

    def hold(
        self,
        install_id: str,
        *,
        tier: str,
        has_hardware: bool,
        has_gemini: bool = True,
        cost: int = 1,
        hold_id: str | None = None,
    ) -> AbstractAsyncContextManager[Hold]:
        """Reserve, then commit at the end of the block, or release if it raises (cancellation included).

        Check `hold.allowed` first: a refused hold has nothing to settle. `hold.charge()` sets what was really used.
        """
        own_id = hold_id or random_id()
        return hold_context(
            lambda: self.reserve(
                install_id,
                tier=tier,
                has_hardware=has_hardware,
                has_gemini=has_gemini,
                cost=cost,
                hold_id=own_id,
            ),
            lambda hold: self.commit(install_id, own_id, backend=hold.used_backend, cost=hold.used_cost),
            lambda: self.release(install_id, own_id),
        )

    async def _decided(
        self,
        key: str,
        tier: str,
        cost: int,
        attempt: Callable[[], Awaitable[Decision]],
        *,
        hold_id: str = "",
        when_unknown: bool = True,
    ) -> Decision:
        denied = self._denial_cache.lookup(key, tier, cost, hold_id)
        if denied is not None:
            return denied
        before = self._denial_cache.snapshot()
        decision = None
        try:
            decision = await self.session.retry(attempt, when_unknown=when_unknown)
        except LimiterUnavailable as error:
            error.hold_id = hold_id or None
            raise
        finally:
            self._denial_cache.record(key, before, decision)
        return decision


def _checked_hold_id(hold_id: str) -> str:
    if not _HOLD_ID.fullmatch(hold_id):
        raise ValueError(f"hold id {hold_id[:80]!r} is not usable: give 1 to 48 characters of A-Z a-z 0-9 . _ -")
    return hold_id


def _check_backends(has_hardware: bool, has_gemini: bool) -> None:
    if not (has_hardware or has_gemini):
        raise ValueError("neither has_hardware nor has_gemini is true: no backend could serve the request")


def _check_cost(cost: int) -> None:
    if type(cost) is not int or not 1 <= cost <= MAX_COST:
        raise ValueError(f"cost is {cost!r}, want an integer from 1 to {MAX_COST} credits")
