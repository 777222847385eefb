"""What a restore needs besides the import: the newest good file, and that no persister writes meanwhile.

A persister that dumped a half-restored Redis would put that file before the good ones.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from limiter.backup.lease import Lease
from limiter.credits.rows import scan_keys
from limiter.credits.session import Session
from limiter.errors import LedgerFileError
from limiter.ledger.rotation import generations
from limiter.ledger.verify import VerifyReport, verify
from limiter.log_events import event

_LOG = logging.getLogger("limiter")
_POLL_S = 0.5


def newest_good(path: Path, *, on_faulty: Callable[[VerifyReport], None]) -> VerifyReport:
    """Verify the file and those that it replaced, the latest first, until one is good. It blocks.

    on_faulty: called with the report of each that is not. Raises LedgerFileError if there is no good one.
    """
    try:
        listed = generations(path)
    except OSError as error:
        raise LedgerFileError(f"{path.parent} cannot be read: {error.strerror}") from error
    for each in listed:
        try:
            report = verify(each.path)
        except LedgerFileError as error:
            report = VerifyReport(each.path, 0, each.trailer, 0, (str(error),), 1)
        if report.is_good:
            return report
        on_faulty(report)
    raise LedgerFileError(
        f"there is no good file at {path}, nor a replaced one beside it: name one, as in limiter restore FILE"
    )


@asynccontextmanager
async def exclusive(session: Session, *, lease_s: float, checksum: str) -> AsyncIterator[None]:
    """Keep persisters from writing until the block ends. Raises LedgerFileError while one is running.

    checksum: of the file that is restored; after the block, persisters treat it as the fleet's own.
    """
    lease = Lease(session, lease_s=lease_s)
    await _take(lease)
    try:
        async with lease.kept(
            renew_every_s=lease_s / 3
        ):  # without `since`: another owner meanwhile would end by itself
            yield
            await lease.take(checksum=checksum)
    finally:
        await lease.release()


async def has_rows(session: Session) -> bool:
    """Return whether Redis has any row. Raises LimiterUnavailable."""
    async for names in scan_keys(session):
        if names:
            return True
    return False


async def _take(lease: Lease) -> None:
    """Take the lease. A killed persister's expires; if it does not, a persister is running."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + lease.lease_s + _POLL_S
    leased = await lease.take()
    if not leased.is_mine:
        _LOG.warning(
            "waiting up to %g s for the lease of the persister %s to expire",
            lease.lease_s,
            leased.owner,
            extra=event("restore_waiting"),
        )
    while not leased.is_mine:
        if loop.time() > deadline:
            raise LedgerFileError(
                f"nothing was restored: a persister is at work ({leased.owner}). Stop it and all relays first"
            )
        await asyncio.sleep(_POLL_S)
        leased = await lease.take()
