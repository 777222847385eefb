"""Calls to Redis in tasks that the app owns, so that neither clients that leave nor an outage prevents them."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

from limiter._util.backoff import Backoff
from limiter.errors import LimiterError, LimiterUnavailable
from limiter.log_events import event
from limiter.relay.metering.availability import RedisAvailability
from limiter.relay.telemetry.metrics import FAILED, GAVE_UP

_LOG = logging.getLogger("limiter.relay")
_MIN_DRAIN_S = 2.0  # a drain_s of 0 must not lose the commits of served requests


class BackgroundRetries:
    """Calls that are retried while Redis is unavailable. Call `drain` before the connection closes.

    give_up_s: the seconds after which a call is given up, as its hold has expired by then.
    """

    def __init__(self, availability: RedisAvailability, *, give_up_s: float) -> None:
        self._availability, self._give_up_s = availability, give_up_s
        self._tasks: set[asyncio.Task[None]] = set()

    def start(
        self,
        what: str,
        request_id: str,
        call: Callable[[], Awaitable[object]],
        *,
        on_end: Callable[[object], None] | None = None,
    ) -> None:
        """Make a call in the background.

        Args:
            what: the name of the call in the log.
            request_id: that of the request that it belongs to.
            call: one attempt, which can be retried after LimiterUnavailable.
            on_end: called with what the call returned, or with FAILED or GAVE_UP.
        """
        running = self._run(what, request_id, call, on_end)
        task = asyncio.get_running_loop().create_task(running, name=what)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def under_way(self) -> int:
        """Return the number of calls under way."""
        return len(self._tasks)

    async def drain(self, within_s: float) -> None:
        """Wait for the calls under way, and give up and log those that remain: their holds expire by themselves."""
        if self._tasks:
            _, left = await asyncio.wait(self._tasks, timeout=max(within_s, _MIN_DRAIN_S))
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def _run(
        self,
        what: str,
        request_id: str,
        call: Callable[[], Awaitable[object]],
        on_end: Callable[[object], None] | None,
    ) -> None:
        outcome: object = FAILED
        ends_s = time.monotonic() + self._give_up_s
        try:
            try:
                outcome = await call()
            except LimiterUnavailable:
                outcome = await self._retry(call, ends_s)
        except LimiterUnavailable as error:
            _LOG.error(
                "The %s did not succeed before the hold expired: %s",
                what,
                error,
                extra=event("settlement_expired", request_id=request_id),
            )
            outcome = GAVE_UP
        except LimiterError:
            _LOG.exception("The %s failed", what, extra=event("settlement_failed", request_id=request_id))
        except asyncio.CancelledError:
            _LOG.error(
                "The %s was given up at shutdown", what, extra=event("settlement_interrupted", request_id=request_id)
            )
            outcome = GAVE_UP
        finally:
            if on_end is not None:
                on_end(outcome)

    async def _retry(self, call: Callable[[], Awaitable[object]], ends_s: float) -> object:
        """Repeat a call that has failed once."""
        backoff = Backoff(first_s=0.05, max_s=2.0)
        while True:
            if self._availability.state != "away":
                await asyncio.sleep(backoff.next_s())
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0, ends_s - time.monotonic())):
                    await self._availability.wait_until_available()
            try:
                return await call()
            except LimiterUnavailable:
                if time.monotonic() > ends_s:
                    raise
