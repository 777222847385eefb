"""Ledger files for the tests, written as a dump writes them."""

from collections.abc import AsyncIterable, Iterable
from pathlib import Path

from limiter._util.timestamps import iso_from_ms
from limiter.credits.models import Row
from limiter.ledger.row_codec import line_from_row
from limiter.ledger.trailer import DumpedFile
from limiter.ledger.writer import LedgerWriter


async def write_ledger(
    path: Path, rows: AsyncIterable[Row] | Iterable[Row], *, now_ms: int, epoch: int = 0, sequence: int = 1
) -> DumpedFile:
    """Write the rows to a credits.json, which replaces the one there."""
    with LedgerWriter(path) as file:
        if isinstance(rows, AsyncIterable):
            async for row in rows:
                await file.add([line_from_row(row)])
        else:
            for row in rows:
                await file.add([line_from_row(row)])
        digest = await file.rows_digest()
        await file.write_trailer(epoch=epoch, sequence=sequence, time=iso_from_ms(now_ms), broken=0)
        return await file.publish(digest, keep_as=None)
