"""The availability of Redis as this node sees it, and how requests are served while it is unavailable.

It follows from real calls and from a probe that runs as long as the relay. Only changes are logged. A Redis that is out
of memory is available: it refuses what needs memory by itself, and settles what was begun, so every call is made. This
module knows nothing of credits, and settles nothing.
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
from limiter.errors import (
    BrokenRow,
    Execution,
    LimiterError,
    LimiterUnavailable,
    OutOfMemory,
    Overloaded,
    ScriptContractError,
)
from limiter.log_events import event

T = TypeVar("T")
RedisState = Literal["ok", "away", "out_of_memory"]
_LOG = logging.getLogger("limiter.relay")
_PROBED = "probe"  # an install id that no client can have, as it is not a UUID
_OUT_OF_MEMORY_S = 5.0  # it may refuse some calls and accept others while it is nearly full: that is one state
_IDLE_S = 5.0  # while Redis is available, it is probed only after so long without a decision


class RedisUnavailable(LimiterUnavailable):
    """Redis was unavailable already: nothing was sent, so nothing can be held."""

    def __init__(self) -> None:
        super().__init__("Redis is unavailable", execution=Execution.NOT_EXECUTED)


class RedisAvailability:
    """The state of Redis on this node. Use it as `async with RedisAvailability(…):`, which runs the probe.

    Args:
        limiter: makes the calls of the probe.
        on_redis_down: "deny" refuses requests while Redis is unavailable; "hardware", for relays that have hardware,
            serves them unmetered.
        timed: called with the duration of each answered reserve, in seconds.
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
        self._answered_s = self._changed_s = self._out_of_memory_s = time.monotonic()
        self._lost, self._available = asyncio.Event(), asyncio.Event()
        self._available.set()
        self._task: asyncio.Task[None] | None = None
        self._checking: asyncio.Task[bool] | None = None
        self._stopping = False

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._probe_for_ever(), name="probe of Redis")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping = True  # a cancellation can get lost in redis-py 8, see `cancellation.CancelWatch`
        for task in (self._task, self._checking):
            if task is not None:
                task.cancel()
                await asyncio.wait({task})

    @property
    def state(self) -> RedisState:
        """The state; "away" means unavailable. "out_of_memory" lasts until no call was refused for some seconds."""
        return self._state

    def report(self) -> Mapping[str, object]:
        """Return the state for /readyz: since how many seconds, and how requests are served while unavailable."""
        since_s = round(time.monotonic() - self._changed_s, 1)
        return {"state": self._state, "since_s": since_s, "on_redis_down": self.on_redis_down}

    @property
    def serves_unmetered(self) -> bool:
        """Whether requests are to be served from hardware only, without credits."""
        return self.on_redis_down == "hardware" and self._state == "away"

    async def serves_this_unmetered(self) -> bool:
        """Return the same for a request that ended in LimiterUnavailable, after a check of Redis if that is needed.

        If only this request got no reply, it is False: no install is served for free while others pay.
        """
        if self.on_redis_down == "hardware" and self._state == "ok":
            if self._checking is None or self._checking.done():
                self._checking = asyncio.create_task(self._check(), name="check of Redis")
            await asyncio.shield(self._checking)
        return self.serves_unmetered

    def watch(self, call: Callable[[], Awaitable[T]]) -> Awaitable[T]:
        """Make a call to Redis, and record its failure. Raises RedisUnavailable, without a call, while unavailable.

        A reply proves nothing, as a server that accepts no writes may send one: `answered` records one that does.
        """
        self.check()
        return self._watched(call)

    def answered(self, took_s: float | None = None) -> None:
        """Record that Redis decided a reserve, so that it is available. took_s: how long that took, for the metrics."""
        self._record_answer()
        if took_s is not None and self._timed is not None:
            self._timed(took_s)

    def check(self) -> None:
        """Raise RedisUnavailable while Redis is unavailable: a request that needs it need not begin."""
        if self._state == "away":
            raise RedisUnavailable

    async def wait_until_available(self) -> None:
        """Wait until Redis is available."""
        await self._available.wait()

    async def _watched(self, operation: Callable[[], Awaitable[T]]) -> T:
        began_s = time.monotonic()
        try:
            return await operation()
        except Overloaded:
            raise  # the bottleneck is this process, not Redis
        except OutOfMemory as error:
            self._record_out_of_memory(error)
            raise
        except LimiterUnavailable as error:
            self._record_failure(began_s, error)
            raise

    def _record_answer(self) -> None:
        self._answered_s = time.monotonic()
        if self._state == "away":
            self._change("ok")
            self._available.set()
            _LOG.warning("Redis is available again", extra=event("redis_available"))
        elif self._state == "out_of_memory" and self._answered_s > self._out_of_memory_s + _OUT_OF_MEMORY_S:
            self._change("ok")
            _LOG.warning("Redis has memory again", extra=event("redis_has_memory"))

    def _record_out_of_memory(self, error: OutOfMemory) -> None:
        self._answered_s = self._out_of_memory_s = time.monotonic()
        if self._state != "out_of_memory":
            self._change("out_of_memory")
            self._available.set()
            _LOG.error(
                "%s. Requests are refused until it has some again; commits and releases go on",
                error,
                extra=event("redis_out_of_memory"),
            )
            self._lost.set()

    def _record_failure(self, began_s: float, error: Exception) -> None:
        """Record a failure, unless another call was answered since the failed one began: then it is late, or alone."""
        if self._state != "away" and self._answered_s < began_s:
            self._change("away")
            self._available.clear()
            served = "serving unmetered from hardware" if self.on_redis_down == "hardware" else "refusing requests"
            _LOG.error(
                "Redis is unavailable: %s until it is available again (%s)",
                served,
                error,
                extra=event("redis_unavailable"),
            )
            self._lost.set()

    def _change(self, state: RedisState) -> None:
        self._state, self._changed_s = state, time.monotonic()

    async def _probe_for_ever(self) -> None:
        backoff = Backoff(first_s=0.1, max_s=1.0)
        answered = True
        while not self._stopping:
            if answered and self._state == "ok":
                backoff.reset()
                await self._idle()
            else:
                await asyncio.sleep(backoff.next_s())
            answered = await self._check()

    async def _check(self) -> bool:
        """Probe Redis, and return whether it answered."""
        began_s = time.monotonic()
        try:
            await self._probe()
        except LimiterUnavailable:
            return False
        except LimiterError:
            pass  # an error, but Redis is available: requests report the error
        except Exception as error:  # noqa: BLE001  a bug must not end the probe, and with it the recovery
            _LOG.exception("An error of this program ended a probe of Redis", extra=event("redis_probe_failed"))
            self._record_failure(began_s, error)
            return False
        self._record_answer()
        return True

    async def _idle(self) -> None:
        """Wait until Redis becomes unavailable, or no decision has been made for _IDLE_S."""
        self._lost.clear()
        while (quiet_s := time.monotonic() - self._answered_s) < _IDLE_S and self._state == "ok":
            try:
                async with asyncio.timeout(_IDLE_S - quiet_s):
                    await self._lost.wait()
            except TimeoutError:
                continue

    async def _probe(self) -> None:
        """Run the script of a decision, on a row that does not exist and is not created.

        A balance would not do: a replica, or a server that is out of memory, still replies to it.
        """
        await self._watched(
            lambda: self._limiter.reserve(_PROBED, tier=CORE, has_hardware=True, hold_id=_PROBED, may_create=False)
        )


class WatchedLimiter:
    """The limiter for requests: its calls show whether Redis is available, and fail at once while it is not.

    `session` is for other calls of requests, which are watched, too. The probe and settlements use the limiter itself,
    as they continue while Redis is unavailable.
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
        has_gemini: bool = True,
        cost: int = 1,
        hold_id: str | None = None,
        may_create: bool = True,
    ) -> Decision:
        """Reserve, like `CreditLimiter.reserve`, with the same errors.

        After LimiterUnavailable credits may be held, but not after RedisUnavailable.
        """
        began_s = time.monotonic()
        try:
            decision = await self._availability.watch(
                lambda: self._limiter.reserve(
                    install_id,
                    tier=tier,
                    has_hardware=has_hardware,
                    has_gemini=has_gemini,
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

    async def knows(self, install_id: str) -> bool:
        """Return whether an install has a row. Raises as `CreditLimiter.row`."""
        return await self._availability.watch(lambda: self._limiter.row(install_id)) is not None

    async def balance(self, install_id: str, *, tier: str) -> Balance:
        """Return a balance, like `CreditLimiter.balance`, with the same errors."""
        return await self._availability.watch(lambda: self._limiter.balance(install_id, tier=tier))
