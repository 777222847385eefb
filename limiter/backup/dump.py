"""From Redis to credits.json, once. It reads rows and never writes one.

What happens to an existing file is decided in `publish`.
"""

import base64
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redis.exceptions import RedisError

from limiter._util.atomic_file import in_thread
from limiter._util.cancellation import CancelWatch
from limiter._util.timestamps import iso_from_ms
from limiter.backup.prune import pruned_since
from limiter.backup.publish import Publication, Writer, may_lack_rows
from limiter.credits.models import STORED_FIELDS
from limiter.credits.rows import read_fields, read_values, row_or_error, scan_keys
from limiter.credits.session import Session
from limiter.errors import BrokenRow, LedgerFileError
from limiter.ledger.rotation import KEEP, prune
from limiter.ledger.row_codec import line_from_row
from limiter.ledger.row_fast_path import line_from_values
from limiter.ledger.side_file import SideFile
from limiter.ledger.trailer import DumpedFile
from limiter.ledger.writer import LedgerWriter
from limiter.redis.errors import translate_error
from limiter.redis.resp import hmget

_REASONS_KEPT = 20
_FIELDS = hmget(STORED_FIELDS)


@dataclass(frozen=True, slots=True)
class DumpReport:
    """The result of a dump. It is `clean` if no row was left out.

    Args:
        path: of the file.
        time: of the dump, as ISO text.
        file: the one at `path` now.
        unchanged: it had the same rows already, and was not replaced.
        kept: the name under which the replaced file stays.
        is_set_aside: whether that is because it may have rows that Redis does not have.
        broken: how many rows in Redis cannot be in a file.
        first_broken: the first reasons.
        broken_file: the file with all of them as Redis has them.
    """

    path: Path
    time: str
    file: DumpedFile
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
        return self.file.trailer.rows if self.file.trailer is not None else 0

    @property
    def checksum(self) -> str:
        """The file's checksum."""
        return self.file.trailer.checksum if self.file.trailer is not None else ""

    @property
    def size_bytes(self) -> int:
        """The size of the file."""
        return self.file.stat.st_size


async def dump(
    session: Session,
    path: Path,
    *,
    keep: int = KEEP,
    last: DumpedFile | None = None,
    writer: Writer | None = None,
) -> DumpReport:
    """Write every row to a credits.json at `path`, without live holds; it is replaced as a whole or not at all.

    Rows that cannot be read are left out, and are written as Redis has them to `<name>.broken.json`; the report is then
    not `clean`. Raises LedgerFileError, with nothing replaced, if the file cannot be written, if it has rows and Redis
    has none, or if another process replaced it meanwhile; LimiterUnavailable if Redis becomes unavailable.

    Args:
        session: the Redis to read.
        path: of the file.
        keep: how many files of this name stay, including this one.
        last: the caller's own last dump.
        writer: the caller's lease; without one, as on the command line, any dump of limiter may be replaced.
    """
    time = iso_from_ms(await session.server_time_ms())
    with SideFile(path.parent / f"{path.name}.broken.json", "broken") as broken_file, LedgerWriter(path) as file:
        scan, publication = _Scan(session, broken_file), Publication(path, time, writer)
        found = await publication.current(last)
        await scan.write_to(file)
        rows_digest = await file.rows_digest()
        kept, is_set_aside = None, False
        unchanged = found is not None and _is_unchanged(found, rows_digest, broken_file.count)
        if found is None or not unchanged:
            known = file.rows  # and those of the last file that were deleted on purpose
            if found is not None and found.trailer is not None and file.rows < found.trailer.rows:
                known += await pruned_since(session, found.trailer.time)
            if not file.rows:
                await _refuse_loss(publication, found, scan, known)
            kept, is_set_aside = await publication.backup_name(found, known, last)
            published = await publication.publish(file, rows_digest, found, kept=kept, broken=broken_file.count)
            with suppress(OSError):  # a good dump does not fail because of too many files
                await in_thread(prune, publication.path, keep)
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
            first_broken=tuple(scan.first_broken),
            broken_file=await broken_file.publish(),
        )


class _Scan:
    """One scan of the rows in Redis; those that cannot be in a file are written to `broken_file`."""

    def __init__(self, session: Session, broken_file: SideFile) -> None:
        self.broken_file = broken_file
        self.first_broken: list[str] = []
        self._session = session
        self._cancel = CancelWatch()

    async def write_to(self, file: LedgerWriter) -> None:
        """Write the rows, noting those that cannot be read, or that an import would reject."""
        prefix = len(self._session.keys.install_pattern) - 1
        async for names in scan_keys(self._session):
            self._cancel.check()
            if not names:
                continue
            lines, rest = [], []
            for name, values in zip(names, await read_values(self._session.channel, names, _FIELDS), strict=True):
                line = None if isinstance(values, Exception) else line_from_values(name[prefix:], values)
                if line is None:
                    rest.append(name)
                else:
                    lines.append(line)
            if rest:
                lines += await self._read_slowly(rest)
            await file.add(lines)

    async def _read_slowly(self, names: Sequence[bytes]) -> list[bytes]:
        lines = []
        for name, fields in zip(names, await read_fields(self._session.channel, names), strict=True):
            if not fields:
                continue  # deleted meanwhile
            row = row_or_error(self._session.keys, name, fields)
            if isinstance(row, BrokenRow):
                await self._note(row.key, str(row))
                continue
            try:
                lines.append(line_from_row(row))
            except LedgerFileError as error:
                await self._note(name.decode(errors="backslashreplace"), str(error))
        return lines

    async def _note(self, key: str, reason: str) -> None:
        if len(self.first_broken) < _REASONS_KEPT:
            self.first_broken.append(reason)
        await self.broken_file.add({"key": key, "reason": reason} | await self._as_redis_has_it(key))

    async def _as_redis_has_it(self, key: str) -> dict[str, object]:
        """Return the fields to read, and Redis' own DUMP of the key, which its RESTORE takes back."""
        pipeline: Any = self._session.redis.pipeline(transaction=False)
        pipeline.hgetall(key)
        pipeline.dump(key)
        try:
            fields, raw = await pipeline.execute(raise_on_error=False)
        except (RedisError, OSError, TimeoutError) as error:
            raise translate_error(error, key) from error
        kept: dict[str, object] = {}
        if isinstance(fields, dict):
            kept["fields"] = {_readable(name): _readable(value) for name, value in fields.items()}
        if isinstance(raw, bytes):
            kept["dump"] = base64.b64encode(raw).decode()
        return kept


async def _refuse_loss(publication: Publication, found: DumpedFile | None, scan: _Scan, known: int) -> None:
    """Refuse to replace a file that has rows by one without, unless its rows were pruned. known: those that were."""
    path = publication.path
    if scan.broken_file.count:
        raise LedgerFileError(
            f"{path} was not written: not one of the {scan.broken_file.count} rows in Redis can be read; "
            f"the first: {scan.first_broken[0]}"
        )
    was_pruned = found is not None and found.trailer is not None and not may_lack_rows(found.trailer, known)
    if found is not None and not was_pruned and await publication.has_rows():
        raise LedgerFileError(
            f"{path} was not written: it has rows and Redis has none. Import it first "
            f"(limiter import {path}), or move it elsewhere if its rows are not wanted"
        )


def _is_unchanged(found: DumpedFile, rows_digest: bytes, broken: int) -> bool:
    return found.trailer is not None and found.rows_digest == rows_digest and found.trailer.broken == broken


def _readable(raw: bytes) -> str:
    return raw.decode(errors="backslashreplace")
