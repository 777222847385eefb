"""Clients that spend on many installs at once while servers change under them, and remember what they were told.

Afterwards the ledger is held against that: what was committed for certain must be in the rows, and nothing else.
"""

import asyncio
import logging
import os
import random
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Self, TypeVar

from redis.asyncio import Redis
from redis.exceptions import RedisError

from limiter import CreditLimiter, LimiterUnavailable, SettlementStatus
from tests.support.wait import eventually

T = TypeVar("T")
RUNS = range(int(os.environ.get("LIMITER_TEST_RUNS", "1")))  # of each run in which servers fail or slots move
_LOG = logging.getLogger("limiter.tests")
_PATIENCE_S = 60.0


class Spending:
    """Use it as `async with Spending(…) as spending:`; at the end of the block each client ends its last request."""

    def __init__(self, limiter: CreditLimiter, installs: Collection[str], *, clients: int = 24) -> None:
        self.committed: Counter[str] = Counter()  # told COMMITTED
        self.unsure: Counter[str] = Counter()  # told GONE after an answer was lost: debited before, or the hold is lost
        self._limiter, self._installs, self._clients = limiter, list(installs), clients
        self._tasks: list[asyncio.Task[None]] = []
        self._stopped = False
        self._watched: Collection[str] = ()
        self._last_commit_at = 0.0
        self._longest_gap_s = 0.0

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._spend()) for _ in range(self._clients)]
        await self.more(10 * self._clients)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped = True
        results = await asyncio.gather(*self._tasks, return_exceptions=error is not None)
        assert error is not None or not any(results)

    async def more(self, commits: int, *, of: Collection[str] | None = None) -> None:
        """Wait for so many more commits, of some installs or of all."""
        wanted = self.total(of) + commits

        async def are_there() -> bool:
            for task in self._tasks:
                if task.done():
                    task.result()
            return self.total(of) >= wanted

        await eventually(are_there, within_s=_PATIENCE_S, what=f"{commits} more commits")

    def total(self, of: Collection[str] | None = None) -> int:
        return sum(count for install, count in self.committed.items() if of is None or install in of)

    @asynccontextmanager
    async def recovery(self, what: str, *, of: Collection[str]) -> AsyncIterator[None]:
        """Break these installs' server in the block, and wait until they are served again; log how long they were not.

        The block ends when the server can serve nothing any more.
        """
        self._watched, self._last_commit_at, self._longest_gap_s = set(of), time.monotonic(), 0.0
        yield
        await self.more(5 * self._clients, of=self._watched)
        _LOG.info("%s: no commit for %.2f s", what, self._longest_gap_s)

    async def consumed(self) -> "Counter[str]":
        """Give what the rows say was consumed."""
        rows = {install: await self._limiter.row(install) for install in self._installs}
        return Counter({install: row.monthly_consumed for install, row in rows.items() if row is not None})

    async def _spend(self) -> None:
        while not self._stopped:
            install, hold_id = random.choice(self._installs), uuid.uuid4().hex
            decision = await self._insist(
                lambda: self._limiter.reserve(install, tier="max", has_hardware=True, hold_id=hold_id)  # noqa: B023
            )
            assert decision.allowed, decision
            settlement = await self._insist(lambda: self._limiter.commit(install, hold_id))  # noqa: B023
            if settlement.status is SettlementStatus.GONE:
                self.unsure[install] += 1
                continue
            self.committed[install] += settlement.cost
            if install in self._watched:
                now = time.monotonic()
                self._longest_gap_s = max(self._longest_gap_s, now - self._last_commit_at)
                self._last_commit_at = now

    async def _insist(self, attempt: Callable[[], Awaitable[T]]) -> T:
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                return await attempt()
            except LimiterUnavailable:
                if time.monotonic() > deadline:
                    raise


class Checkpoints:
    """What was committed before a moment at which the replicas had all that their primary had done. node: a client."""

    def __init__(self, node: "Redis", spending: Spending, *, replicas: int, key: str = "checkpoint") -> None:
        self.safe: Counter[str] = Counter()
        self._node, self._spending, self._replicas, self._key = node, spending, replicas, key
        self._ends = False
        self._task = asyncio.create_task(self._run())

    async def reached(self) -> None:
        """Wait until there is something to lose."""

        async def is_reached() -> bool:
            return self.safe.total() > 0

        await eventually(is_reached, within_s=_PATIENCE_S, what="a replica's having all that was committed")

    async def end(self) -> None:
        """Wait for the end: the next failure to ask the primary."""
        self._ends = True
        await self._task

    async def _run(self) -> None:
        while True:
            told_so_far = self._spending.committed.copy()
            try:
                await self._node.set(self._key, 1, px=60_000)
                if await self._node.wait(self._replicas, 500) == self._replicas:
                    self.safe = told_so_far
            except (RedisError, OSError):
                if self._ends:
                    return


def check(rows: "Counter[str]", spending: Spending, *, safe: "Counter[str]") -> None:
    """Hold the rows against what the clients were told. safe: what had been committed and replicated."""
    told = spending.committed
    _LOG.info("rows %d, told %d, unsure %d", rows.total(), told.total(), spending.unsure.total())
    for install in set(rows) | set(told) | set(safe):
        assert rows[install] >= safe[install], f"{install}: a commit that was replicated is lost"
        assert rows[install] <= told[install] + spending.unsure[install], f"{install}: something was debited twice"
