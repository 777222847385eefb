"""One import at a time: a lease of its own in Redis, beside that of the persisters. A second one waits for the first.

It is for order, not for safety: each row is stored atomically, whatever else stores rows.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

from limiter._util.cancellation import CancelWatch
from limiter.backup.lease import Lease, LeaseLost
from limiter.credits.session import Session
from limiter.errors import LedgerFileError, LimiterUnavailable
from limiter.log_events import event

StillOurs = Callable[[], Awaitable[None]]
LEASE_S = 10.0
_POLL_S = 0.25
_LOG = logging.getLogger("limiter")


@asynccontextmanager
async def exclusive_import(session: Session, *, lease_s: float = LEASE_S) -> AsyncIterator[StillOurs]:
    """Wait until no other import runs, and make others wait until the block ends.

    Yields a check to call right before each write. It raises LedgerFileError if another import has had the lease, even
    one that has ended, as after a pause of this process. Both raise LimiterUnavailable.
    """
    lease = Lease(session, lease_s=lease_s, key=session.keys.import_lease())
    cancel = CancelWatch()
    leased = await lease.take()
    if not leased.is_mine:
        _LOG.warning(
            "another import runs (%s): waiting for its end; %g s if it was killed",
            leased.owner,
            lease_s,
            extra=event("import_waiting"),
        )
    while not leased.is_mine:
        await asyncio.sleep(_POLL_S)
        cancel.check()
        leased = await lease.take()
    try:
        # The keeper ignores an outage: the import's own calls fail in it.
        async with lease.kept(renew_every_s=lease_s / 4, since=leased) as keeper:

            async def check() -> None:
                try:
                    await keeper.check()
                except LeaseLost as lost:
                    raise LedgerFileError(
                        f"another import began ({lost.owner or 'it has ended'}), as this one's lease had expired"
                    ) from None

            yield check
    finally:
        with suppress(LimiterUnavailable):  # it expires
            await lease.release()
