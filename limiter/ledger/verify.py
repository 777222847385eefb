"""Whether a credits.json is whole: its checksum, its count, and each row. It reads the file, and never Redis.

A file that limiter wrote is recognised by its first line, by its last one or by the checksum in its meta: if one of
them is damaged, the others still show it.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from limiter.errors import LedgerFileError
from limiter.ledger.file import LedgerFile
from limiter.ledger.trailer import Trailer, check_trailer, has_header

_FAULTS_KEPT = 20


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The result of verifying a file. It `is_good` if there is no fault.

    Args:
        path: of the file.
        size_bytes: its size.
        trailer: its last line; None in a file that limiter did not write, which has no checksum either.
        rows: how many are valid.
        faults: the first of them.
        fault_count: how many there are.
    """

    path: Path
    size_bytes: int
    trailer: Trailer | None
    rows: int
    faults: tuple[str, ...]
    fault_count: int

    @property
    def is_good(self) -> bool:
        """Whether all of it can be restored, as it was written."""
        return not self.fault_count


def verify(path: Path) -> VerifyReport:
    """Read a file twice, for its checksum and for its rows, and report what is wrong with it. It blocks.

    Raises LedgerFileError if it cannot be read at all.
    """
    with LedgerFile(path) as file:
        faults = _Faults()
        trailer = _check_trailer(path, faults)
        rows = _check_rows(file, faults)
        if trailer is None and not faults.count and file.has_checksum:
            faults.note("its checksum is not that of the file: it was rewritten after limiter wrote it")
        if rows is not None and trailer is not None and trailer.rows != rows:
            faults.note(f"it has {rows} rows, and its last line says {trailer.rows}")
        return VerifyReport(path, file.size_bytes, trailer, rows or 0, tuple(faults.first), faults.count)


class _Faults:
    """The faults that were found: how many, and the first of them."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[str] = []

    def note(self, fault: str) -> None:
        self.count += 1
        if len(self.first) < _FAULTS_KEPT:
            self.first.append(fault)


def _check_trailer(path: Path, faults: _Faults) -> Trailer | None:
    try:
        dumped = check_trailer(path)
        is_ours = dumped.trailer is not None or has_header(path)
    except OSError as error:
        raise LedgerFileError(f"{path} cannot be read: {error.strerror}") from error
    if is_ours and not dumped.is_intact:
        faults.note(
            "the checksum is not that of the file" if dumped.trailer else "its last line is not one of limiter's"
        )
    return dumped.trailer


def _check_rows(file: LedgerFile, faults: _Faults) -> int | None:
    """Count the valid rows; None when the file cannot be read to its end."""
    rows = 0
    try:
        for _, row in file.rows(now_ms=time.time_ns() // 1_000_000):
            if isinstance(row, LedgerFileError):
                faults.note(str(row))
            else:
                rows += 1
    except LedgerFileError as error:
        faults.note(str(error))
        return None
    return rows
