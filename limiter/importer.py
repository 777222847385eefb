"""From credits.json into Redis. A file is read to its end before anything is written; rows go in through put_row only.

It reads files through `ledger` and never decides what a row means.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from redis.exceptions import NoScriptError, RedisError

from limiter.cancelling import CancelWatch
from limiter.credit_limiter import CreditLimiter
from limiter.errors import BrokenRow, LedgerFileError
from limiter.ledger import LedgerFile, row_from_member, undated_fields
from limiter.ledger_row import merged_extra
from limiter.ledger_writer import ListFile
from limiter.lua_source import compose
from limiter.model import Row, Status
from limiter.scripts import PutMode, mapped, put_row_arguments, status_of
from limiter.store import Fields, decode_row, scan_keys

Phase = Literal["check", "compare", "write"]
BATCH_ROWS = 500
_REASONS_KEPT = 20
_SCRIPT_LOADS = 3  # of one batch: a server that forgets its scripts faster than that is broken


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an import is. Each phase reads the file once: `read_bytes` of `size_bytes`."""

    phase: Phase
    rows: int
    read_bytes: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row of the file that is not in Redis, and why."""

    install_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What an import did, or with dry_run would do, to the `total` rows of the file.

    changed: merged or replaced. rejected: how many did not go in; the first of them, and the file with all of them,
    which a dry run does not write.
    """

    total: int
    new: int
    same: int
    changed: int
    rejected: int
    first_rejected: tuple[Rejected, ...]
    rejected_file: Path | None
    dry_run: bool


async def import_file(
    limiter: CreditLimiter,
    path: Path,
    *,
    mode: PutMode,
    dry_run: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> ImportReport:
    """Bring the rows of a credits.json into Redis; rows that cannot be taken go to `<file>.rejected.json` beside it.

    `create` wants a Redis with no rows but those of this very file, as a repeat finds it; `merge` keeps the larger
    counters; `replace` overwrites. Rows that only Redis has stay, and so do live holds. A repeat changes nothing.
    Raises LedgerFileError, with nothing changed, for a file that is broken anywhere or a Redis with other rows;
    LimiterUnavailable when Redis goes away, after which the same import can be repeated.
    """
    now_ms = await moment_ms(limiter)
    rejected_path = path.with_name(f"{path.name}.rejected.json")
    with LedgerFile(path) as file, ListFile(rejected_path, "rejected") as rejected_file:
        run = _Import(limiter, file, now_ms, None if dry_run else rejected_file, on_progress)
        good = await run.check()
        answers: Counter[Status] = Counter()
        stored = await _count_rows(limiter) if mode == "create" else 0
        if stored:
            answers = await run.put(mode, asks=True)
            _refuse_other_rows(path, stored, answers)
        if not dry_run:
            answers = await run.put(mode, asks=False)
        elif mode != "create":
            answers = await run.put(mode, asks=True)
        elif not stored:
            answers[Status.CREATED] = good
        return ImportReport(
            total=run.total,
            new=answers[Status.CREATED],
            same=answers[Status.SAME],
            changed=answers[Status.MERGED] + answers[Status.REPLACED],
            rejected=run.rejected,
            first_rejected=tuple(run.first_rejected),
            rejected_file=None if dry_run else await rejected_file.publish(),
            dry_run=dry_run,
        )


async def moment_ms(limiter: CreditLimiter) -> int:
    """Give the time that the limiter goes by: its clock's, or else the server's. Raises LimiterUnavailable."""
    if limiter.clock is not None:
        return limiter.clock()
    try:
        seconds, microseconds = await limiter.redis.time()
    except (RedisError, OSError, TimeoutError) as error:
        raise mapped(error, "TIME") from error
    return int(seconds) * 1000 + int(microseconds) // 1000


@dataclass(frozen=True, slots=True)
class _Item:
    """A good row on its way, with what the file had. `undated` names the fields that the file says nothing of."""

    row: Row
    member: object
    undated: frozenset[str]


class _Import:
    """One import's passes over its file. All of them see one moment, so that they make the same rows."""

    def __init__(
        self,
        limiter: CreditLimiter,
        file: LedgerFile,
        now_ms: int,
        rejected_file: ListFile | None,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self.total = self.rejected = 0
        self.first_rejected: list[Rejected] = []
        self._limiter, self._file, self._now_ms = limiter, file, now_ms
        self._rejected_file, self._on_progress = rejected_file, on_progress
        self._script = compose("put_row")
        self._cancel = CancelWatch()

    async def check(self) -> int:
        """Read the whole file, noting the rows that cannot be taken; give the number of those that can."""
        for install_id, member in self._file.members():
            self.total += 1
            try:
                row_from_member(install_id, member, now_ms=self._now_ms)
            except LedgerFileError as error:
                await self._reject(install_id, member, str(error))
            if self.total % BATCH_ROWS == 0:
                self._tell("check", self.total)
                await asyncio.sleep(0)  # others on this loop have their turn, and a cancellation is seen
        self._tell("check", self.total)
        return self.total - self.rejected

    async def put(self, mode: PutMode, *, asks: bool) -> "Counter[Status]":
        """Send every good row, or with `asks` only find out what that would do; count the answers."""
        answers: Counter[Status] = Counter()
        batch: list[_Item] = []
        rows = 0
        for item in self._good():
            batch.append(item)
            rows += 1
            if len(batch) == BATCH_ROWS:
                answers += await self._put_batch(batch, mode, asks=asks)
                batch = []
                self._tell("compare" if asks else "write", rows)
        if batch:
            answers += await self._put_batch(batch, mode, asks=asks)
        self._tell("compare" if asks else "write", rows)
        return answers

    def _good(self) -> Iterator[_Item]:
        for install_id, member in self._file.members():
            try:
                row = row_from_member(install_id, member, now_ms=self._now_ms)
            except LedgerFileError:  # the check has noted it
                continue
            yield _Item(row, member, undated_fields(member))

    async def _put_batch(self, batch: list[_Item], mode: PutMode, *, asks: bool) -> "Counter[Status]":
        settled = await self._settled(batch, mode)
        calls = []
        for _, row in settled:
            word, *rest = put_row_arguments(row, mode)
            calls.append((self._limiter.keys.install(row.install_id), f"{word}?" if asks else word, *rest))
        replies = await self._call(calls)
        answers: Counter[Status] = Counter()
        for (item, row), reply in zip(settled, replies, strict=True):
            if isinstance(reply, Exception):
                error = mapped(reply, self._limiter.keys.install(row.install_id))
                if not isinstance(error, BrokenRow):
                    raise error from reply
                if asks and mode == "create":
                    answers[Status.EXISTS] += 1
                    continue
                await self._reject(row.install_id, item.member, f"its row in Redis is broken: {error}")
                continue
            status = status_of(reply)
            answers[status] += 1
            if status is Status.EXISTS and not asks:
                await self._reject(row.install_id, item.member, "Redis got another row of this install meanwhile")
        return answers

    async def _call(self, calls: list[tuple[Any, ...]]) -> list[Any]:
        """Run put_row for each call in one round trip; those that a server without the script did not run, again."""
        replies: list[Any] = [None] * len(calls)
        waiting = list(range(len(calls)))
        for attempt in range(1 + _SCRIPT_LOADS):
            if not waiting:
                break
            pipeline = self._limiter.redis.pipeline(transaction=False)
            if attempt:
                pipeline.script_load(self._script.text)
            for index in waiting:
                pipeline.evalsha(self._script.sha, 1, *calls[index])
            got = await _executed(pipeline, str(calls[waiting[0]][0]))
            for index, reply in zip(waiting, got[-len(waiting) :], strict=True):
                replies[index] = reply
            waiting = [index for index in waiting if isinstance(replies[index], NoScriptError)]
        return replies

    async def _settled(self, batch: list[_Item], mode: PutMode) -> list[tuple[_Item, Row]]:
        """Give the rows to send: what the file leaves open is filled from the row that is stored already.

        A row without a period began "now", and a repeat has another now. And a merge keeps the other members of both.
        This looks before it writes, which is safe: a stored period only moves on, and put_row lets a later one win.
        """
        open_items = [item for item in batch if item.undated or (mode == "merge" and item.row.extra)]
        if not open_items:
            return [(item, item.row) for item in batch]
        pipeline = self._limiter.redis.pipeline(transaction=False)
        keys = [self._limiter.keys.install(item.row.install_id) for item in open_items]
        for key in keys:
            pipeline.hgetall(key)
        found = zip(keys, await _executed(pipeline, keys[0]), strict=True)
        stored = {key: row for key, fields in found if (row := self._stored(key, fields))}
        settled: list[tuple[_Item, Row]] = []
        for item in batch:
            row = stored.get(self._limiter.keys.install(item.row.install_id))
            try:
                settled.append((item, item.row if row is None else _filled(item, row, mode)))
            except ValueError as cause:
                await self._reject(item.row.install_id, item.member, f"it cannot be merged: {cause}")
        return settled

    def _stored(self, key: str, fields: "Fields | Exception") -> Row | None:
        if isinstance(fields, Exception) or not fields:
            return None  # put_row says what is wrong with it
        try:
            return decode_row(self._limiter.keys, key, fields)
        except BrokenRow:
            return None

    async def _reject(self, install_id: str, member: object, reason: str) -> None:
        self.rejected += 1
        if len(self.first_rejected) < _REASONS_KEPT:
            self.first_rejected.append(Rejected(install_id, reason))
        if self._rejected_file is not None:
            await self._rejected_file.add({"install_id": install_id, "reason": reason, "row": member})

    def _tell(self, phase: Phase, rows: int) -> None:
        self._cancel.check()
        if self._on_progress is not None:
            self._on_progress(Progress(phase, rows, self._file.read_bytes, self._file.size_bytes))


def _filled(item: _Item, stored: Row, mode: PutMode) -> Row:
    row = replace(item.row, **{name: getattr(stored, name) for name in item.undated})
    if mode == "merge":
        return replace(row, extra=merged_extra(stored.extra, row.extra))
    return row if row == stored else item.row


def _refuse_other_rows(path: Path, stored: int, answers: "Counter[Status]") -> None:
    differing = answers[Status.EXISTS]
    others = max(0, stored - differing - answers[Status.SAME])
    if differing or others:
        raise LedgerFileError(
            f"Redis has {differing} rows that differ from those of {path}, and {others} that it does not have; nothing "
            "was changed. Import with merge to keep the larger counters, or with replace to let the file win"
        )


async def _count_rows(limiter: CreditLimiter) -> int:
    """Count the rows of this prefix."""
    return sum([len(names) async for names in scan_keys(limiter.redis, limiter.keys)])


async def _executed(pipeline: Any, key: str) -> list[Any]:
    try:
        return cast("list[Any]", await pipeline.execute(raise_on_error=False))
    except (RedisError, OSError, TimeoutError) as error:
        raise mapped(error, key) from error
