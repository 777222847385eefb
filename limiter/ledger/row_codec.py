"""One row of credits.json: from the file's JSON to a Row, by the rules of the old ledger, and from a Row to its line.

Pure: no file, no Redis, no clock. The rules are those of credits.js, which loads and migrates a file when it starts.
Nearly all rows need none of them: `row_fast_path` matches those with one pattern.
"""

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from operator import attrgetter
from typing import Any

import orjson

from limiter._util.timestamps import iso_from_ms
from limiter.credits.keys import normalise_install_id
from limiter.credits.models import CORE, MAX_COUNT, MEMBERS, ROW_MEMBERS, TIER_NAME, FieldKind, Row
from limiter.errors import InvalidInstallId, LedgerFileError, LedgerRowError
from limiter.ledger.row_fast_path import COMMON_TIME
from limiter.ledger.strict_json import DECODER, RefusedJson

MAX_EXTRA_BYTES = 64 * 1024
_OWN = frozenset(ROW_MEMBERS)
_MONTH = re.compile(r"(\d{4})-(\d{2})", re.ASCII)
# What both ISO 8601 and `new Date()` parse, and parse alike. Without an offset a time is local to JavaScript.
_TIME = re.compile(
    r"(\d{4})(?:-(\d\d)(?:-(\d\d)(?:T(\d\d):(\d\d)(?::(\d\d)(?:\.(\d{1,9}))?)?(Z|[+-]\d\d:\d\d))?)?)?", re.ASCII
)
_FIRST_YEAR, _LAST_YEAR = (
    1970,
    9998,
)  # the calendar of the scripts counts from 1970, and a renewal must have a year of four digits
_FIRST_ISO, _END_ISO = f"{_FIRST_YEAR}-", f"{_LAST_YEAR + 1}-"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)
_VALUES = attrgetter(*ROW_MEMBERS)
_OPTIONAL = [(each.name, each.default) for each in MEMBERS if each.default is not None]
_SHOWN_CHARACTERS = 60


class _Unusable(ValueError):  # noqa: N818  a value that is
    """A value that a row cannot have. fault: the message without the value, so that faults can be counted."""

    def __init__(self, what: str, value: str, want: str) -> None:
        super().__init__(f"{what} {value}, want {want}")
        self.fault = f"{what.rpartition(' ')[0]}: want {want}"


def row_from_member(install_id: str, member: object, *, now_ms: int) -> Row:
    """Read one member of `rows`, migrating what an old ledger may hold.

    member: JSON as Python values; a number may be a Decimal. now_ms: the start of the period of a row without one.
    Raises LedgerRowError, which names the install id and the cause.
    """
    try:
        return _row(install_id, member, now_ms)
    except InvalidInstallId as cause:
        raise LedgerRowError(install_id, str(cause), "the install id is not usable") from None
    except _Unusable as cause:
        raise LedgerRowError(install_id, str(cause), cause.fault) from None
    except ValueError as cause:
        raise LedgerRowError(install_id, str(cause), str(cause)) from None


def undated_fields(member: object) -> frozenset[str]:
    """Return the fields of its row that depend on the time of reading, as the file has no period; mostly none."""
    if not isinstance(member, dict) or not _is_undated(member) or _month_start(member) is not None:
        return frozenset()
    fields = {"last_renewal_at"}
    if _day(member.get("anniversary_day")) is None:
        fields.add("anniversary_day")
    if member.get("last_active_at") in (None, ""):
        fields.add("last_active_at")
    return frozenset(fields)


def line_from_row(row: Row) -> bytes:
    """Return the row as its line of credits.json, without comma and line end: `"<id>":{…}`.

    Raises LedgerFileError for a row that an import would reject, as one that was edited by hand.
    """
    try:
        return _line(row)
    except (ValueError, InvalidInstallId) as cause:
        raise LedgerFileError(f"row {row.install_id[:80]!r}: {cause}") from None


def merged_extra(stored: str, given: str) -> str:
    """Return the other members of both; those of `given` win. A stored text that is not a JSON object is dropped."""
    try:
        members = _members_of(stored) if stored else {}
    except ValueError:
        return given
    return extra_text(members | _members_of(given)) if given else stored


def extra_text(members: Mapping[str, object]) -> str:
    """Return other members as the JSON text that a row stores; "" for none. Raises ValueError when it is too long."""
    if not members:
        return ""
    text = json_bytes(members)
    if len(text) > MAX_EXTRA_BYTES:
        raise _Unusable("its other members are", f"{len(text)} bytes of JSON", f"at most {MAX_EXTRA_BYTES} bytes")
    return text.decode()


def json_bytes(value: object) -> bytes:
    """Print JSON values; a Decimal, and an integer of any size, with all its digits."""
    try:
        return orjson.dumps(value, default=_fragment)
    except TypeError:
        pass
    try:
        return orjson.dumps(_widened(value), default=_fragment)
    except TypeError as error:
        raise ValueError(f"it cannot be printed as JSON: {error}") from None


def kind_of(value: object) -> str:
    """Return the name of a value's JSON type, for errors."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str):
        return "a text"
    if isinstance(value, dict):
        return "an object"
    return "a list" if isinstance(value, list) else "a number"


def _row(install_id: str, member: object, now_ms: int) -> Row:
    if not isinstance(member, dict):
        raise _Unusable("it is", kind_of(member), "an object")
    key = normalise_install_id(install_id)
    named = member.get("install_id")
    if named is not None and named != install_id and (not isinstance(named, str) or normalise_install_id(named) != key):
        raise _Unusable("install_id is", _shown(named), "its key")
    tier = _tier(member, "tier_snapshot")
    others = member.keys() - _OWN
    if _is_undated(member):
        began = _month_start(member) or iso_from_ms(now_ms)
        others.discard("month")
    else:
        began = _time(member, "last_renewal_at")
    day = _day(member.get("anniversary_day"))
    values: dict[str, Any] = {
        "tier_snapshot": tier,
        "last_renewal_at": began,
        "anniversary_day": int(began[8:10]) if day is None else day,
    }
    for name, kind, _ in MEMBERS:
        if name not in values:
            values[name] = _counter(member, name) if kind is FieldKind.COUNT else _time_since(began, member, name)
    extra = extra_text({name: member[name] for name in member if name in others}) if others else ""
    return Row(install_id=key, **values, extra=extra)


def _tier(member: Mapping[str, object], name: str) -> str:
    value = member.get(name)
    if value is None:
        return CORE
    if not isinstance(value, str) or not TIER_NAME.fullmatch(value):
        raise _Unusable(f"{name} is", _shown(value), FieldKind.TIER.value)
    return value


def _counter(member: Mapping[str, object], name: str) -> int:
    value = member.get(name)
    if type(value) is int and 0 <= value <= MAX_COUNT:
        return value
    if value is None:  # the old ledger reads it as 0
        return 0
    # Bounds before int(): a Decimal of 1e999999999 has that many digits. 3.0 is an integer to JavaScript.
    if isinstance(value, float | Decimal) and 0 <= value <= MAX_COUNT and value == int(value):
        return int(value)
    raise _Unusable(f"{name} is", _shown(value), FieldKind.COUNT.value)


def _day(value: object) -> int | None:
    """Return a valid anniversary day; None for a value that the old ledger ignores, in favour of last_renewal_at."""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal) or not 1 <= value <= 31:  # noqa: PLR2004
        return None
    if value != int(value):
        raise _Unusable("anniversary_day is", _shown(value), FieldKind.DAY.value)
    return int(value)


def _is_undated(member: Mapping[str, object]) -> bool:
    """Return whether the old ledger would migrate it: last_renewal_at is missing, or falsy in JavaScript."""
    value = member.get("last_renewal_at")
    return value is None or (isinstance(value, str | int | float | Decimal) and not value)


def _month_start(member: Mapping[str, object]) -> str | None:
    """Return the first day of the row's `month`, by JavaScript's rules for Date.UTC: month 13 is the next January."""
    month = member.get("month")
    parts = _MONTH.fullmatch(month) if isinstance(month, str) else None
    if parts is None:
        return None
    year, index = int(parts[1]), int(parts[2]) - 1
    years, index = divmod(index, 12)
    year += years + (1900 if year <= 99 else 0)  # noqa: PLR2004  Date.UTC takes years 0 to 99 for 1900 to 1999
    if not _FIRST_YEAR <= year <= _LAST_YEAR:
        raise _Unusable("month is", _shown(month), f"a year from {_FIRST_YEAR} to {_LAST_YEAR}")
    return f"{year}-{index + 1:02d}-01T00:00:00.000Z"


def _time_since(began: str, member: Mapping[str, object], name: str) -> str:
    return began if member.get(name) in (None, "") else _time(member, name)


def _time(member: Mapping[str, object], name: str) -> str:
    value = member[name]
    if isinstance(value, str) and COMMON_TIME.fullmatch(value):
        return value
    moment = _moment(value) if isinstance(value, str) else None
    if moment is None:
        raise _Unusable(f"{name} is", _shown(value), FieldKind.TIME.value)
    if not _FIRST_YEAR <= moment.year <= _LAST_YEAR:
        raise _Unusable(f"{name} is", _shown(value), f"a year from {_FIRST_YEAR} to {_LAST_YEAR}")
    return iso_from_ms((moment - _EPOCH) // _MILLISECOND)


def _moment(text: str) -> datetime | None:
    parts = _TIME.fullmatch(text)
    if parts is None:
        return None
    year, month, day, hour, minute, second, fraction, zone = parts.groups()
    ends_day = hour == "24"  # both read 24:00 as the next day's midnight, and nothing after it
    if ends_day and (minute, int(second or 0), int(fraction or 0)) != ("00", 0, 0):
        return None
    try:
        moment = datetime(
            *(int(year), int(month or 1), int(day or 1)),
            *(0 if ends_day else int(hour or 0), int(minute or 0), int(second or 0)),
            int((fraction or "").ljust(3, "0")[:3]) * 1000,
            tzinfo=UTC if zone in (None, "Z") else datetime.strptime(zone, "%z").tzinfo,
        )
        return moment.astimezone(UTC) + timedelta(days=ends_day)
    except (ValueError, OverflowError):
        return None


def _line(row: Row) -> bytes:
    if normalise_install_id(row.install_id) != row.install_id:
        raise ValueError("its key is not in lower case")
    if not TIER_NAME.fullmatch(row.tier_snapshot):
        raise _Unusable("tier_snapshot is", _shown(row.tier_snapshot), FieldKind.TIER.value)
    for time in (row.last_renewal_at, row.last_active_at):
        if not _FIRST_ISO <= time < _END_ISO:
            raise ValueError(f"it has the time {time}, want a year from {_FIRST_YEAR} to {_LAST_YEAR}")
    members = dict(zip(ROW_MEMBERS, _VALUES(row), strict=True))
    for name, default in _OPTIONAL:
        if members[name] == default:
            del members[name]
    own = orjson.dumps(members)
    if row.extra:
        others = _members_of(row.extra)
        ours = others.keys() & _OWN
        if ours:
            raise ValueError(f"its extra has the member {min(ours)!r}, which is a field of its own")
        text = extra_text(others)
        own = own[:-1] + b"," + text[1:].encode() if text else own
    return b'"%s":%s' % (row.install_id.encode(), own)


def _members_of(text: str) -> dict[str, object]:
    try:
        members = DECODER.decode(text)
    except RecursionError:
        raise ValueError("its extra is nested too deeply") from None
    except (ValueError, RefusedJson) as error:
        raise ValueError(f"its extra is not valid JSON: {error}") from None
    if not isinstance(members, dict):
        raise ValueError(f"its extra is {kind_of(members)}, want an object")  # noqa: TRY004  it was edited by hand
    return members


def _fragment(value: object) -> orjson.Fragment:
    if isinstance(value, Decimal):
        return orjson.Fragment(str(value))
    raise TypeError(f"{type(value).__name__} is not a JSON value")


def _widened(value: object) -> object:
    """Turn integers into Decimals, which print with all digits: orjson's end at 64 bits."""
    if isinstance(value, int) and not isinstance(value, bool):
        return Decimal(value)
    if isinstance(value, Mapping):
        return {name: _widened(each) for name, each in value.items()}
    return [_widened(each) for each in value] if isinstance(value, list) else value


def _shown(value: object) -> str:
    text = json_bytes(value).decode()
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"
