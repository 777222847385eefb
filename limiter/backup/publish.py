"""Replacing the file by a dump: whether that is allowed, and under which name the replaced file stays.

A file is replaced only by one that was scanned after it: a writer that was paused finds another file there, or
another writer's lease, and stops. A replaced file stays: as a generation, or set aside if it may have rows that Redis
does not have. Rows never expire, so a file with more rows than Redis has, and than were pruned, was not imported, or
Redis has lost its data.
"""

import errno
from dataclasses import dataclass
from pathlib import Path

from limiter._util.atomic_file import FolderLock, in_thread
from limiter._util.cancellation import CancelWatch
from limiter.backup.lease import Lease, LeaseState
from limiter.errors import LedgerFileError
from limiter.ledger.file import LedgerFile
from limiter.ledger.rotation import generation_name, set_aside_name
from limiter.ledger.trailer import DumpedFile, Trailer, check_trailer, read_trailer
from limiter.ledger.writer import LedgerWriter

_MIN_SHARE = 0.9  # a dump with a smaller share of the last one's rows sets the last one aside
_LOCK_S = 10.0  # another writer holds the folder's lock for a rename only: for so long, it must be paused
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@dataclass(frozen=True, slots=True)
class Writer:
    """A persister's right to replace a file: its lease, and the reply when it was taken."""

    lease: Lease
    leased: LeaseState


class Publication:
    """The publication of one dump at `path`. time: of the dump. writer: None without a lease."""

    def __init__(self, path: Path, time: str, writer: Writer | None) -> None:
        self.path = path.resolve()
        self._time, self._writer = time, writer
        self._cancel = CancelWatch()

    async def current(self, last: DumpedFile | None) -> DumpedFile | None:
        """Return the file at `path`, None if there is none. Unless it is `last`, it is read as a whole."""
        try:
            if last is not None and last.is_still(self.path.stat()):
                return last
            return await in_thread(check_trailer, self.path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise LedgerFileError(
                f"{self.path} cannot be read: {error.strerror or error}; nothing was replaced"
            ) from error

    async def has_rows(self) -> bool:
        """Return whether the file may have rows; True if it cannot be read."""
        return await in_thread(_has_rows, self.path)

    async def backup_name(
        self, found: DumpedFile | None, rows: int, last: DumpedFile | None
    ) -> tuple[Path | None, bool]:
        """Return the name under which the replaced file stays, and whether it is set aside for good.

        rows: of the dump, and those that were pruned since the file.
        """
        if found is None:
            return None, False
        if found.trailer is None or not found.is_intact:
            is_foreign = await self.has_rows()
            return (set_aside_name(self.path, self._time), True) if is_foreign else (None, False)
        is_own = found is last or self._writer is None or found.trailer.checksum == self._writer.leased.checksum
        if is_own and not may_lack_rows(found.trailer, rows):
            return generation_name(self.path, found.trailer), False
        return set_aside_name(self.path, self._time), True

    async def publish(
        self, file: LedgerWriter, rows_digest: bytes, found: DumpedFile | None, *, kept: Path | None, broken: int
    ) -> DumpedFile:
        """Replace the file, if it is still the one that was found and this writer still has the lease.

        Args:
            file: the new file.
            rows_digest: of its rows.
            found: the file that `current` returned.
            kept: the name under which the replaced file stays.
            broken: how many rows were left out.
        """
        before = found.trailer if found is not None else None
        trailer = await file.write_trailer(
            epoch=self._writer.leased.epoch if self._writer is not None else before.epoch if before else 0,
            sequence=before.sequence + 1 if before else 1,
            time=self._time,
            broken=broken,
        )
        with FolderLock(self.path) as lock:
            await self._lock(lock)
            if self._writer is not None:
                await self._renew_lease(self._writer, trailer)
            self._check_still(found)
            self._cancel.check()
            return await file.publish(rows_digest, keep_as=kept)

    async def _lock(self, lock: FolderLock) -> None:
        try:
            await in_thread(lock.acquire, within_s=_LOCK_S)
        except BlockingIOError as error:
            raise LedgerFileError(
                f"{self.path} was not written: another process has held {lock.path} for {_LOCK_S:g} s"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:  # the lease still keeps writers apart, unless one is paused in a rename
                raise LedgerFileError(
                    f"{lock.path} cannot be locked: {error.strerror}; nothing was replaced"
                ) from error

    async def _renew_lease(self, writer: Writer, trailer: Trailer) -> None:
        leased = await writer.lease.take(least_epoch=trailer.epoch, checksum=trailer.checksum)
        if not leased.is_mine or leased.epoch != trailer.epoch:
            raise LedgerFileError(
                f"{self.path} was not written: this persister's lease (epoch {trailer.epoch}) expired during the dump, "
                f"and {'another took it' if not leased.is_mine else 'was taken again'} (epoch {leased.epoch})"
            )

    def _check_still(self, found: DumpedFile | None) -> None:
        try:
            status = self.path.stat()
        except FileNotFoundError:
            return  # the file was moved: nothing is replaced
        except OSError as error:
            raise LedgerFileError(f"{self.path} cannot be read: {error.strerror}; nothing was replaced") from error
        if found is None or not found.is_still(status):
            there = read_trailer(self.path)
            what = f"a dump of epoch {there.epoch}, number {there.sequence}" if there else "another file"
            raise LedgerFileError(f"{self.path} was not written: {what} was put there during this dump")


def may_lack_rows(trailer: Trailer, rows: int) -> bool:
    """Return whether so many rows are far fewer than a file has."""
    return rows < trailer.rows * _MIN_SHARE


def _has_rows(path: Path) -> bool:
    try:
        with LedgerFile(path) as file:
            return file.size_bytes > 0 and next(file.members(), None) is not None
    except LedgerFileError:
        return True
