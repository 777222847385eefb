"""Work that a cancelled caller must not break off, and cancellations that get lost. It knows nothing of credits."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class CancelWatch:
    """Finds a cancellation of this task that was lost since.

    asyncio.wait_for, through which redis-py 8 writes to its socket, drops before Python 3.12 a cancellation that comes
    as what it waits for ends (python/cpython#86296), and the caller would never hear of it.
    """

    __slots__ = ("_before", "_task")

    def __init__(self) -> None:
        self._task = asyncio.current_task()
        self._before = self._task.cancelling() if self._task else 0

    def check(self) -> None:
        """Raise the CancelledError that was lost."""
        if self._task is not None and self._task.cancelling() > self._before:
            raise asyncio.CancelledError


async def run_to_completion(work: Coroutine[Any, Any, T], *, if_it_fails: str) -> T:
    """Await work to its end, however often the caller is cancelled meanwhile; that is delivered afterwards.

    if_it_fails: what a cancellation then notes beside the failure that it hides.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        if failure := task.exception():
            cancelled.add_note(f"{if_it_fails}: {failure}")
        raise cancelled
    return task.result()
