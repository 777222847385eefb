"""A hold as a context manager: its credits are reserved before the block, and committed or released after it.

It settles the hold however the block ends, cancellation included. The calls themselves are passed in.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from limiter._util.cancellation import run_to_completion
from limiter.credits.models import Backend, Decision, Settlement, SettlementStatus
from limiter.errors import Execution, LimiterError, LimiterUnavailable

Release = Callable[[], Coroutine[Any, Any, SettlementStatus]]
_UNSETTLED = "The hold was not settled and will expire by itself"


class Hold:
    """A hold inside its `async with` block."""

    __slots__ = ("decision", "used_backend", "used_cost")

    def __init__(self, decision: Decision) -> None:
        self.decision = decision
        self.used_backend: Backend | None = None
        self.used_cost: int | None = None

    @property
    def allowed(self) -> bool:
        """Whether the request may be served."""
        return self.decision.allowed

    @property
    def backend(self) -> Backend | None:
        """The planned backend; None when refused."""
        return self.decision.backend

    def charge(self, *, backend: Backend | None = None, cost: int | None = None) -> None:
        """Set what was really used, for the commit at the end of the block."""
        self.used_backend, self.used_cost = backend, cost


@asynccontextmanager
async def hold_context(
    reserve: Callable[[], Coroutine[Any, Any, Decision]],
    commit: Callable[[Hold], Coroutine[Any, Any, Settlement]],
    release: Release,
) -> AsyncIterator[Hold]:
    """Reserve, then commit at the end of the block, or release if it raises."""
    reserving = asyncio.ensure_future(reserve())
    try:
        decision = await asyncio.shield(reserving)
    except (asyncio.CancelledError, LimiterUnavailable) as error:
        await _noting(error, run_to_completion(_undo(reserving, release), if_it_fails=_UNSETTLED))
        raise
    hold = Hold(decision)
    try:
        yield hold
    except BaseException as error:
        if decision.allowed:
            await _noting(error, run_to_completion(release(), if_it_fails=_UNSETTLED))
        raise
    if decision.allowed:
        await run_to_completion(commit(hold), if_it_fails=_UNSETTLED)


async def _undo(reserving: "asyncio.Future[Decision]", release: Release) -> None:
    """Release what is held, or may be held, by a reserve whose answer was not received."""
    await asyncio.wait({reserving})
    failure = reserving.exception()
    if failure is None or (isinstance(failure, LimiterUnavailable) and failure.execution is Execution.UNKNOWN):
        await release()


async def _noting(reason: BaseException, release: Awaitable[SettlementStatus | None]) -> None:
    """Await a release; if it fails, note that on the error that caused it, and do not hide that error."""
    try:
        await release
    except LimiterError as unsettled:
        reason.add_note(f"The hold was not released and will expire by itself: {unsettled}")
