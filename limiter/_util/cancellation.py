"""Work that must complete although its caller is cancelled, and detection of lost cancellations."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class CancelWatch:
    """Detects a cancellation of the current task that was lost since the watch was made.

    Before Python 3.12, asyncio.wait_for, through which redis-py 8 writes to its socket, drops a cancellation that
    arrives just as the awaited operation completes (python/cpython#86296).
    """

    __slots__ = ("_before", "_task")

    def __init__(self) -> None:
        self._task = asyncio.current_task()
        self._before = self._task.cancelling() if self._task else 0

    def check(self) -> None:
        """Raise the CancelledError that was lost, if there is one."""
        if self._task is not None and self._task.cancelling() > self._before:
            raise asyncio.CancelledError


async def run_to_completion(work: Coroutine[Any, Any, T], *, if_it_fails: str) -> T:
    """Await work to its end, however often the caller is cancelled; a cancellation is delivered afterwards.

    if_it_fails: the beginning of the note that such a cancellation gets about an error that it hides.
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
