"""Commit and release of what requests hold, each once, by whatever ends the request first."""

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from types import TracebackType
from typing import Self

from limiter.credits.limiter import CreditLimiter
from limiter.credits.models import Backend, Settlement, Status
from limiter.log_events import event
from limiter.relay.metering.background_retries import BackgroundRetries
from limiter.relay.telemetry.metrics import GAVE_UP, Metrics, SettlementKind

_LOG = logging.getLogger("limiter.relay")
_MAX_UNDOS = 8192  # at once, as many as reserves can wait for an answer: each is repeated while Redis is unavailable


class Settlements:
    """The holds of one relay."""

    def __init__(self, limiter: CreditLimiter, retries: BackgroundRetries, metrics: Metrics) -> None:
        self._limiter, self._retries, self._metrics = limiter, retries, metrics
        self._undos = 0

    def open(self, install_id: str, hold_id: str) -> "OpenHold":
        """Take charge of a hold that was just placed, as `with settlements.open(…) as hold:`."""
        return OpenHold(self._limiter, self, install_id, hold_id)

    def settle(self, kind: SettlementKind, hold_id: str, call: Callable[[], Awaitable[object]]) -> None:
        """Settle a hold in the background, repeated while Redis is unavailable until the hold expires."""
        self._retries.start(f"{kind} of a hold", hold_id, call, on_end=partial(self._count, kind))

    def undo(self, install_id: str, hold_id: str) -> None:
        """Release what a reserve may hold that was not answered; with too many such, the hold expires by itself.

        The release cannot overtake the reserve: commands about one row leave in order, on one connection. When that
        broke in between, the hold may still be placed after it, and expires.
        """
        if self._undos == _MAX_UNDOS:
            _LOG.warning(
                "A hold, if there is one, is left to expire: too many like it are being released",
                extra=event("settlement_skipped", request_id=hold_id),
            )
            self._metrics.settled("undo", GAVE_UP)
            return
        self._undos += 1
        self._retries.start(
            "release of what may be a hold",
            hold_id,
            lambda: self._limiter.release(install_id, hold_id),  # of nothing, it is nothing
            on_end=self._undone,
        )

    def _undone(self, outcome: object) -> None:
        self._undos -= 1
        self._count("undo", outcome)

    def _count(self, kind: SettlementKind, outcome: object) -> None:
        if isinstance(outcome, Settlement):
            self._metrics.settled(kind, outcome.status, backend=outcome.backend, credits_=outcome.cost)
        else:
            self._metrics.settled(kind, str(outcome))


class OpenHold:
    """One request's hold: settled once, by whatever happens first, and at the end of its `with` block at the latest."""

    __slots__ = ("_hold_id", "_install_id", "_limiter", "_owner", "_settled")

    def __init__(self, limiter: CreditLimiter, owner: Settlements, install_id: str, hold_id: str) -> None:
        self._limiter, self._owner, self._install_id, self._hold_id = limiter, owner, install_id, hold_id
        self._settled = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def commit(self, backend: Backend) -> None:
        """Debit what the hold covers, of the backend that served."""
        self._settle("commit", lambda limiter: limiter.commit(self._install_id, self._hold_id, backend=backend))

    def release(self) -> None:
        """Release the hold, unless it was settled."""
        self._settle("release", lambda limiter: limiter.release(self._install_id, self._hold_id))

    def _settle(
        self, kind: SettlementKind, operation: Callable[[CreditLimiter], Awaitable[Settlement | Status]]
    ) -> None:
        if not self._settled:
            self._settled = True
            self._owner.settle(kind, self._hold_id, lambda: operation(self._limiter))
