"""One query to several servers at once, so that one that hangs delays no caller."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from typing import Any, Generic, TypeVar

from redis.exceptions import RedisError

from limiter.redis.url import Address

T = TypeVar("T")
FAILURES = (RedisError, OSError, TimeoutError)


class FanOut(Generic[T]):
    """One query. query: sends it to the server at an address; it must end in time, and may raise redis-py's errors."""

    def __init__(self, query: Callable[[Address], Coroutine[Any, Any, T]]) -> None:
        self._query = query
        self._running: dict[Address, asyncio.Task[T]] = {}

    async def answers(self, addresses: Iterable[Address]) -> AsyncIterator[T | BaseException]:
        """Yield the answers as they arrive; a server without one yields its error.

        A caller may stop early: the other queries end by themselves. A server gets no query while an answer is due.
        """
        waiting = {self._task(address) for address in addresses}
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                failure = task.exception()
                if failure is not None and not isinstance(failure, FAILURES):
                    raise failure
                yield task.result() if failure is None else failure

    async def aclose(self) -> None:
        """Wait for the answers that are still due."""
        await asyncio.gather(*self._running.values(), return_exceptions=True)

    def _task(self, address: Address) -> "asyncio.Task[T]":
        if address not in self._running:
            task = asyncio.create_task(self._query(address))
            self._running[address] = task
            task.add_done_callback(lambda done: self._forget(address, done))
        return self._running[address]

    def _forget(self, address: Address, done: "asyncio.Task[T]") -> None:
        del self._running[address]
        if not done.cancelled():
            done.exception()  # retrieved, even if no caller awaits it any more
