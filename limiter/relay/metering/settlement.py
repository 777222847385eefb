"""Settlement of holds: each is committed, released or left once, by whatever ends its request first.

A stream stays in flight after its commit, by a mark whose lease is renewed here until the stream ends. A relay that
dies renews nothing, so the mark ends with its lease.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from types import TracebackType
from typing import Self

from limiter.credits.limiter import CreditLimiter
from limiter.credits.models import Backend, Leave, Settlement, SettlementStatus
from limiter.errors import LimiterError, LimiterUnavailable
from limiter.log_events import event
from limiter.relay.metering.background_retries import BackgroundRetries
from limiter.relay.metering.idempotency import Attempt
from limiter.relay.telemetry.metrics import GAVE_UP, Metrics, ReleaseCause, SettlementKind
from limiter.relay.telemetry.over_bounds import OverBounds

_LOG = logging.getLogger("limiter.relay")
_MAX_UNDOS = 8192  # at once, as many as reserves can wait for a reply: each is retried while Redis is unavailable
STREAM_LEASE_S = 90.0
_TICKS_IN_A_LEASE = 6
_RENEWALS_AT_ONCE = 64
_DEBITED = (SettlementStatus.COMMITTED, SettlementStatus.LATE)


class Settlements:
    """The holds of one relay.

    Args:
        limiter: settles them.
        retries: makes the calls in the background.
        metrics: counts them.
        over_bounds: is told of leaves that are not free.
        lease_s: how long a stream stays in flight when this relay dies.
    """

    def __init__(
        self,
        limiter: CreditLimiter,
        retries: BackgroundRetries,
        metrics: Metrics,
        over_bounds: OverBounds,
        *,
        lease_s: float = STREAM_LEASE_S,
    ) -> None:
        self._limiter, self._retries, self._metrics, self._over_bounds = limiter, retries, metrics, over_bounds
        self._undos = 0
        self._streams: set[_Stream] = set()
        self._lease_s, self._lease_ms = lease_s, int(lease_s * 1000)
        self.stops = False

    def open(self, install_id: str, hold_id: str, tier: str, attempt: Attempt) -> "OpenHold":
        """Return a hold that was just placed, for `with settlements.open(…) as hold:`, within that of its attempt."""
        return OpenHold(self, install_id, hold_id, tier, attempt)

    @asynccontextmanager
    async def renewing(self) -> AsyncIterator[None]:
        """Renew the leases of streams while the block runs."""
        task = asyncio.create_task(self._renew_for_ever(), name="renewal of streams")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait({task})

    def commit(self, install_id: str, hold_id: str, backend: Backend, *, streams: bool) -> "_Stream | None":
        """Commit a hold in the background. Return the stream that it pays for, if it still runs."""
        stream = _Stream(install_id, hold_id) if streams else None
        lease_ms = self._lease_ms if streams else None

        def end(outcome: object) -> None:
            self._count("commit", outcome)
            if stream is not None:  # also after a failure: the mark may be there
                self._placed(stream)

        self._retries.start(
            "commit of a hold",
            hold_id,
            lambda: self._limiter.commit(install_id, hold_id, backend=backend, stream_ms=lease_ms),
            on_end=end,
        )
        return stream

    def release(self, install_id: str, hold_id: str, cause: ReleaseCause) -> None:
        """Release a hold in the background."""
        self._metrics.released(cause)
        self._retries.start(
            "release of a hold",
            hold_id,
            lambda: self._limiter.release(install_id, hold_id),
            on_end=partial(self._count, "release"),
        )

    def leave(self, install_id: str, hold_id: str, tier: str, leave: Leave, on_end: Callable[[bool], None]) -> None:
        """Release the hold of a leave, or debit it, in the background.

        on_end: called with whether it was debited.
        """
        self._metrics.released("left")

        def end(outcome: object) -> None:
            self._count("leave", outcome)
            if isinstance(outcome, Settlement) and outcome.is_beyond:
                self._over_bounds.note("leaves", hold_id)
            on_end(isinstance(outcome, Settlement) and outcome.status in _DEBITED)

        self._retries.start(
            "release of a hold",
            hold_id,
            lambda: self._limiter.leave(install_id, hold_id, tier=tier, leave=leave),
            on_end=end,
        )

    def end(self, stream: "_Stream") -> None:
        """End a stream, which then is in flight no more."""
        stream.is_over = True
        if stream.is_placed:
            self._remove(stream)

    def undo(self, install_id: str, hold_id: str) -> None:
        """Release the hold of a reserve that was not answered; if there are too many such holds, let it expire.

        The release cannot overtake the reserve: commands about one row are sent in order, on one connection. If that
        broke in between, the hold may still be placed after the release, and then expires.
        """
        if self._undos == _MAX_UNDOS:
            _LOG.warning(
                "A hold whose reserve was not answered is left to expire: too many such holds are being released",
                extra=event("settlement_skipped", request_id=hold_id),
            )
            self._metrics.settled("undo", GAVE_UP)
            return
        self._undos += 1
        self._retries.start(
            "release of what may be a hold",
            hold_id,
            lambda: self._limiter.release(install_id, hold_id),  # without a hold, it does nothing
            on_end=self._end_undo,
        )

    def _end_undo(self, outcome: object) -> None:
        self._undos -= 1
        self._count("undo", outcome)

    def _count(self, kind: SettlementKind, outcome: object) -> None:
        if isinstance(outcome, Settlement):
            self._metrics.settled(kind, outcome.status, backend=outcome.backend, credits_=outcome.cost)
        else:
            self._metrics.settled(kind, str(outcome))

    def _placed(self, stream: "_Stream") -> None:
        """Note that the mark of a stream is there, and remove it if the stream has ended meanwhile."""
        stream.is_placed = True
        if stream.is_over:
            self._remove(stream)
        else:
            self._streams.add(stream)

    def _remove(self, stream: "_Stream") -> None:
        self._streams.discard(stream)
        self._retries.start(
            "end of a stream", stream.hold_id, lambda: self._limiter.end_stream(stream.install_id, stream.hold_id)
        )

    async def _renew_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self._lease_s / _TICKS_IN_A_LEASE)
            with suppress(LimiterUnavailable):  # the next tick tries again: until then most leases last
                await self._renew_due()

    async def _renew_due(self) -> None:
        due_s = time.monotonic() - self._lease_s / 3
        due = [stream for stream in self._streams if stream.renewed_s <= due_s]
        for at in range(0, len(due), _RENEWALS_AT_ONCE):
            batch = due[at : at + _RENEWALS_AT_ONCE]
            results = await asyncio.gather(*map(self._renew, batch), return_exceptions=True)
            for failure in results:
                if isinstance(failure, LimiterUnavailable):
                    raise failure
                if isinstance(failure, BaseException):
                    _LOG.error(
                        "The renewal of a stream failed: %s",
                        failure,
                        extra=event("settlement_failed"),
                        exc_info=failure,
                    )

    async def _renew(self, stream: "_Stream") -> None:
        began_s = time.monotonic()
        if stream.is_over:
            return
        try:
            await self._limiter.renew_stream(stream.install_id, stream.hold_id, stream_ms=self._lease_ms)
        except LimiterUnavailable:
            raise
        except LimiterError:
            stream.renewed_s = began_s
            raise
        stream.renewed_s = began_s


class _Stream:
    """A stream that was committed, until its end."""

    __slots__ = ("hold_id", "install_id", "is_over", "is_placed", "renewed_s")

    def __init__(self, install_id: str, hold_id: str) -> None:
        self.install_id, self.hold_id = install_id, hold_id
        self.renewed_s = time.monotonic()
        self.is_placed = self.is_over = False


class OpenHold:
    """The hold of one request: settled once, by the first event that ends it, or at the end of its `with` block."""

    __slots__ = ("_attempt", "_called", "_hold_id", "_install_id", "_owner", "_settled", "_stream", "_tier")

    def __init__(self, owner: Settlements, install_id: str, hold_id: str, tier: str, attempt: Attempt) -> None:
        self._owner, self._install_id, self._hold_id, self._tier = owner, install_id, hold_id, tier
        self._attempt = attempt
        self._called: Backend | None = None
        self._settled = False
        self._stream: _Stream | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.release("refused")
        elif issubclass(kind, asyncio.CancelledError) and not self._owner.stops:
            self.leave()
        else:
            self.release("failed")
        if self._stream is not None:
            self._owner.end(self._stream)

    def called(self, backend: Backend) -> None:
        """Note that the request was sent to a backend, which works for it from now on."""
        self._called = backend

    def commit(self, backend: Backend, *, streams: bool = False) -> None:
        """Commit the hold: debit its credits, for the backend that served. streams: the answer is a stream."""
        if not self._settled:
            self._settled = True
            self._stream = self._owner.commit(self._install_id, self._hold_id, backend, streams=streams)

    def release(self, cause: ReleaseCause) -> None:
        """Release the hold, unless it has been settled."""
        if not self._settled:
            self._settled = True
            self._owner.release(self._install_id, self._hold_id, cause)

    def leave(self) -> None:
        """Settle the hold of a client that left: as a leave, if a backend was called; unless it has been settled."""
        if self._called is None:
            self.release("unsent")
        elif not self._settled:
            self._settled = True
            attempt = self._attempt
            leave = Leave(self._called, attempt.identity, attempt.is_retry)
            self._owner.leave(self._install_id, self._hold_id, self._tier, leave, attempt.end_later())
