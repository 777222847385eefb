"""Waiting for something real to happen, in place of a sleep; it fails loudly when it does not happen."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable

PATIENCE_S = 30.0  # how long a busy machine may take for what takes milliseconds on a quiet one


def wait_until(predicate: Callable[[], object], *, within_s: float = PATIENCE_S, what: str = "it") -> float:
    """Wait until the predicate is true, and return how many seconds it took."""
    began_s = time.monotonic()
    while not predicate():
        assert time.monotonic() - began_s < within_s, f"{what} did not happen within {within_s} s"
        time.sleep(0.01)
    return time.monotonic() - began_s


async def eventually(
    predicate: Callable[[], object | Awaitable[object]], *, within_s: float = PATIENCE_S, what: str = "it"
) -> float:
    """Wait as `wait_until` does while the event loop goes on; the predicate's answer may have to be awaited."""
    began_s = time.monotonic()
    while True:
        answer = predicate()
        if await answer if inspect.isawaitable(answer) else answer:
            return time.monotonic() - began_s
        assert time.monotonic() - began_s < within_s, f"{what} did not happen within {within_s} s"
        await asyncio.sleep(0.005)
