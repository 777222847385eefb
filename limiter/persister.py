"""From Redis to credits.json: one dump, and the task that makes one every interval.

It reads Redis and never writes to it. It may replace a file only when nothing can be lost by that: rows never expire,
so a file that has more than Redis is one that was not imported, or Redis has lost its data.
"""

import asyncio
import base64
import logging
import os
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from redis.exceptions import RedisError

from limiter.atomic_file import free_name
from limiter.cancelling import CancelWatch
from limiter.credit_limiter import CreditLimiter
from limiter.errors import LedgerFileError, LimiterError
from limiter.importer import import_file, moment_ms
from limiter.ledger import LedgerFile
from limiter.ledger_writer import ListFile, write_ledger
from limiter.model import Row
from limiter.scripts import mapped
from limiter.store import scan_rows
from limiter.timestamps import iso_from_ms

_LOG = logging.getLogger("limiter")
_REASONS_KEPT = 20
_LEAST_SHARE = 0.9  # a dump with fewer of the last one's rows than that keeps the last one


@dataclass(frozen=True, slots=True)
class DumpReport:
    """What a dump wrote. It is `clean` when no row was left out.

    broken: rows in Redis that no file can hold; the first reasons, and the file with all of them as Redis has them.
    kept: the name under which the replaced file stays, because it may have what Redis has not.
    """

    path: Path
    time: str
    rows: int
    size_bytes: int
    checksum: str
    kept: Path | None
    broken: int
    first_broken: tuple[str, ...]
    broken_file: Path | None
    stat: os.stat_result

    @property
    def clean(self) -> bool:
        """Whether every row of Redis is in the file."""
        return self.broken == 0


async def dump(limiter: CreditLimiter, path: Path, *, last: DumpReport | None = None) -> DumpReport:
    """Write every row to a credits.json at `path`, without live holds; it is replaced whole or not at all.

    last: the caller's own last dump to this path; a file that is not that one is kept as `<name>.before-<time>`,
    unless all that it holds is in Redis. Rows that cannot be read are left out, and go as Redis has them to
    `<name>.broken.json`: the report then is not `clean`. Raises LedgerFileError, with nothing replaced, when the file
    cannot be written, or has rows and Redis none; LimiterUnavailable when Redis goes away.
    """
    now_ms = await moment_ms(limiter)
    with ListFile(path.with_name(f"{path.name}.broken.json"), "broken") as broken_file:
        run = _Dump(limiter, path, last, now_ms, broken_file)
        async with aclosing(run.rows()) as rows:
            written = await write_ledger(path, rows, now_ms=now_ms, unfit=run.note_unfit, before=run.before)
        return DumpReport(
            path=path,
            time=written.time,
            rows=written.rows,
            size_bytes=written.size_bytes,
            checksum=written.checksum,
            kept=written.kept,
            broken=broken_file.count,
            first_broken=tuple(run.first_broken),
            broken_file=await broken_file.publish(),
            stat=written.stat,
        )


class Persister:
    """Dumps at once and then every interval, counted from the end of a dump, until it is stopped; then once more.

    Use it as `async with Persister(…):`, or run `run()` as a task and call `stop()`. An error is logged, and told by
    `report`; the next interval tries again. Cancelling `run()` ends it without the last dump.
    """

    def __init__(self, limiter: CreditLimiter, path: Path, *, interval_s: float) -> None:
        self.last_good_at: str | None = None
        self.last_error: str | None = None
        self.last_report: DumpReport | None = None
        self._limiter, self._path, self._interval_s = limiter, path, interval_s
        self._stopped = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self.run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if self._task is not None:
            await self._task

    async def run(self) -> None:
        """Dump until `stop()`, and once after it."""
        cancel = CancelWatch()
        while not self._stopped.is_set():
            await self._dump()
            cancel.check()
            try:
                async with asyncio.timeout(self._interval_s):
                    await self._stopped.wait()
            except TimeoutError:
                continue
        await self._dump()

    def stop(self) -> None:
        """Ask `run()` to end after one more dump."""
        self._stopped.set()

    def report(self) -> Mapping[str, object]:
        """Tell how the dumps are doing, for readiness: the time of the last good one, and the error since, if any."""
        return {"file": str(self._path), "last_good_at": self.last_good_at, "error": self.last_error}

    async def _dump(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)  # as the old ledger does
            report = await dump(self._limiter, self._path, last=self.last_report)
        except (LimiterError, OSError) as error:
            self.last_error = str(error)
            _LOG.error("the ledger was not written: %s", error)
        except Exception as error:  # noqa: BLE001  a fault of ours must not end the task, and all dumps with it
            self.last_error = repr(error)
            _LOG.exception("the ledger was not written, by a fault of this program")
        else:
            self._note(report)

    def _note(self, report: DumpReport) -> None:
        self.last_report = report
        if report.kept is not None:
            _LOG.warning("%s had rows that Redis has not: it was kept as %s", report.path, report.kept)
        if report.clean:
            self.last_good_at, self.last_error = report.time, None
            return
        self.last_error = f"{report.broken} rows are not in {report.path}: see {report.broken_file}"
        _LOG.error("%s; the first: %s", self.last_error, report.first_broken[0])


class _Dump:
    """One dump: what it leaves out, and what it may replace."""

    def __init__(
        self, limiter: CreditLimiter, path: Path, last: DumpReport | None, now_ms: int, broken_file: ListFile
    ) -> None:
        self.first_broken: list[str] = []
        self._limiter, self._path, self._last, self._now_ms = limiter, path, last, now_ms
        self._broken_file = broken_file
        self._cancel = CancelWatch()

    async def rows(self) -> AsyncGenerator[Row, None]:
        """Give the rows of Redis, noting those that cannot be read."""
        async for row in scan_rows(self._limiter.redis, self._limiter.keys):
            self._cancel.check()
            if isinstance(row, Row):
                yield row
            else:
                await self._note(row.key, str(row))

    async def note_unfit(self, row: Row, error: LedgerFileError) -> None:
        """Note a row that can be read but that no import would take."""
        await self._note(self._limiter.keys.install_pattern.removesuffix("*") + row.install_id, str(error))

    async def before(self, rows: int) -> Path | None:
        """Refuse to replace the file, or give the name under which it must be kept, or None. See the module's job."""
        path = self._path.resolve()
        if not rows and self._broken_file.count:
            raise LedgerFileError(
                f"{path} was not written: not one of the {self._broken_file.count} rows in Redis can be read; "
                f"the first: {self.first_broken[0]}"
            )
        try:
            status = path.stat()
        except FileNotFoundError:
            return None
        if not rows and status.st_size and _has_rows(path):
            raise LedgerFileError(
                f"{path} was not written: it has rows and Redis has none. Import it first (limiter import {path}), "
                "or move it away if its rows are not wanted"
            )
        if self._last is not None and os.path.samestat(status, self._last.stat):
            changed = status.st_mtime_ns != self._last.stat.st_mtime_ns
            may_lose = changed or rows < self._last.rows * _LEAST_SHARE
        else:
            may_lose = not await _is_in_redis(self._limiter, path)
        self._cancel.check()
        return free_name(path, "before", iso_from_ms(self._now_ms)) if may_lose else None

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


def _has_rows(path: Path) -> bool:
    """Tell whether there is anything in the file to lose; one that cannot be read may have it."""
    try:
        with LedgerFile(path) as file:
            return next(file.members(), None) is not None
    except LedgerFileError:
        return True


async def _is_in_redis(limiter: CreditLimiter, path: Path) -> bool:
    """Tell whether merging the file into Redis would change nothing: then nothing is lost with it."""
    try:
        report = await import_file(limiter, path, mode="merge", dry_run=True)
    except LedgerFileError:
        return False
    return report.same == report.total


def _readable(raw: bytes) -> str:
    return raw.decode(errors="backslashreplace")
