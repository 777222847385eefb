"""Storing the rows of a ledger in Redis, a batch at a time, by create_rows.lua and put_row.lua only.

It reads no file and never decides what a row means.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

from redis.exceptions import ClusterCrossSlotError, RedisError

from limiter.credits.models import PutStatus, Row
from limiter.credits.rows import Fields, decode_row
from limiter.credits.scripts import PutMode, stored_text
from limiter.credits.session import Session
from limiter.errors import BrokenRow, ScriptContractError
from limiter.ledger.file import Entry
from limiter.ledger.row_codec import merged_extra
from limiter.ledger.row_fast_path import row_from_groups, stored_text_from_groups
from limiter.redis.errors import translate_error

_ROWS_IN_A_CALL = 20  # other calls wait for them, for less than half a millisecond
_TIMEOUT_MS = 30_000  # the server may be busy with other calls, and no client waits for an import


class RegularEntry(NamedTuple):
    """A valid row of a file, in the regular form: it becomes a Row only where one is needed."""

    entry: Entry

    def row(self) -> Row:
        """Return the row."""
        return row_from_groups(self.entry.groups)

    def text(self) -> str:
        """Return what create_rows.lua stores of it."""
        return stored_text_from_groups(self.entry.groups)


class ParsedEntry(NamedTuple):
    """A valid row of a file, in any other form, as it was decoded."""

    entry: Entry
    parsed: Row

    def row(self) -> Row:
        """Return the row."""
        return self.parsed

    def text(self) -> str:
        """Return what create_rows.lua stores of it."""
        return stored_text(self.parsed)


GoodEntry = RegularEntry | ParsedEntry


class Rejection(NamedTuple):
    """A row that is not stored. fault: what is wrong, in the same words for all rows with that fault."""

    entry: Entry
    reason: str
    fault: str


Reject = Callable[[Rejection], Awaitable[None]]


class RowWriter:
    """Stores batches in one Redis. reject: called with each row that cannot be stored.

    Methods raise LimiterUnavailable: some rows of the batch may then be stored, each of them as a whole.
    """

    def __init__(self, session: Session, reject: Reject) -> None:
        self._session, self._reject = session, reject
        self._scripts = session.scripts(timeout_ms=_TIMEOUT_MS)
        self._has_slots = False  # of a cluster, known after its first reply

    async def preview(self, batch: Sequence[GoodEntry], mode: PutMode) -> "Counter[PutStatus]":
        """Count, by status, what put_row would do with each row. Write nothing."""
        answers: Counter[PutStatus] = Counter()
        for item, answer in await self._put(batch, mode, dry_run=True):
            if not isinstance(answer, BrokenRow):
                answers[answer] += 1
            elif mode == "create":
                answers[PutStatus.EXISTS] += 1
            else:
                await self._reject_broken(item.entry, answer)
        return answers

    async def store(self, batch: Sequence[GoodEntry], mode: PutMode) -> "Counter[PutStatus]":
        """Create the new rows, many in a call, and put the others by put_row; count them by status."""
        others = await self._create(batch)
        answers = Counter({PutStatus.CREATED: len(batch) - len(others)})
        for item, answer in await self._put(others, mode, dry_run=False):
            if isinstance(answer, BrokenRow):
                await self._reject_broken(item.entry, answer)
                continue
            answers[answer] += 1
            if answer is PutStatus.EXISTS:
                fault = "Redis got another row of this install meanwhile"
                await self._reject(Rejection(item.entry, reason=fault, fault=fault))
        return answers

    async def _reject_broken(self, entry: Entry, error: BrokenRow) -> None:
        fault = "its row in Redis is broken"
        await self._reject(Rejection(entry, reason=f"{fault}: {error}", fault=fault))

    async def _create(self, batch: Sequence[GoodEntry]) -> Sequence[GoodEntry]:
        """Create the new rows, and return the others, which are left for put_row."""
        if self._has_slots:
            return batch
        calls = [batch[at : at + _ROWS_IN_A_CALL] for at in range(0, len(batch), _ROWS_IN_A_CALL)]
        answered = await asyncio.gather(*(self._create_some(call) for call in calls), return_exceptions=True)
        others: list[GoodEntry] = []
        for call, statuses in zip(calls, answered, strict=True):
            if isinstance(statuses, BaseException):  # the other calls have ended by now
                raise statuses
            others += [item for item, status in zip(call, statuses, strict=True) if status is not PutStatus.CREATED]
        return others

    async def _create_some(self, call: Sequence[GoodEntry]) -> list[PutStatus]:
        keys = [self._session.keys.install(item.entry.install_id) for item in call]
        texts = [item.text() for item in call]
        try:
            return await self._session.retry(lambda: self._scripts.create_rows(keys, texts))
        except ScriptContractError as error:
            if not isinstance(error.__cause__, ClusterCrossSlotError):
                raise
            self._has_slots = True  # a call must have rows of one slot there, and those of a file are not
            return [PutStatus.EXISTS] * len(call)

    async def _put(
        self, batch: Sequence[GoodEntry], mode: PutMode, *, dry_run: bool
    ) -> list[tuple[GoodEntry, PutStatus | BrokenRow]]:
        """Run put_row for each row, and return its replies."""
        settled = await self._settled(batch, mode)
        keys = [self._session.keys.install(row.install_id) for _, row in settled]
        attempts = (
            partial(self._scripts.put_row, key, row, mode=mode, dry_run=dry_run)
            for key, (_, row) in zip(keys, settled, strict=True)
        )
        answers = await asyncio.gather(*map(self._session.retry, attempts), return_exceptions=True)
        answered: list[tuple[GoodEntry, PutStatus | BrokenRow]] = []
        for (item, _), answer in zip(settled, answers, strict=True):
            if isinstance(answer, BaseException) and not isinstance(answer, BrokenRow):
                raise answer
            answered.append((item, answer))
        return answered

    async def _settled(self, batch: Sequence[GoodEntry], mode: PutMode) -> list[tuple[GoodEntry, Row]]:
        """Return the rows to send: fields that the file leaves open are filled from the stored row.

        The period of a row without one begins now, and a repeat runs at another time. And a merge keeps the other
        members of both. The read before the write is safe: a stored period only moves on, and put_row keeps a later
        one.
        """
        rows = [(item, item.row()) for item in batch]
        keys = [
            self._session.keys.install(row.install_id)
            for item, row in rows
            if item.entry.undated or (mode == "merge" and row.extra)
        ]
        if not keys:
            return rows
        pipeline = self._session.redis.pipeline(transaction=False)
        for key in keys:
            pipeline.hgetall(key)
        found = zip(keys, await _results_of(pipeline, keys[0]), strict=True)
        stored = {key: row for key, fields in found if (row := self._stored(key, fields))}
        settled: list[tuple[GoodEntry, Row]] = []
        for item, row in rows:
            known = stored.get(self._session.keys.install(row.install_id))
            try:
                settled.append((item, row if known is None else _filled(item, row, known, mode)))
            except ValueError as cause:
                fault = "it cannot be merged"
                await self._reject(Rejection(item.entry, reason=f"{fault}: {cause}", fault=fault))
        return settled

    def _stored(self, key: str, fields: "Fields | Exception") -> Row | None:
        if isinstance(fields, Exception) or not fields:
            return None  # put_row will report what is wrong with it
        try:
            return decode_row(self._session.keys, key, fields)
        except BrokenRow:
            return None


def _filled(item: GoodEntry, row: Row, stored: Row, mode: PutMode) -> Row:
    filled = replace(row, **{name: getattr(stored, name) for name in item.entry.undated})
    if mode == "merge":
        return replace(filled, extra=merged_extra(stored.extra, filled.extra))
    return filled if filled == stored else row


async def _results_of(pipeline: Any, key: str) -> list[Any]:
    try:
        return cast("list[Any]", await pipeline.execute(raise_on_error=False))
    except (RedisError, OSError, TimeoutError) as error:
        raise translate_error(error, key) from error
