"""Rows of a ledger on their way into Redis, a batch at a time. They go in through create_rows.lua and put_row.lua only.

It reads no file and never decides what a row means.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

from redis.exceptions import ClusterCrossSlotError, RedisError

from limiter.credits.models import Row, Status
from limiter.credits.rows import Fields, decode_row
from limiter.credits.scripts import PutMode, stored_text
from limiter.credits.session import Session
from limiter.errors import BrokenRow, ScriptContractError
from limiter.ledger.file import Entry
from limiter.ledger.row_codec import merged_extra
from limiter.ledger.row_fast_path import row_from_groups, stored_text_from_groups
from limiter.redis.errors import translate_error

_ROWS_IN_A_CALL = 20  # others wait for them, less than half a millisecond
_TIMEOUT_MS = 30_000  # the server may be busy with others, and no client waits for an import
Reject = Callable[[Entry, str, str], Awaitable[None]]  # the reason, and what of it all such rows have in common


class Item(NamedTuple):
    """A good row of a file. read: its row; None for an entry of the regular form, of which it follows."""

    entry: Entry
    read: Row | None

    @property
    def row(self) -> Row:
        """The row."""
        return row_from_groups(self.entry.groups) if self.read is None else self.read

    @property
    def text(self) -> str:
        """What create_rows.lua stores of it."""
        return stored_text_from_groups(self.entry.groups) if self.read is None else stored_text(self.read)


class RowWriter:
    """Sends batches to one Redis. reject: told of each row that Redis cannot take, and why.

    Methods raise LimiterUnavailable: then some rows of the batch may be in, each of them whole.
    """

    def __init__(self, session: Session, reject: Reject) -> None:
        self._session, self._reject = session, reject
        self._scripts = session.scripts(timeout_ms=_TIMEOUT_MS)
        self._has_slots = False  # of a cluster, once its first answer said so

    async def store(self, batch: Sequence[Item], mode: PutMode) -> "Counter[Status]":
        """Store the rows that Redis has not, many in a call, then the others as put_row does; count the answers."""
        others = await self._others_than_new(batch)
        answers = Counter({Status.CREATED: len(batch) - len(others)})
        return answers + await self.put(others, mode, asks=False) if others else answers

    async def _others_than_new(self, batch: Sequence[Item]) -> Sequence[Item]:
        """Store the rows that Redis has not, and give those that are left for put_row."""
        if self._has_slots:
            return batch
        calls = [batch[at : at + _ROWS_IN_A_CALL] for at in range(0, len(batch), _ROWS_IN_A_CALL)]
        answered = await asyncio.gather(*(self._created(call) for call in calls), return_exceptions=True)
        others: list[Item] = []
        for call, statuses in zip(calls, answered, strict=True):
            if isinstance(statuses, BaseException):  # the other calls are over by now
                raise statuses
            others += [item for item, status in zip(call, statuses, strict=True) if status is not Status.CREATED]
        return others

    async def _created(self, call: Sequence[Item]) -> list[Status]:
        keys = [self._session.keys.install(item.entry.install_id) for item in call]
        texts = [item.text for item in call]
        try:
            return await self._session.retry(lambda: self._scripts.create_rows(keys, texts))
        except ScriptContractError as error:
            if not isinstance(error.__cause__, ClusterCrossSlotError):
                raise
            self._has_slots = True  # a call's rows are in one slot there, and those of a file are not
            return [Status.EXISTS] * len(call)

    async def put(self, batch: Sequence[Item], mode: PutMode, *, asks: bool) -> "Counter[Status]":
        """Run put_row for each row, or with `asks` only find out what that would do; count the answers."""
        settled = await self._settled(batch, mode)
        calls = (
            self._session.retry(
                partial(self._scripts.put_row, self._session.keys.install(row.install_id), row, mode=mode, dry_run=asks)
            )
            for _, row in settled
        )
        answers: Counter[Status] = Counter()
        for (item, _), reply in zip(settled, await asyncio.gather(*calls, return_exceptions=True), strict=True):
            if not isinstance(reply, BaseException):
                answers[reply] += 1
                if reply is Status.EXISTS and not asks:
                    await self._reject(item.entry, *2 * ("Redis got another row of this install meanwhile",))
            elif not isinstance(reply, BrokenRow):
                raise reply
            elif asks and mode == "create":
                answers[Status.EXISTS] += 1
            else:
                await self._reject(item.entry, f"its row in Redis is broken: {reply}", "its row in Redis is broken")
        return answers

    async def _settled(self, batch: Sequence[Item], mode: PutMode) -> list[tuple[Item, Row]]:
        """Give the rows to send: what the file leaves open is filled from the row that is stored already.

        A row without a period began "now", and a repeat has another now. And a merge keeps the other members of both.
        This looks before it writes, which is safe: a stored period only moves on, and put_row lets a later one win.
        """
        rows = [(item, item.row) for item in batch]
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
        found = zip(keys, await _executed(pipeline, keys[0]), strict=True)
        stored = {key: row for key, fields in found if (row := self._stored(key, fields))}
        settled: list[tuple[Item, Row]] = []
        for item, row in rows:
            known = stored.get(self._session.keys.install(row.install_id))
            try:
                settled.append((item, row if known is None else _filled(item, row, known, mode)))
            except ValueError as cause:
                await self._reject(item.entry, f"it cannot be merged: {cause}", "it cannot be merged")
        return settled

    def _stored(self, key: str, fields: "Fields | Exception") -> Row | None:
        if isinstance(fields, Exception) or not fields:
            return None  # put_row says what is wrong with it
        try:
            return decode_row(self._session.keys, key, fields)
        except BrokenRow:
            return None


def _filled(item: Item, row: Row, stored: Row, mode: PutMode) -> Row:
    filled = replace(row, **{name: getattr(stored, name) for name in item.entry.undated})
    if mode == "merge":
        return replace(filled, extra=merged_extra(stored.extra, filled.extra))
    return filled if filled == stored else row


async def _executed(pipeline: Any, key: str) -> list[Any]:
    try:
        return cast("list[Any]", await pipeline.execute(raise_on_error=False))
    except (RedisError, OSError, TimeoutError) as error:
        raise translate_error(error, key) from error
