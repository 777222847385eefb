"""One import at a time: a lease of its own in Redis, beside that of the persisters. A second one waits for the first.

It is for order, not for safety: each row is stored whole, whoever else stores rows.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from limiter.cancelling import CancelWatch
from limiter.credit_limiter import CreditLimiter
from limiter.errors import LedgerFileError, LimiterUnavailable
from limiter.lease import Lease

LEASE_S = 10.0
_ASK_S = 0.25
_LOG = logging.getLogger("limiter")


@asynccontextmanager
async def one_import(limiter: CreditLimiter, *, lease_s: float = LEASE_S) -> AsyncIterator[Callable[[], None]]:
    """Wait until no other import runs, and keep others waiting until the block ends.

    Gives a check that raises LedgerFileError once another import has the lease, as after a pause of this process.
    Raises LimiterUnavailable.
    """
    lease = Lease(limiter, lease_s=lease_s, key=limiter.keys.import_lease())
    cancel = CancelWatch()
    leased = await lease.take()
    if not leased.is_mine:
        _LOG.warning("another import runs (%s): waiting for its end; %g s if it was killed", leased.owner, lease_s)
    while not leased.is_mine:
        await asyncio.sleep(_ASK_S)
        cancel.check()
        leased = await lease.take()
    keeper = _Keeper(lease)
    keeping = asyncio.create_task(keeper.keep())
    try:
        yield keeper.check
    finally:
        keeping.cancel()
        await asyncio.wait({keeping})
        with suppress(LimiterUnavailable):  # it lapses
            await lease.give_back()


class _Keeper:
    """Keeps a lease, and notes when it went to another."""

    def __init__(self, lease: Lease) -> None:
        self._lease, self._taken_by = lease, ""

    def check(self) -> None:
        if self._taken_by:
            raise LedgerFileError(f"another import began ({self._taken_by}), for this one was silent too long")

    async def keep(self) -> None:
        cancel = CancelWatch()
        while not self._taken_by:
            await asyncio.sleep(self._lease.lease_s / 4)
            cancel.check()
            with suppress(LimiterUnavailable):  # the import's own calls tell that
                leased = await self._lease.take()
                self._taken_by = "" if leased.is_mine else leased.owner
