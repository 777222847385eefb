"""Deleting rows that nobody needs: never debited, holding nothing, unused for long. And the notes of it for dumps."""

import asyncio
import time
from dataclasses import dataclass
from enum import StrEnum
from typing import cast

from limiter._util.ids import random_id
from limiter._util.timestamps import iso_from_ms, ms_from_iso
from limiter.credits.rows import read_values, scan_keys
from limiter.credits.session import Session
from limiter.redis.resp import hmget

DAY_MS = 86_400_000
_COUNTERS = ("lifetime_consumed", "lifetime_gemini_consumed", "monthly_consumed", "monthly_gemini_consumed")
_FIELDS = hmget((*_COUNTERS, "last_active_at"))
_NOTES_KEPT_MS = 30 * DAY_MS
_PART_S = 60  # a dump counts all of a part in which it began


class PruneStatus(StrEnum):
    """The result of prune_row.lua."""

    PRUNED = "PRUNED"
    KEPT = "KEPT"


class NoteStatus(StrEnum):
    """The result of prune_note.lua."""

    NOTED = "NOTED"


@dataclass(frozen=True, slots=True)
class PruneReport:
    """The result of a prune. rows: how many there were. pruned: how many were deleted, or would be."""

    rows: int
    pruned: int


async def prune_unused(session: Session, *, unused_ms: int, dry_run: bool = False) -> PruneReport:
    """Delete the rows that were never debited, hold nothing, and were not used for so long. Raises LimiterUnavailable.

    Each of them is looked at again by the script that deletes it. dry_run: only count them.
    """
    cutoff = iso_from_ms(await session.retry(session.server_time_ms) - unused_ms).encode()
    pruner, notes, rows, pruned = Pruner(session), PruneNotes(session), 0, 0
    async for names in scan_keys(session):
        rows += len(names)
        unused = []
        for name, values in zip(names, await read_values(session.channel, names, _FIELDS), strict=True):
            if isinstance(values, Exception) or not name.isascii():
                continue  # no row, or a broken one: it stays
            *counts, active = values
            if active is not None and active <= cutoff and not any(count not in (None, b"0") for count in counts):
                unused.append(name.decode())
        if not unused:
            continue
        if not dry_run:
            await notes.add(len(unused))
        calls = [pruner.prune(key, unused_ms=unused_ms, dry_run=dry_run) for key in unused]
        here = (await asyncio.gather(*calls)).count(PruneStatus.PRUNED)
        if not dry_run and here < len(unused):
            await notes.add(here - len(unused))
        pruned += here
    return PruneReport(rows, pruned)


class Pruner:
    """Runs prune_row.lua."""

    __slots__ = ("_scripts", "_session")

    def __init__(self, session: Session) -> None:
        self._session = session
        self._scripts = session.scripts()

    async def prune(self, row_key: str, *, unused_ms: int, dry_run: bool) -> PruneStatus:
        """Delete a row, if it still may be. Raises LimiterUnavailable."""
        arguments = (unused_ms, int(dry_run), self._session.now_ms())
        reply = await self._session.retry(lambda: self._scripts.call("prune_row", row_key, *arguments))
        return PruneStatus(reply[0].decode())


class PruneNotes:
    """Notes in Redis how many rows a prune deletes, by the minute. Methods raise LimiterUnavailable."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._scripts = session.scripts()
        self._run = random_id()
        self._part, self._rows = "", 0

    async def add(self, rows: int) -> None:
        """Note more rows, before they are deleted: a dump meanwhile must not take them for lost."""
        part = f"{self._run}:{time.monotonic() // _PART_S:.0f}"
        self._part, self._rows = part, max(0, rows + (self._rows if part == self._part else 0))
        await self.note(part, self._rows)

    async def note(self, part: str, rows: int, *, keep_ms: int = _NOTES_KEPT_MS) -> NoteStatus:
        """Run prune_note.lua."""
        key, arguments = self._session.keys.pruned(), (part, rows, keep_ms, self._session.now_ms())
        reply = await self._session.retry(lambda: self._scripts.call("prune_note", key, *arguments))
        return NoteStatus(reply[0].decode())


async def pruned_since(session: Session, at: str) -> int:
    """Return how many rows were pruned since a time, or some more. Raises LimiterUnavailable. at: as ISO text."""
    key, since_ms = session.keys.pruned(), ms_from_iso(at)
    notes = await session.retry(lambda: session.command(session.redis.hgetall(key), key))
    pruned = 0
    for note in cast("dict[bytes, bytes]", notes).values():
        noted_ms, _, rows = note.decode().partition(" ")
        if int(noted_ms) >= since_ms:
            pruned += int(rows)
    return pruned
