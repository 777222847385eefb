"""One Redis as everything here uses it: its connection, keys, clock, timeouts and retries.

`CreditLimiter` runs its operations on a session, and so do seats, claims, leases, imports and dumps: all of them share
one key prefix, one clock and one rule about retries.
"""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol, TypeVar

from redis.asyncio import Redis

from limiter.credits.keys import Keys
from limiter.credits.retry import retry
from limiter.credits.scripts import Scripts
from limiter.redis.errors import with_timeout
from limiter.redis.multiplexed import CommandChannel

T = TypeVar("T")


class Guard(Protocol):
    """Runs a call to Redis, or raises LimiterUnavailable at once while Redis is known to be unavailable."""

    def __call__(self, call: Callable[[], Awaitable[T]], /) -> Awaitable[T]:
        """Run the call. Raises what it raises."""
        ...


class Session:
    """A connected Redis with a key prefix, a clock and time limits.

    Args:
        redis: from `connect`.
        prefix: of every key.
        clock: `() -> epoch ms`, for tests; without one, scripts use the server's time.
        timeout_ms: bounds one attempt.
        deadline_ms: bounds a call with its retries.
        guard: runs each call, and may refuse to.
    """

    def __init__(
        self,
        redis: "Redis",
        *,
        prefix: str = "credits",
        clock: Callable[[], int] | None = None,
        timeout_ms: int = 1000,
        deadline_ms: int = 3000,
        guard: Guard | None = None,
    ) -> None:
        self.redis = redis
        self.channel = _channel_of(redis)
        self.keys = Keys(prefix)
        self.clock = clock
        self.timeout_ms = min(timeout_ms, deadline_ms)
        self.deadline_s = deadline_ms / 1000
        self._guard = guard
        self._on_bulk_change: list[Callable[[], None]] = []

    def guarded(self, guard: Guard) -> "Session":
        """Return a session on the same connection whose calls go through a guard."""
        return Session(
            self.redis,
            prefix=self.keys.prefix,
            clock=self.clock,
            timeout_ms=self.timeout_ms,
            deadline_ms=round(self.deadline_s * 1000),
            guard=guard,
        )

    def scripts(self, *, timeout_ms: int | None = None) -> Scripts:
        """Return the scripts on this connection. timeout_ms: of one attempt; the session's own when left out."""
        return Scripts(self.channel, timeout_ms=timeout_ms or self.timeout_ms)

    def now_ms(self) -> int | None:
        """Return the injected clock's time for a script; None means the server's own."""
        return None if self.clock is None else self.clock()

    async def server_time_ms(self) -> int:
        """Return the time by which rows change: the injected clock's or else Redis', in epoch milliseconds.

        Raises LimiterUnavailable.
        """
        if self.clock is not None:
            return self.clock()
        seconds, microseconds = await self.command(self.redis.time(), "TIME")
        return int(seconds) * 1000 + int(microseconds) // 1000

    def retry(
        self, attempt: Callable[[], Awaitable[T]], *, when_unknown: bool = True, when_overloaded: bool = False
    ) -> Awaitable[T]:
        """Run an attempt and repeat it within the session's deadline, by `limiter.credits.retry.retry`."""
        retried = partial(
            retry, attempt, deadline_s=self.deadline_s, when_unknown=when_unknown, when_overloaded=when_overloaded
        )
        return retried() if self._guard is None else self._guard(retried)

    async def once(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Run an attempt that must not be repeated. Raises what it raises."""
        return await attempt() if self._guard is None else await self._guard(attempt)

    async def command(self, command: Awaitable[T], key: str) -> T:
        """Await one command of redis-py about a key, within the timeout. Raises LimiterUnavailable, BrokenRow.

        It is one attempt: run it by `retry` or `once`.
        """
        return await with_timeout(command, key, timeout_ms=self.timeout_ms)

    def on_bulk_change(self, listener: Callable[[], None]) -> None:
        """Call a listener whenever many rows were changed past the limiter, as by an import."""
        self._on_bulk_change.append(listener)

    def announce_bulk_change(self) -> None:
        """Call the listeners of `on_bulk_change`."""
        for listener in self._on_bulk_change:
            listener()


def _channel_of(redis: "Redis") -> CommandChannel:
    channel: CommandChannel | None = getattr(redis, "channel", None)
    if channel is None:
        raise TypeError(f"{redis!r} has no channel for scripts: pass what `limiter.connect` returned")
    return channel
