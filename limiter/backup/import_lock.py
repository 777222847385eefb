"""One import at a time: a lease of its own in Redis, beside that of the persisters. A second one waits for the first.

It is for order, not for safety: each row is stored whole, whoever else stores rows.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

from limiter._util.cancellation import CancelWatch
from limiter.backup.lease import Lease
from limiter.credits.session import Session
from limiter.errors import LedgerFileError, LimiterUnavailable

StillOurs = Callable[[], Awaitable[None]]
LEASE_S = 10.0
_ASK_S = 0.25
_LOG = logging.getLogger("limiter")


@asynccontextmanager
async def exclusive_import(session: Session, *, lease_s: float = LEASE_S) -> AsyncIterator[StillOurs]:
    """Wait until no other import runs, and keep others waiting until the block ends.

    Gives a check, for right before each writing, that raises LedgerFileError once another import had the lease, be it
    over by then, as after a pause of this process. Both raise LimiterUnavailable.
    """
    lease = Lease(session, lease_s=lease_s, key=session.keys.import_lease())
    cancel = CancelWatch()
    leased = await lease.take()
    if not leased.is_mine:
        _LOG.warning("another import runs (%s): waiting for its end; %g s if it was killed", leased.owner, lease_s)
    while not leased.is_mine:
        await asyncio.sleep(_ASK_S)
        cancel.check()
        leased = await lease.take()
    keeper = _Keeper(lease, leased.epoch)
    keeping = asyncio.create_task(keeper.keep())
    try:
        yield keeper.check
    finally:
        keeping.cancel()
        await asyncio.wait({keeping})
        with suppress(LimiterUnavailable):  # it lapses
            await lease.give_back()


class _Keeper:
    """Keeps a lease of one epoch, and notes when another import had it."""

    def __init__(self, lease: Lease, epoch: int) -> None:
        self._lease, self._epoch = lease, epoch
        self._kept_s = time.monotonic()
        self._lost_to = ""

    async def check(self) -> None:
        # It was to be kept before that: this process stood still.
        if time.monotonic() - self._kept_s > self._lease.lease_s / 2:
            await self._keep_once()
        if self._lost_to:
            raise LedgerFileError(f"another import began ({self._lost_to}), for this one was silent too long")

    async def keep(self) -> None:
        cancel = CancelWatch()
        while not self._lost_to:
            await asyncio.sleep(self._lease.lease_s / 4)
            cancel.check()
            with suppress(LimiterUnavailable):  # the import's own calls tell that
                await self._keep_once()

    async def _keep_once(self) -> None:
        asked_s = time.monotonic()
        leased = await self._lease.take()
        self._kept_s = asked_s
        if not leased.is_mine:
            self._lost_to = leased.owner
        elif leased.epoch != self._epoch:
            self._lost_to = "it is over"
