"""Whether a credits.json is whole: its checksum, its count, and each row. It reads the file, and never Redis.

A file of limiter's is known by its first line, by its last and by the checksum in its meta: where one is spoilt, the
others give it away.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from limiter.errors import LedgerFileError
from limiter.ledger.file import LedgerFile
from limiter.ledger.trailer import Seal, begins_as_ours, check_seal

_FAULTS_KEPT = 20


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was found. It `is_good` when there is no fault.

    seal: what the last line says; None in a file that limiter did not write, which has no checksum either. rows: how
    many can be taken. faults: the first of `fault_count`.
    """

    path: Path
    size_bytes: int
    seal: Seal | None
    rows: int
    faults: tuple[str, ...]
    fault_count: int

    @property
    def is_good(self) -> bool:
        """Whether all of it can be restored, as it was written."""
        return not self.fault_count


def verify(path: Path) -> VerifyReport:
    """Read a file twice, for its checksum and for its rows, and tell what is wrong with it. It blocks.

    Raises LedgerFileError when it cannot be read at all.
    """
    with LedgerFile(path) as file:
        faults = _Faults()
        seal = _check_seal(path, faults)
        rows = _check_rows(file, faults)
        if seal is None and not faults.count and file.has_checksum:
            faults.note("its checksum is not that of the file: it was written anew after limiter had")
        if rows is not None and seal is not None and seal.rows != rows:
            faults.note(f"it has {rows} rows, and its last line says {seal.rows}")
        return VerifyReport(path, file.size_bytes, seal, rows or 0, tuple(faults.first), faults.count)


class _Faults:
    """The faults that were found: how many, and the first of them."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[str] = []

    def note(self, fault: str) -> None:
        self.count += 1
        if len(self.first) < _FAULTS_KEPT:
            self.first.append(fault)


def _check_seal(path: Path, faults: _Faults) -> Seal | None:
    try:
        sealed = check_seal(path)
        is_ours = sealed.seal is not None or begins_as_ours(path)
    except OSError as error:
        raise LedgerFileError(f"{path} cannot be read: {error.strerror}") from error
    if is_ours and not sealed.is_intact:
        faults.note("the checksum is not that of the file" if sealed.seal else "its last line is not one of limiter's")
    return sealed.seal


def _check_rows(file: LedgerFile, faults: _Faults) -> int | None:
    """Count the rows that can be taken; None when there is no reading on to the end."""
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
