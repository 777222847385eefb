"""Settlement of holds: each is committed or released once, by whatever ends its request first."""

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from types import TracebackType
from typing import Self

from limiter.credits.limiter import CreditLimiter
from limiter.credits.models import Backend, Settlement, SettlementStatus
from limiter.log_events import event
from limiter.relay.metering.background_retries import BackgroundRetries
from limiter.relay.telemetry.metrics import GAVE_UP, Metrics, SettlementKind

_LOG = logging.getLogger("limiter.relay")
_MAX_UNDOS = 8192  # at once, as many as reserves can wait for a reply: each is retried while Redis is unavailable


class Settlements:
    """The holds of one relay."""

    def __init__(self, limiter: CreditLimiter, retries: BackgroundRetries, metrics: Metrics) -> None:
        self._limiter, self._retries, self._metrics = limiter, retries, metrics
        self._undos = 0

    def open(self, install_id: str, hold_id: str) -> "OpenHold":
        """Return a hold that was just placed, for `with settlements.open(…) as hold:`."""
        return OpenHold(self._limiter, self, install_id, hold_id)

    def settle(self, kind: SettlementKind, hold_id: str, call: Callable[[], Awaitable[object]]) -> None:
        """Settle a hold in the background, and retry while Redis is unavailable, until the hold expires."""
        self._retries.start(f"{kind} of a hold", hold_id, call, on_end=partial(self._count, kind))

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


class OpenHold:
    """The hold of one request: settled once, by the first event that ends it, or at the end of its `with` block."""

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
        """Commit the hold: debit its credits, for the backend that served."""
        self._settle("commit", lambda limiter: limiter.commit(self._install_id, self._hold_id, backend=backend))

    def release(self) -> None:
        """Release the hold, unless it has been settled."""
        self._settle("release", lambda limiter: limiter.release(self._install_id, self._hold_id))

    def _settle(
        self, kind: SettlementKind, operation: Callable[[CreditLimiter], Awaitable[Settlement | SettlementStatus]]
    ) -> None:
        if not self._settled:
            self._settled = True
            self._owner.settle(kind, self._hold_id, lambda: operation(self._limiter))
