"""Commit and release, in tasks that the app owns: a client that leaves, or a Redis that is away, must not stop them."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

from limiter.credits.limiter import CreditLimiter
from limiter.credits.models import Backend, Settlement, Status
from limiter.errors import LimiterError, LimiterUnavailable
from limiter.relay.metering.availability import RedisAvailability
from limiter.relay.telemetry.metrics import FAILED, GAVE_UP, Metrics, SettlementKind

_LOG = logging.getLogger("limiter.relay")
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 2.0
_LEAST_DRAIN_S = 2.0  # "do not wait for requests" must not lose the commits of those that were served
_MOST_UNDOS = 8192  # at once, as many as reserves can wait for an answer: each keeps asking a Redis that is away


class Settlements:
    """The settlements under way. Close it with `drain` before the limiter's connection closes."""

    def __init__(self, limiter: CreditLimiter, mode: RedisAvailability, metrics: Metrics) -> None:
        self._limiter, self._mode, self._metrics = limiter, mode, metrics
        self._tasks: set[asyncio.Task[None]] = set()
        self._undos = 0

    def open(self, install_id: str, hold_id: str) -> "OpenHold":
        """Take charge of a hold that was just placed."""
        return OpenHold(self._limiter, self, install_id, hold_id)

    def start(
        self,
        what: str,
        hold_id: str,
        settle: Callable[[], Awaitable[object]],
        *,
        kind: SettlementKind | None = None,
    ) -> "asyncio.Task[None]":
        """Settle in the background, repeated while Redis is away until the hold lapses. kind: what to count it as."""
        settling = self._until_settled(what, hold_id, settle, kind)
        task = asyncio.get_running_loop().create_task(settling, name=f"{what} {hold_id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def undo(self, install_id: str, hold_id: str) -> None:
        """Give back what a reserve may hold whose answer nobody has; with too many such, the hold lapses by itself.

        The release cannot overtake the reserve: commands about one row leave in order, on one connection. When that
        broke in between, the hold may still be placed after it, and lapses.
        """
        if self._undos == _MOST_UNDOS:
            _LOG.warning(
                "the hold, if there is one, is left to lapse: too many like it are being released",
                extra={"request_id": hold_id},
            )
            self._metrics.settled("undo", GAVE_UP)
            return
        self._undos += 1
        self.start(
            "release of what may be a hold",
            hold_id,
            lambda: self._limiter.release(install_id, hold_id),  # of nothing, it is nothing
            kind="undo",
        ).add_done_callback(self._undone)

    def under_way(self) -> int:
        """Tell how many settlements are under way."""
        return len(self._tasks)

    def _undone(self, _task: "asyncio.Task[None]") -> None:
        self._undos -= 1

    async def drain(self, within_s: float) -> None:
        """Wait for what is under way; what remains is given up and logged: its holds lapse by themselves."""
        if self._tasks:
            _, left = await asyncio.wait(self._tasks, timeout=max(within_s, _LEAST_DRAIN_S))
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def _until_settled(
        self, what: str, hold_id: str, settle: Callable[[], Awaitable[object]], kind: SettlementKind | None
    ) -> None:
        done: object = FAILED
        named = {"request_id": hold_id}
        try:
            done = await self._repeat_until_settled(settle)
        except LimiterUnavailable as error:
            _LOG.error("%s was not settled before its hold lapsed: %s", what, error, extra=named)
            done = GAVE_UP
        except LimiterError:
            _LOG.exception("%s cannot be settled", what, extra=named)
        except asyncio.CancelledError:
            _LOG.error("gave up at shutdown: %s", what, extra=named)
            done = GAVE_UP
        finally:
            if kind is not None:
                self._count(kind, done)

    def _count(self, kind: SettlementKind, done: object) -> None:
        if isinstance(done, Settlement):
            self._metrics.settled(kind, done.status, backend=done.backend, credits_=done.cost)
        else:
            self._metrics.settled(kind, str(done))

    async def _repeat_until_settled(self, settle: Callable[[], Awaitable[object]]) -> object:
        lapses = time.monotonic() + self._limiter.hold_ms / 1000
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                return await settle()
            except LimiterUnavailable:
                if time.monotonic() > lapses:
                    raise
            if self._mode.state == "ok":
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0, lapses - time.monotonic())):
                    await self._mode.back()


class OpenHold:
    """One request's hold: settled once, by whatever happens first."""

    __slots__ = ("_hold_id", "_install_id", "_limiter", "_owner", "_settled")

    def __init__(self, limiter: CreditLimiter, owner: Settlements, install_id: str, hold_id: str) -> None:
        self._limiter, self._owner, self._install_id, self._hold_id = limiter, owner, install_id, hold_id
        self._settled = False

    def commit(self, backend: Backend) -> None:
        """Debit what the hold covers, of the backend that served."""
        self._settle("commit", lambda limiter: limiter.commit(self._install_id, self._hold_id, backend=backend))

    def release(self) -> None:
        """Give the hold back, unless it was settled."""
        self._settle("release", lambda limiter: limiter.release(self._install_id, self._hold_id))

    def _settle(
        self, what: SettlementKind, operation: Callable[[CreditLimiter], Awaitable[Settlement | Status]]
    ) -> None:
        if not self._settled:
            self._settled = True
            self._owner.start(f"{what} of a hold", self._hold_id, lambda: operation(self._limiter), kind=what)
