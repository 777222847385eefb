"""From credits.json into Redis. A file is read to its end before anything is written.

Rows are stored by `row_writer` only, and files are read by `ledger` only, which decides what a row means.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from limiter._util.atomic_file import in_thread
from limiter._util.cancellation import CancelWatch
from limiter.backup.import_lock import StillOurs, exclusive_import
from limiter.backup.row_writer import GoodEntry, ParsedEntry, RegularEntry, Rejection, RowWriter
from limiter.credits.models import PutStatus
from limiter.credits.rows import scan_keys
from limiter.credits.scripts import PutMode
from limiter.credits.session import Session
from limiter.errors import LedgerFileError, LedgerRowError, LimiterError
from limiter.ledger.file import LedgerFile
from limiter.ledger.side_file import SideFile
from limiter.ledger.trailer import check_trailer

Phase = Literal["check", "compare", "write"]
BATCH_ROWS = 500  # read at once, before other tasks on this loop run
_BATCHES_SENT = 4  # at once: on a busy machine neither side then waits for the other to be scheduled
_REASONS_KEPT = 20
_FAULTS_KEPT = 50  # their words are ours, but some name a member of the file's


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of an import. Each phase reads the file once: `read_bytes` of `size_bytes`."""

    phase: Phase
    rows: int
    read_bytes: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row of the file that was not stored, and why."""

    install_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What an import did, or with dry_run would do, with the rows of the file.

    Args:
        total: how many rows the file has.
        new: how many were created.
        same: how many were stored already.
        changed: how many were merged or replaced.
        rejected: how many were not stored.
        faults: the faults of these with their counts, the most frequent first.
        first_rejected: the first of them.
        rejected_file: the file with all of them, which a dry run does not write.
        dry_run: whether nothing was written.
    """

    total: int
    new: int
    same: int
    changed: int
    rejected: int
    faults: Mapping[str, int]
    first_rejected: tuple[Rejected, ...]
    rejected_file: Path | None
    dry_run: bool


async def import_file(
    session: Session,
    path: Path,
    *,
    mode: PutMode,
    dry_run: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> ImportReport:
    """Store the rows of a credits.json in Redis; rows that are not valid go to `<file>.rejected.json` beside it.

    Rows that only Redis has stay, and so do live holds. A repeat changes nothing. Raises LedgerFileError, with nothing
    changed, if the file as a whole is not valid, or for `create` if Redis has other rows; LimiterUnavailable if Redis
    becomes unavailable, after which the same import can be repeated.

    Args:
        session: the Redis to store in.
        path: of the file.
        mode: `create` needs a Redis without rows other than those of this file, as a repeat finds it; `merge` keeps the
            larger counters; `replace` overwrites.
        dry_run: only report what would be done.
        on_progress: called after each batch.
    """
    now_ms = await session.server_time_ms()
    rejected_path = path.parent / f"{path.name}.rejected.json"
    with LedgerFile(path) as file, SideFile(rejected_path, "rejected") as rejected_file:
        run = _Import(session, file, now_ms, None if dry_run else rejected_file, on_progress)
        await run.check()
        if dry_run:
            answers = await run.compared(mode)
        else:
            async with exclusive_import(session) as still_ours:
                answers = await run.compared(mode) if mode == "create" else Counter()
                if not answers or answers.total() != answers[PutStatus.SAME]:
                    try:
                        answers = await run.store(mode, still_ours)
                    finally:
                        session.announce_bulk_change()
        return ImportReport(
            total=run.total,
            new=answers[PutStatus.CREATED],
            same=answers[PutStatus.SAME],
            changed=answers[PutStatus.MERGED] + answers[PutStatus.REPLACED],
            rejected=run.rejected,
            faults=dict(run.faults.most_common()),
            first_rejected=tuple(run.first_rejected),
            rejected_file=None if dry_run else await rejected_file.publish(),
            dry_run=dry_run,
        )


class _Import:
    """The passes of one import over its file. All of them use the same time, so that they yield the same rows."""

    def __init__(
        self,
        session: Session,
        file: LedgerFile,
        now_ms: int,
        rejected_file: SideFile | None,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self.total = self.rejected = self.good = 0
        self.first_rejected: list[Rejected] = []
        self.faults: Counter[str] = Counter()
        self._session, self._file, self._now_ms = session, file, now_ms
        self._rejected_file, self._on_progress = rejected_file, on_progress
        self._writer = RowWriter(session, self._reject)
        self._cancel = CancelWatch()

    async def check(self) -> None:
        """Read the whole file, noting the rows that are not valid. Raises LedgerFileError if the file is not."""
        is_intact = await in_thread(_is_intact, self._file.path)
        for entry in self._file.entries():
            self.total += 1
            if not entry.is_regular:
                try:
                    entry.row(now_ms=self._now_ms)
                except LedgerRowError as error:
                    await self._reject(Rejection(entry, reason=str(error), fault=error.fault))
            if self.total % BATCH_ROWS == 0:
                self._report("check", self.total)
                await asyncio.sleep(0)  # let other tasks run, and notice a cancellation
        self._report("check", self.total)
        self.good = self.total - self.rejected
        if not is_intact and self._file.has_checksum:
            raise LedgerFileError(
                f"{self._file.path} is not as it was written: its checksum does not match. Use an older one (limiter "
                "verify shows which are good), or delete its member meta if you changed it on purpose"
            )

    async def compared(self, mode: PutMode) -> "Counter[PutStatus]":
        """Count, by status, what storing every good row would do.

        Raises LedgerFileError for the mode `create` if Redis has other rows.
        """
        stored = await _count_rows(self._session) if mode == "create" else 0
        if mode == "create" and not stored:
            return Counter({PutStatus.CREATED: self.good})
        answers: Counter[PutStatus] = Counter()
        rows = 0
        for batch in self._batches():
            answers += await self._writer.preview(batch, mode)
            rows += len(batch)
            self._report("compare", rows)
        if mode == "create":
            _refuse_other_rows(self._file.path, stored, answers)
        return answers

    async def store(self, mode: PutMode, still_ours: StillOurs) -> "Counter[PutStatus]":
        """Store every good row, and count them by status. The next batch is read while Redis stores one.

        still_ours: raises if another import began; batches under way are still stored. An error that ends it early
        has the number of rows that are stored.
        """
        answers: Counter[PutStatus] = Counter()
        rows = 0
        sent: deque[tuple[int, asyncio.Task[Counter[PutStatus]]]] = deque()
        batches = self._batches()
        self._report("write", 0)
        try:
            while True:
                while len(sent) < _BATCHES_SENT and (batch := next(batches, None)):
                    await still_ours()
                    sent.append((len(batch), asyncio.create_task(self._writer.store(batch, mode))))
                    await asyncio.sleep(0)
                if not sent:
                    return answers
                answers += await sent[0][1]
                rows += sent.popleft()[0]
                self._report("write", rows)
        except LimiterError as error:
            cause = str(error).rstrip(".")
            error.args = (f"{cause}. Of {self.good:,} rows {rows:,} or more are in, each whole: import the file again",)
            raise
        finally:
            for _, task in sent:
                task.cancel()
            await asyncio.gather(*(task for _, task in sent), return_exceptions=True)

    def _batches(self) -> Iterator[list[GoodEntry]]:
        batch: list[GoodEntry] = []
        for entry in self._file.entries():
            try:
                batch.append(
                    RegularEntry(entry) if entry.is_regular else ParsedEntry(entry, entry.row(now_ms=self._now_ms))
                )
            except LedgerFileError:  # noted by `check`
                continue
            if len(batch) == BATCH_ROWS:
                yield batch
                batch = []
        if batch:
            yield batch

    async def _reject(self, rejection: Rejection) -> None:
        entry, reason, fault = rejection
        self.rejected += 1
        self.faults[fault if fault in self.faults or len(self.faults) < _FAULTS_KEPT else "other faults"] += 1
        if len(self.first_rejected) < _REASONS_KEPT:
            self.first_rejected.append(Rejected(entry.install_id, reason))
        if self._rejected_file is not None:
            await self._rejected_file.add({"install_id": entry.install_id, "reason": reason, "row": entry.member})

    def _report(self, phase: Phase, rows: int) -> None:
        self._cancel.check()
        if self._on_progress is not None:
            read_bytes = self._file.read_bytes if rows else 0  # or a new phase would begin at the end of the last one
            self._on_progress(Progress(phase, rows, read_bytes, self._file.size_bytes))


def _is_intact(path: Path) -> bool:
    try:
        return check_trailer(path).is_intact
    except OSError as error:
        raise LedgerFileError(f"{path} cannot be read: {error.strerror}") from error


def _refuse_other_rows(path: Path, stored: int, answers: "Counter[PutStatus]") -> None:
    differing = answers[PutStatus.EXISTS]
    others = max(0, stored - differing - answers[PutStatus.SAME])
    if differing or others:
        raise LedgerFileError(
            f"Redis has {differing} rows that differ from those of {path}, and {others} that it does not have; nothing "
            "was changed. --merge keeps the larger counters, --replace lets the file win; rows that only Redis has stay"
        )


async def _count_rows(session: Session) -> int:
    """Count the rows of this prefix."""
    return sum([len(names) async for names in scan_keys(session)])
