"""Caches refusals for lack of credits for a moment, so that a client that keeps retrying costs few calls.

It may only refuse, and only what Redis would refuse too if no other node had changed the row since: for a cost above
what remained, not across a renewal, and never after a change that this process made.
"""

import time
from collections.abc import Callable

from limiter.credits.models import Balance, Decision, DecisionStatus, Reason

Snapshot = tuple[int, float]  # how many changes there had been, and when: epoch or monotonic milliseconds
_MAX_REFUSALS = 10_000  # refusals that are kept; the oldest go first
_SLOTS = 4096  # a change drops the refusals of some other installs, too, and costs no memory


class DenialCache:
    """The refusals of one limiter. keep_ms: how long each is kept, 0: not at all. clock: the limiter's own, if any."""

    __slots__ = ("_changed", "_changes", "_denied", "_keep_ms", "_now_ms")

    def __init__(self, keep_ms: int, clock: Callable[[], int] | None) -> None:
        self._keep_ms = keep_ms
        self._now_ms: Callable[[], float] = clock or _monotonic_ms
        self._denied: dict[tuple[str, str], tuple[Snapshot, float, Balance]] = {}
        self._changes = 0
        self._changed = [0] * _SLOTS

    def snapshot(self) -> Snapshot:
        """Return what `record` needs to know of the time before the call to Redis."""
        return self._changes, self._now_ms() if self._keep_ms else 0

    def lookup(self, row_key: str, tier: str, cost: int, hold_id: str) -> Decision | None:
        """Return the refusal that Redis would make, if it is known."""
        denied = self._denied.get((row_key, tier))
        if denied is None:
            return None
        (changes, called_ms), until_ms, balance = denied
        now_ms = self._now_ms()
        if now_ms >= until_ms or self._changed[hash(row_key) % _SLOTS] > changes:
            del self._denied[row_key, tier]
            return None
        if cost <= (balance.remaining or 0):
            return None
        balance = balance._replace(now_ms=balance.now_ms + int(now_ms - called_ms))
        return Decision(DecisionStatus.DENIED, Reason.OUT_OF_CREDITS, None, hold_id, balance, from_memory=True)

    def record(self, row_key: str, before: Snapshot, decision: Decision | None) -> None:
        """Cache a refusal; any other decision may have changed the row. None: the outcome is unknown.

        While credits are held, nothing is cached: a repeat may be of a live hold, which Redis would not refuse.
        """
        if not self._keep_ms:
            return
        if decision is None or decision.status is not DecisionStatus.DENIED:
            self.invalidate(row_key)
        elif decision.reason is Reason.OUT_OF_CREDITS and not decision.balance.held:
            balance = decision.balance
            lasts_ms = self._keep_ms
            if balance.renews_ms is not None:  # both by the server's clock; it had not reached now_ms at the call
                lasts_ms = min(lasts_ms, balance.renews_ms - balance.now_ms)
            key = row_key, balance.tier
            self._denied.pop(key, None)
            if len(self._denied) >= _MAX_REFUSALS:
                del self._denied[next(iter(self._denied))]
            self._denied[key] = before, before[1] + lasts_ms, balance

    def invalidate_all(self) -> None:
        """Drop all refusals."""
        self._denied.clear()
        self._changes += 1
        self._changed = [self._changes] * _SLOTS

    def invalidate(self, row_key: str) -> None:
        """Drop the refusals of a row that this process changed, or may have, and those of calls that are under way."""
        self._changes += 1
        self._changed[hash(row_key) % _SLOTS] = self._changes


def _monotonic_ms() -> float:
    return time.monotonic() * 1000
