"""Ledger files and rows for the tests: written as a dump writes them, read as an import reads them."""

from collections.abc import AsyncIterable, Iterable
from pathlib import Path
from typing import Any

import pytest

from limiter._util.timestamps import iso_from_ms, ms_from_iso
from limiter.credits.models import Row
from limiter.errors import LedgerFileError
from limiter.ledger.file import LedgerFile
from limiter.ledger.row_codec import line_from_row, row_from_member
from limiter.ledger.trailer import DumpedFile
from limiter.ledger.writer import LedgerWriter

NOW = "2026-05-11T23:02:57.123Z"
NOW_MS = ms_from_iso(NOW)
PERIOD = {"last_renewal_at": "2026-05-04T21:24:54.719Z"}


def row(install_id: str = "a", **fields: Any) -> Row:
    """Return the row that a member with these fields, and a period that has begun, is read as."""
    return row_from_member(install_id, PERIOD | fields, now_ms=NOW_MS)


def read(path: Path) -> dict[str, Row | LedgerFileError]:
    with LedgerFile(path) as file:
        return dict(file.rows(now_ms=NOW_MS))


def cause_of(path: Path, content: str | bytes) -> str:
    """Write the file, and return why it cannot be read."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(LedgerFileError) as caught:
        read(path)
    return str(caught.value).removeprefix(f"{path} ")


def files(folder: Path) -> list[str]:
    """Return the names of all files in the folder, in order."""
    return sorted(path.name for path in folder.iterdir())


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
