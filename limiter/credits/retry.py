"""The one place that retries calls to Redis: within a deadline; after an unknown outcome, only where that is safe."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from limiter._util.backoff import Backoff
from limiter.errors import Execution, LimiterUnavailable, OutOfMemory, Overloaded

T = TypeVar("T")


async def retry(
    attempt: Callable[[], Awaitable[T]],
    *,
    deadline_s: float,
    when_unknown: bool = True,
    when_overloaded: bool = False,
) -> T:
    """Run an attempt, and again after LimiterUnavailable, until one succeeds or the deadline has passed.

    A Redis that is out of memory has answered, and is not asked again.

    Args:
        attempt: makes one attempt, and ends by itself within its timeout.
        deadline_s: seconds for all attempts and the pauses between them.
        when_unknown: whether to repeat an attempt that may have been executed.
        when_overloaded: whether to repeat it although too many calls wait already: for calls that end work that was
            begun.

    Raises what the last attempt raised; its `execution` is UNKNOWN when an earlier one may have been executed.
    """
    ends_s = time.monotonic() + deadline_s
    try:
        return await attempt()
    except LimiterUnavailable as error:
        failure = error
    unknown = failure.execution is Execution.UNKNOWN
    backoff = Backoff(first_s=0.01, max_s=0.25)
    while True:
        pause_s = backoff.next_s()
        refused = isinstance(failure, OutOfMemory) or (isinstance(failure, Overloaded) and not when_overloaded)
        if (unknown and not when_unknown) or refused or time.monotonic() + pause_s >= ends_s:
            failure.execution = Execution.UNKNOWN if unknown else Execution.NOT_EXECUTED
            raise failure
        await asyncio.sleep(pause_s)
        try:
            async with asyncio.timeout(ends_s - time.monotonic()):
                return await attempt()
        except TimeoutError:
            message = f"Redis did not answer in time: the outcome is unknown; before that: {failure}"
            raise LimiterUnavailable(message) from None
        except LimiterUnavailable as error:
            failure = error
            unknown = unknown or error.execution is Execution.UNKNOWN
