"""From Redis to credits.json, once. It reads rows and never writes one.

A file is replaced only by one that was scanned after it: whoever was paused meanwhile finds another file there, or
another writer's lease, and gives up. What is replaced stays: as a generation, or set aside when it may have what Redis
has not. Rows never expire, so a file that has more is one that was not imported, or Redis has lost its data.
"""

import base64
import errno
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redis.exceptions import RedisError

from limiter.atomic_file import FolderLock, in_thread
from limiter.cancelling import CancelWatch
from limiter.credit_limiter import CreditLimiter
from limiter.errors import BrokenRow, LedgerFileError
from limiter.generations import KEEP, generation_name, prune, set_aside_name
from limiter.importer import moment_ms
from limiter.lease import Lease, Leased
from limiter.ledger import LedgerFile
from limiter.ledger_regular import STORED_FIELDS, line_from_values
from limiter.ledger_row import line_from_row
from limiter.ledger_seal import Seal, SealedFile, check_seal, read_seal
from limiter.ledger_writer import LedgerWriter, ListFile
from limiter.scripts import mapped
from limiter.store import PackedFields, read_fields, read_values, row_or_error, scan_keys
from limiter.timestamps import iso_from_ms

_REASONS_KEPT = 20
_FIELDS = PackedFields(STORED_FIELDS)
_LEAST_SHARE = 0.9  # a dump with fewer of the last one's rows than that sets the last one aside
_LOCK_S = 10.0  # another writer holds the folder's lock for a rename: for so long only one that is paused
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@dataclass(frozen=True, slots=True)
class DumpReport:
    """What a dump wrote. It is `clean` when no row was left out.

    file: what is at `path` now. unchanged: it has the same rows already, and nothing was replaced. kept: the name
    under which the replaced file stays; is_set_aside: because it may have what Redis has not. broken: rows in Redis
    that no file can hold; the first reasons, and the file with all of them as Redis has them.
    """

    path: Path
    time: str
    file: SealedFile
    unchanged: bool
    kept: Path | None
    is_set_aside: bool
    broken: int
    first_broken: tuple[str, ...]
    broken_file: Path | None

    @property
    def clean(self) -> bool:
        """Whether every row of Redis is in the file."""
        return self.broken == 0

    @property
    def rows(self) -> int:
        """How many rows the file has."""
        return self.file.seal.rows if self.file.seal is not None else 0

    @property
    def checksum(self) -> str:
        """The file's checksum."""
        return self.file.seal.checksum if self.file.seal is not None else ""

    @property
    def size_bytes(self) -> int:
        """The size of the file."""
        return self.file.stat.st_size


@dataclass(frozen=True, slots=True)
class Writer:
    """A persister's right to replace a file: its lease, and what was answered when it took it."""

    lease: Lease
    leased: Leased


async def dump(
    limiter: CreditLimiter,
    path: Path,
    *,
    keep: int = KEEP,
    last: SealedFile | None = None,
    writer: Writer | None = None,
) -> DumpReport:
    """Write every row to a credits.json at `path`, without live holds; it is replaced whole or not at all.

    The latest `keep` files of this name stay, with this one. last: the caller's own last dump. writer: without one,
    as from a command line, any dump of limiter's may be replaced. Rows that cannot be read are left out, and go as
    Redis has them to `<name>.broken.json`: the report then is not `clean`. Raises LedgerFileError, with nothing
    replaced, when the file cannot be written, has rows and Redis none, or is another's by now; LimiterUnavailable when
    Redis goes away.
    """
    time = iso_from_ms(await moment_ms(limiter))
    with ListFile(path.parent / f"{path.name}.broken.json", "broken") as broken_file, LedgerWriter(path) as file:
        run = _Dump(limiter, path, broken_file, time, writer)
        found = await run.find(last)
        await run.scan(file)
        rows_digest = await file.rows_digest()
        kept, is_set_aside = None, False
        unchanged = found is not None and _is_unchanged(found, rows_digest, broken_file.count)
        if found is None or not unchanged:
            await run.refuse_loss(found, file.rows)
            kept, is_set_aside = await run.name_for(found, file.rows, last)
            published = await run.publish(file, rows_digest, found, kept)
            with suppress(OSError):  # too many files are no reason to call a good dump bad
                await in_thread(prune, run.path, keep)
        else:
            published = found
        return DumpReport(
            path=path,
            time=time,
            file=published,
            unchanged=unchanged,
            kept=kept,
            is_set_aside=is_set_aside,
            broken=broken_file.count,
            first_broken=tuple(run.first_broken),
            broken_file=await broken_file.publish(),
        )


class _Dump:
    """One dump: what it leaves out, and what it may replace."""

    def __init__(
        self, limiter: CreditLimiter, path: Path, broken_file: ListFile, time: str, writer: Writer | None
    ) -> None:
        self.path = path.resolve()
        self.first_broken: list[str] = []
        self._limiter, self._broken_file, self._time, self._writer = limiter, broken_file, time, writer
        self._cancel = CancelWatch()

    async def find(self, last: SealedFile | None) -> SealedFile | None:
        """Look at the file that is there; None when there is none. One that is not `last` is read as a whole."""
        try:
            if last is not None and last.is_still(self.path.stat()):
                return last
            return await in_thread(check_seal, self.path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise LedgerFileError(
                f"{self.path} cannot be read: {error.strerror or error}; nothing was replaced"
            ) from error

    async def scan(self, file: LedgerWriter) -> None:
        """Write the rows of Redis, noting those that cannot be read, or that no import would take."""
        prefix = len(self._limiter.keys.install_pattern) - 1
        async for names in scan_keys(self._limiter.redis, self._limiter.keys):
            self._cancel.check()
            if not names:
                continue
            lines, rest = [], []
            for name, values in zip(names, await read_values(self._limiter.wire, names, _FIELDS), strict=True):
                line = None if isinstance(values, Exception) else line_from_values(name[prefix:], values)
                if line is None:
                    rest.append(name)
                else:
                    lines.append(line)
            if rest:
                lines += await self._looked_closer(rest)
            await file.add(lines)

    async def _looked_closer(self, names: Sequence[bytes]) -> list[bytes]:
        lines = []
        for name, fields in zip(names, await read_fields(self._limiter.wire, names), strict=True):
            if not fields:
                continue  # it is gone by now
            row = row_or_error(self._limiter.keys, name, fields)
            if isinstance(row, BrokenRow):
                await self._note(row.key, str(row))
                continue
            try:
                lines.append(line_from_row(row))
            except LedgerFileError as error:
                await self._note(name.decode(errors="backslashreplace"), str(error))
        return lines

    async def refuse_loss(self, found: SealedFile | None, rows: int) -> None:
        """Refuse to replace rows by none."""
        if rows:
            return
        if self._broken_file.count:
            raise LedgerFileError(
                f"{self.path} was not written: not one of the {self._broken_file.count} rows in Redis can be read; "
                f"the first: {self.first_broken[0]}"
            )
        if found is not None and await in_thread(_has_rows, self.path):
            raise LedgerFileError(
                f"{self.path} was not written: it has rows and Redis has none. Import it first "
                f"(limiter import {self.path}), or move it away if its rows are not wanted"
            )

    async def name_for(self, found: SealedFile | None, rows: int, last: SealedFile | None) -> tuple[Path | None, bool]:
        """Give the name under which the replaced file stays, and whether it is set aside for good."""
        if found is None:
            return None, False
        if found.seal is None or not found.is_intact:
            is_foreign = await in_thread(_has_rows, self.path)
            return (set_aside_name(self.path, self._time), True) if is_foreign else (None, False)
        is_own = found is last or self._writer is None or found.seal.checksum == self._writer.leased.checksum
        if is_own and rows >= found.seal.rows * _LEAST_SHARE:
            return generation_name(self.path, found.seal), False
        return set_aside_name(self.path, self._time), True

    async def publish(
        self, file: LedgerWriter, rows_digest: bytes, found: SealedFile | None, kept: Path | None
    ) -> SealedFile:
        """Replace the file, if it is still the one that was found and the lease is still ours."""
        before = found.seal if found is not None else None
        seal = await file.seal(
            epoch=self._writer.leased.epoch if self._writer is not None else before.epoch if before else 0,
            sequence=before.sequence + 1 if before else 1,
            time=self._time,
            broken=self._broken_file.count,
        )
        with FolderLock(self.path) as lock:
            await self._lock(lock)
            if self._writer is not None:
                await self._ask_again(self._writer, seal)
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
            if error.errno not in _NO_LOCKS:  # the lease still keeps writers apart that are not paused in a rename
                raise LedgerFileError(
                    f"{lock.path} cannot be locked: {error.strerror}; nothing was replaced"
                ) from error

    async def _ask_again(self, writer: Writer, seal: Seal) -> None:
        leased = await writer.lease.take(least_epoch=seal.epoch, checksum=seal.checksum)
        if not leased.is_mine or leased.epoch != seal.epoch:
            raise LedgerFileError(
                f"{self.path} was not written: this persister's lease (epoch {seal.epoch}) lapsed during the dump, and "
                f"{'another took it' if not leased.is_mine else 'was taken anew'} (epoch {leased.epoch})"
            )

    def _check_still(self, found: SealedFile | None) -> None:
        try:
            status = self.path.stat()
        except FileNotFoundError:
            return  # moved away: nothing is replaced
        except OSError as error:
            raise LedgerFileError(f"{self.path} cannot be read: {error.strerror}; nothing was replaced") from error
        if found is None or not found.is_still(status):
            there = read_seal(self.path)
            what = f"a dump of epoch {there.epoch}, number {there.sequence}" if there else "another file"
            raise LedgerFileError(f"{self.path} was not written: {what} has come there during this dump")

    async def _note(self, key: str, reason: str) -> None:
        if len(self.first_broken) < _REASONS_KEPT:
            self.first_broken.append(reason)
        await self._broken_file.add({"key": key, "reason": reason} | await self._as_redis_has_it(key))

    async def _as_redis_has_it(self, key: str) -> dict[str, object]:
        """Give the fields to read, and Redis' own DUMP of the key, which its RESTORE takes back."""
        pipeline: Any = self._limiter.redis.pipeline(transaction=False)
        pipeline.hgetall(key)
        pipeline.dump(key)
        try:
            fields, raw = await pipeline.execute(raise_on_error=False)
        except (RedisError, OSError, TimeoutError) as error:
            raise mapped(error, key) from error
        kept: dict[str, object] = {}
        if isinstance(fields, dict):
            kept["fields"] = {_readable(name): _readable(value) for name, value in fields.items()}
        if isinstance(raw, bytes):
            kept["dump"] = base64.b64encode(raw).decode()
        return kept


def _is_unchanged(found: SealedFile, rows_digest: bytes, broken: int) -> bool:
    return found.seal is not None and found.rows_digest == rows_digest and found.seal.broken == broken


def _has_rows(path: Path) -> bool:
    """Tell whether there is anything in the file to lose; one that cannot be read may have it."""
    try:
        with LedgerFile(path) as file:
            return file.size_bytes > 0 and next(file.members(), None) is not None
    except LedgerFileError:
        return True


def _readable(raw: bytes) -> str:
    return raw.decode(errors="backslashreplace")
