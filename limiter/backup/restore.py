"""What a restore needs beside the import: the newest file that is good, and that no persister writes meanwhile.

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
_ASK_S = 0.5


def newest_good(path: Path, *, passed_over: Callable[[VerifyReport], None]) -> VerifyReport:
    """Verify the file and those that it replaced, the latest first, until one is good. It blocks.

    passed_over: called with the report of each that is not. Raises LedgerFileError when there is no good one.
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
        passed_over(report)
    raise LedgerFileError(
        f"there is no good file at {path}, nor a replaced one beside it: name one, as in limiter restore FILE"
    )


@asynccontextmanager
async def exclusive(session: Session, *, lease_s: float, checksum: str) -> AsyncIterator[None]:
    """Keep persisters from writing until the block ends. Raises LedgerFileError while one is at work.

    checksum: of the file that is restored; after the block persisters know it as the fleet's own.
    """
    lease = Lease(session, lease_s=lease_s)
    await _take(lease)
    try:
        async with lease.kept(renew_every_s=lease_s / 3):  # without `since`: what else has it meanwhile ends by itself
            yield
            await lease.take(checksum=checksum)
    finally:
        await lease.give_back()


async def has_rows(session: Session) -> bool:
    """Return whether Redis has any row. Raises LimiterUnavailable."""
    async for names in scan_keys(session):
        if names:
            return True
    return False


async def _take(lease: Lease) -> None:
    """Take the lease. That of a persister which was killed expires; one that is renewed has a persister at work."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + lease.lease_s + _ASK_S
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
        await asyncio.sleep(_ASK_S)
        leased = await lease.take()
