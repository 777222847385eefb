"""Whether Redis is available, as this node sees it, and what a request gets while it is not.

Real calls and a probe that runs for ever decide it; nothing is decided once at start. Only changes are logged. It knows
nothing of credits, and settles nothing.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import Literal, Self, TypeVar

from limiter._util.backoff import Backoff
from limiter.config.settings import OnRedisDown
from limiter.credits.limiter import CreditLimiter
from limiter.credits.models import CORE, Balance, Decision
from limiter.errors import BrokenRow, LimiterError, LimiterUnavailable, Overloaded, ScriptContractError
from limiter.log_events import event

T = TypeVar("T")
RedisState = Literal["ok", "away"]
_LOG = logging.getLogger("limiter.relay")
_PROBED = "probe"  # an install id that no client can have: it is no UUID
_IDLE_S = 5.0  # while ok: the probe looks only when no decision has shown it for so long


class RedisUnavailable(LimiterUnavailable):
    """Redis was away already: nothing was sent, so nothing can be held."""

    def __init__(self) -> None:
        super().__init__("Redis is away", executed=False)


class RedisAvailability:
    """The state of Redis on this node. Use it as `async with RedisAvailability(…):`, which runs the probe.

    on_redis_down: "deny" refuses while Redis is away; "hardware" serves unmetered, for relays that have hardware.
    timed: called with the seconds of each reserve that was answered.
    """

    def __init__(
        self,
        limiter: CreditLimiter,
        *,
        on_redis_down: OnRedisDown = "deny",
        timed: Callable[[float], None] | None = None,
    ) -> None:
        self.on_redis_down = on_redis_down
        self._limiter = limiter
        self._timed = timed
        self._state: RedisState = "ok"
        self._answered_s = self._changed_s = time.monotonic()
        self._went, self._back = asyncio.Event(), asyncio.Event()
        self._back.set()
        self._task: asyncio.Task[None] | None = None
        self._looking: asyncio.Task[None] | None = None
        self._stopping = False

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._probe_for_ever(), name="probe of Redis")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping = True  # a cancellation can get lost in redis-py 8, see `cancelling.CancelWatch`
        for task in (self._task, self._looking):
            if task is not None:
                task.cancel()
                await asyncio.wait({task})

    @property
    def state(self) -> RedisState:
        """Whether decisions can be had."""
        return self._state

    def report(self) -> Mapping[str, object]:
        """Tell the state, for readiness: since how many seconds, and what a request gets while Redis is away."""
        since_s = round(time.monotonic() - self._changed_s, 1)
        return {"state": self._state, "since_s": since_s, "on_redis_down": self.on_redis_down}

    @property
    def serves_unmetered(self) -> bool:
        """Whether requests are to be served from hardware, and from nothing else, without credits."""
        return self.on_redis_down == "hardware" and self._state == "away"

    async def serves_this_unmetered(self) -> bool:
        """Tell the same for a request that ended in LimiterUnavailable, after a look at Redis if that is not clear.

        Where only this one request got no answer, it is false: nobody is served for nothing while others pay.
        """
        if self.on_redis_down == "hardware" and self._state == "ok":
            if self._looking is None or self._looking.done():
                self._looking = asyncio.create_task(self._look(), name="look at Redis")
            await asyncio.shield(self._looking)
        return self.serves_unmetered

    async def watch(self, call: Callable[[], Awaitable[T]]) -> T:
        """Run a call to Redis, and note its failure. Raises RedisUnavailable at once, without a call, while it is.

        An answer proves nothing, as a server that takes no writes may give one, too: `answered` says that one does.
        """
        self.check()
        return await self._watched(call)

    def answered(self, took_s: float | None = None) -> None:
        """Note that Redis decided a reserve, so that it is available. took_s: how long that took, if it is to count."""
        self._note_answer()
        if took_s is not None and self._timed is not None:
            self._timed(took_s)

    def check(self) -> None:
        """Raise RedisUnavailable while away: what is to ask Redis anyway need not begin."""
        if self._state == "away":
            raise RedisUnavailable

    async def back(self) -> None:
        """Wait until Redis is not away."""
        await self._back.wait()

    async def _watched(self, operation: Callable[[], Awaitable[T]]) -> T:
        began_s = time.monotonic()
        try:
            return await operation()
        except Overloaded:
            raise  # it is this process that has too much to do
        except LimiterUnavailable as error:
            self._note_failure(began_s, error)
            raise

    def _note_answer(self) -> None:
        self._answered_s = time.monotonic()
        if self._state == "away":
            self._change("ok")
            self._back.set()
            _LOG.warning("Redis is available again", extra=event("redis_available"))

    def _note_failure(self, began_s: float, error: LimiterUnavailable) -> None:
        """Believe a failure only if nobody got an answer since the failed call began: else it is late, or alone."""
        if self._state == "ok" and self._answered_s < began_s:
            self._change("away")
            self._back.clear()
            served = "serving unmetered from hardware" if self.on_redis_down == "hardware" else "refusing requests"
            _LOG.error(
                "Redis is unavailable: %s until it is available again (%s)",
                served,
                error,
                extra=event("redis_unavailable"),
            )
            self._went.set()

    def _change(self, state: RedisState) -> None:
        self._state, self._changed_s = state, time.monotonic()

    async def _probe_for_ever(self) -> None:
        backoff = Backoff(first_s=0.1, max_s=1.0)
        while not self._stopping:
            if self._state == "ok":
                backoff.reset()
                await self._idle()
            else:
                await asyncio.sleep(backoff.next_s())
            await self._look()

    async def _look(self) -> None:
        try:
            await self._probe()
        except LimiterUnavailable:
            return
        except LimiterError:
            self._note_answer()  # a fault, but not one of Redis being away: requests tell of it
        except Exception:  # noqa: BLE001  a fault of ours must not end the probe, and the way back with it
            _LOG.exception("An error of this program ended a probe of Redis", extra=event("redis_probe_failed"))
        else:
            self._note_answer()

    async def _idle(self) -> None:
        """Wait until Redis went away, or no decision has been made for a while."""
        self._went.clear()
        while (quiet_s := time.monotonic() - self._answered_s) < _IDLE_S and self._state == "ok":
            try:
                async with asyncio.timeout(_IDLE_S - quiet_s):
                    await self._went.wait()
            except TimeoutError:
                continue

    async def _probe(self) -> None:
        """Run the very script of a decision, on a row that is not there and is not made.

        A balance would do for a server that is gone, but a replica and a server out of memory answer one.
        """
        await self._watched(
            lambda: self._limiter.reserve(_PROBED, tier=CORE, has_hardware=True, hold_id=_PROBED, may_create=False)
        )


class WatchedLimiter:
    """A limiter as requests use it: its calls show whether Redis is available, and fail at once while it is not.

    session: for other calls of requests, which are watched, too. The probe and settlements use the limiter itself: they
    go on while Redis is unavailable.
    """

    __slots__ = ("_availability", "_limiter", "session")

    def __init__(self, limiter: CreditLimiter, availability: RedisAvailability) -> None:
        self._limiter, self._availability = limiter, availability
        self.session = limiter.session.guarded(availability.watch)

    async def reserve(
        self,
        install_id: str,
        *,
        tier: str,
        has_hardware: bool,
        cost: int = 1,
        hold_id: str | None = None,
        may_create: bool = True,
    ) -> Decision:
        """Reserve, as `CreditLimiter.reserve`. Raises what it raises.

        After LimiterUnavailable something may be held, but not after RedisUnavailable.
        """
        began_s = time.monotonic()
        try:
            decision = await self._availability.watch(
                lambda: self._limiter.reserve(
                    install_id,
                    tier=tier,
                    has_hardware=has_hardware,
                    cost=cost,
                    hold_id=hold_id,
                    may_create=may_create,
                )
            )
        except (BrokenRow, ScriptContractError):
            self._availability.answered()
            raise
        if not decision.from_memory:  # which says nothing about Redis
            self._availability.answered(time.monotonic() - began_s)
        return decision

    async def balance(self, install_id: str, *, tier: str) -> Balance:
        """Return a balance, as `CreditLimiter.balance`. Raises what it raises."""
        return await self._availability.watch(lambda: self._limiter.balance(install_id, tier=tier))
