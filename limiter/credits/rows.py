"""Rows as Redis holds them: decoding one hash, reading them all. Reading only; `backup.row_writer` writes."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from redis.exceptions import RedisError

from limiter._util.timestamps import is_canonical, ms_from_iso
from limiter.credits.keys import Keys
from limiter.credits.models import CORE, FIELDS, MAX_COUNT, FieldKind, Flow, HeldCredits, Mark, Row
from limiter.credits.session import Session
from limiter.errors import BrokenRow, LimiterUnavailable
from limiter.redis.errors import translate_error
from limiter.redis.multiplexed import CommandChannel
from limiter.redis.resp import HGETALL, Template
from limiter.redis.scan import scan

Fields = Mapping[bytes, bytes]  # a hash as redis-py returns it
Values = list[bytes | None]  # of some of its fields
_READ_S = 5.0
_INTEGER = re.compile(r"\d{1,20}", re.ASCII)  # a bound, for Python does not convert thousands of digits
_HOLD = re.compile(r"(gemini|hardware) (\S+) (lifetime|monthly) (\d{1,20}) (\d{1,20})", re.ASCII)
_FLOW = re.compile(r"(\d{1,20})(?: (\d{1,20}) (\d{1,20}) (\d{1,20}))?", re.ASCII)
_MARK = re.compile(r"(\d{1,20})(?: (\d{1,20}))?", re.ASCII)
_COUNTS = range(MAX_COUNT + 1)
_DAYS = range(1, 32)


async def read_row(session: Session, install_id: str) -> Row | None:
    """Read one row as it is stored; None if there is none. Raises BrokenRow, LimiterUnavailable."""
    key = session.keys.install(install_id)
    fields = await session.command(session.redis.hgetall(key), key)
    return decode_row(session.keys, key, cast("Fields", fields)) if fields else None


async def scan_keys(session: Session) -> AsyncIterator[list[bytes]]:
    """Yield the key of every row, once each and in no order, in the batches of SCAN. Raises LimiterUnavailable.

    A row that is created or deleted meanwhile may be among them or not. It takes 12 to 24 bytes of memory a row, to
    recognise a key that SCAN returns twice while the key space is resized.
    """
    try:
        async for names in scan(session.redis, session.keys.install_pattern):
            yield names
    except (RedisError, OSError, TimeoutError) as error:
        raise translate_error(error, session.keys.install_pattern) from error


async def read_values(channel: CommandChannel, names: Sequence[bytes], fields: Template) -> list[Values | Exception]:
    """Read some fields of many rows in one round trip: None for a missing one, or redis-py's error.

    They go over the channel, where a row costs a fourth of what it does in a pipeline of redis-py 8.1. fields: from
    `hmget`, so that their names are encoded once for many reads. Raises LimiterUnavailable.
    """
    return await _answers(channel, names, fields)


async def read_fields(channel: CommandChannel, names: Sequence[bytes]) -> list[Fields | Exception]:
    """Read many rows whole in one round trip: no fields for a missing one, or redis-py's error.

    Raises LimiterUnavailable.
    """
    answers = await _answers(channel, names, HGETALL)
    return [each if isinstance(each, Exception) else dict(zip(each[::2], each[1::2], strict=True)) for each in answers]


async def _answers(channel: CommandChannel, names: Sequence[bytes], template: Template) -> list[Any]:
    calls = [channel.send(name.decode(errors="replace"), template.fill_bytes(name), _READ_S) for name in names]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    for answer in answers:
        if isinstance(answer, LimiterUnavailable):
            raise answer
    return answers


def row_or_error(keys: Keys, name: bytes, fields: "Fields | Exception") -> Row | BrokenRow:
    """Decode what `read_fields` returned for a key; a broken row becomes its error. Raises LimiterUnavailable."""
    key = name.decode(errors="backslashreplace")
    if isinstance(fields, Exception):
        error = translate_error(fields, key)
        if isinstance(error, BrokenRow):
            return error
        raise error from fields
    try:
        return decode_row(keys, key, fields)
    except BrokenRow as error:
        return error


def decode_row(keys: Keys, key: str, fields: Fields) -> Row:
    """Read a row's fields. Raises BrokenRow, which names key and field."""
    text = {name.decode(errors="replace"): value.decode(errors="replace") for name, value in fields.items()}
    stored = _RowFields(key, text)
    began = stored.value("last_renewal_at", FieldKind.TIME, "")
    implied = {
        FieldKind.TIER: CORE,
        FieldKind.COUNT: "0",
        FieldKind.DAY: str(int(began[8:10])),
        FieldKind.TIME: began,
        FieldKind.OTHERS: "",
    }
    values = {name: stored.value(name, kind, implied[kind]) for name, kind, _ in FIELDS}
    holds = tuple(stored.hold(name) for name in text if name.startswith("hold:"))
    return Row(
        install_id=keys.install_id(key),
        **values,
        holds=holds,
        flow=stored.flow(),
        streams=tuple(stored.mark(name) for name in text if name.startswith("run:")),
        left=tuple(stored.mark(name) for name in text if name.startswith("left:")),
    )


@dataclass(frozen=True, slots=True)
class _RowFields:
    """The fields of one row, as text. Each method reads one of them, or raises BrokenRow."""

    key: str
    text: Mapping[str, str]

    def value(self, name: str, kind: FieldKind, implied: str) -> Any:
        """Return the field's value, an int for a count or a day. implied: the value of a missing field."""
        text = self.text.get(name, implied)
        if not _IS_VALID[kind](text):
            raise self._broken(name, kind.value)
        return int(text) if kind in _INTEGERS else text

    def hold(self, name: str) -> HeldCredits:
        parts = _HOLD.fullmatch(self.text[name])
        if parts is None:
            raise self._broken(name, "text like 'gemini pro monthly 1 1780000000000'")
        backend, tier, counter, cost, expires_ms = parts.groups()
        return HeldCredits(name.removeprefix("hold:"), backend, tier, counter, int(cost), int(expires_ms))

    def flow(self) -> Flow | None:
        if "flow" not in self.text:
            return None
        parts = _FLOW.fullmatch(self.text["flow"])
        if parts is None:
            raise self._broken("flow", "text like '1780000000000' or '1780000000000 1780000000000 2 1780000000000'")
        return Flow(*(int(part or 0) for part in parts.groups()))

    def mark(self, name: str) -> Mark:
        parts = _MARK.fullmatch(self.text[name])
        if parts is None:
            raise self._broken(name, "text like '1780000000000'")
        until_ms, retries = parts.groups()
        return Mark(name.partition(":")[2], int(until_ms), int(retries or 0))

    def _broken(self, name: str, want: str) -> BrokenRow:
        return BrokenRow(self.key, f"field {name} is {self.text.get(name, '')[:80]!r}, want {want}")


def _is_integer(text: str, allowed: range) -> bool:
    return _INTEGER.fullmatch(text) is not None and int(text) in allowed


def _is_time(text: str) -> bool:
    try:
        return is_canonical(text) and ms_from_iso(text) is not None
    except ValueError:
        return False


def _is_object(text: str) -> bool:
    try:
        return not text or isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


_INTEGERS = frozenset({FieldKind.COUNT, FieldKind.DAY})
_IS_VALID: Mapping[FieldKind, Callable[[str], bool]] = {
    FieldKind.TIER: lambda _: True,
    FieldKind.COUNT: lambda text: _is_integer(text, _COUNTS),
    FieldKind.DAY: lambda text: _is_integer(text, _DAYS),
    FieldKind.TIME: _is_time,
    FieldKind.OTHERS: _is_object,
}
