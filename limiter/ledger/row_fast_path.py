"""Rows of credits.json in the form that nearly all of them have, read and written by one pattern each.

Pure: no file, no Redis, no clock. Rows of any other form, which may be as good, are left to `row_codec`.
"""

import re
from collections.abc import Sequence
from typing import Any

from limiter.credits.models import FIELDS, TIER_NAME, FieldKind, Row

# The stored form, except 29 February: valid as it stands, and nearly all times have it. Others go to `row_codec`.
COMMON_TIME = re.compile(
    r"(?:19[7-9]\d|2\d{3})-(?:(?:0[1-9]|1[0-2])-(?:0[1-9]|1\d|2[0-8])|(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31)"
    r"T(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d\.\d{3}Z",
    re.ASCII,
)
# For each kind, the values that are valid as they stand, and are printed unchanged.
_COMMON = {
    FieldKind.TIER: TIER_NAME.pattern,
    FieldKind.COUNT: r"0|[1-9]\d{0,14}",
    FieldKind.DAY: r"[1-9]|[12]\d|3[01]",
    FieldKind.TIME: COMMON_TIME.pattern,
}
_QUOTE = {FieldKind.TIER: '"', FieldKind.COUNT: "", FieldKind.DAY: "", FieldKind.TIME: '"'}
_REQUIRED = [each for each in FIELDS if each.default is None]
_INTEGERS = [at for at, each in enumerate(_REQUIRED, 1) if not _QUOTE[each.kind]]
# A member of `rows` as both ledgers write nearly all of them, with its comma: valid as it stands.
# The groups are the install id and the values of the required fields; a row with an optional one has another form.
REGULAR_ROW = re.compile(
    r'"([a-z0-9._-]{1,64})":{"install_id":"\1",'
    + ",".join(f'"{name}":{_QUOTE[kind]}({_COMMON[kind]}){_QUOTE[kind]}' for name, kind, _ in _REQUIRED)
    + r"},\n?",
    re.ASCII,
)
_NOT_STORED = [None] * (len(FIELDS) - len(_REQUIRED))
_EMPTY_LINES = "\n" * len(_NOT_STORED)
# A whole row as Redis has it, one stored value a line: the checks of `row_codec.line_from_row` in one pattern.
_COMMON_ROW = re.compile(
    "\n".join(("[a-z0-9._-]{1,64}", *(f"(?:{_COMMON[each.kind]})" for each in _REQUIRED))).encode()
)
_COMMON_LINE = (
    '"%b":{"install_id":"%b",'
    + ",".join(f'"{name}":{_QUOTE[kind]}%b{_QUOTE[kind]}' for name, kind, _ in _REQUIRED)
    + "}"
).encode()


def row_from_groups(groups: Sequence[str]) -> Row:
    """Return the row of a match of REGULAR_ROW."""
    values: list[Any] = list(groups)
    for at in _INTEGERS:
        values[at] = int(values[at])
    return Row(*values)


def stored_text_from_groups(groups: Sequence[str]) -> str:
    """Return what create_rows.lua stores for a match of REGULAR_ROW, as `credits.scripts.stored_text` does of a row."""
    return "\n".join(groups[1:]) + _EMPTY_LINES


def line_from_values(install_id: bytes, values: list[bytes | None]) -> bytes | None:
    """Return the line of a row as Redis has it, if it is of the regular form; else None: it may be as good.

    values: of STORED_FIELDS. The line is the one that `row_codec.line_from_row` returns in ten times as long.
    """
    own = values[: len(_REQUIRED)]
    if values[len(_REQUIRED) :] != _NOT_STORED or None in own:
        return None
    if not _COMMON_ROW.fullmatch(b"\n".join((install_id, *own))):  # type: ignore[arg-type]  # None was excluded
        return None
    return _COMMON_LINE % (install_id, install_id, *own)
