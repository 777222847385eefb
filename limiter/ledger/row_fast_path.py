"""Rows of credits.json in the form that nearly all of them have, read and written in one look each.

Pure: no file, no Redis, no clock. What has any other form, and may be as good, is `ledger_row`'s to read and to write.
"""

import re
from collections.abc import Sequence

from limiter.credits.models import ROW_MEMBERS, TIER_NAME, Row

STORED_FIELDS = (*ROW_MEMBERS[1:], "extra")
# The stored form, but for 29 February: valid as it stands. Nearly all times are, so nothing else is looked at.
COMMON_TIME = re.compile(
    r"(?:19[7-9]\d|2\d{3})-(?:(?:0[1-9]|1[0-2])-(?:0[1-9]|1\d|2[0-8])|(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31)"
    r"T(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d\.\d{3}Z",
    re.ASCII,
)
_COUNT = r"(0|[1-9]\d{0,14})"
# A member of `rows` as both ledgers write nearly all of them, with its comma: valid as it stands, and read in one look.
# The groups are the values of ROW_MEMBERS.
REGULAR_ROW = re.compile(
    rf'"([a-z0-9._-]{{1,64}})":{{"install_id":"\1","tier_snapshot":"({TIER_NAME.pattern})",'
    rf'"lifetime_consumed":{_COUNT},"lifetime_gemini_consumed":{_COUNT},"last_renewal_at":"({COMMON_TIME.pattern})",'
    rf'"anniversary_day":([1-9]|[12]\d|3[01]),"monthly_consumed":{_COUNT},"monthly_gemini_consumed":{_COUNT},'
    rf'"last_active_at":"({COMMON_TIME.pattern})"}},\n?',
    re.ASCII,
)
_TIME = COMMON_TIME.pattern.encode()
# A whole row as Redis has it, its stored values a line each: what `ledger_row.line_from_row` would check, in one look.
_COMMON_ROW = re.compile(
    rb"[a-z0-9._-]{1,64}\n[A-Za-z0-9_-]{1,20}\n(?:(?:0|[1-9]\d{0,14})\n){2}%b\n(?:[1-9]|[12]\d|3[01])\n"
    rb"(?:(?:0|[1-9]\d{0,14})\n){2}%b" % (_TIME, _TIME)
)
_COMMON_LINE = (
    b'"%b":{"install_id":"%b",'
    + b",".join(
        b'"%b":%b' % (name.encode(), b"%b" if name.endswith(("_consumed", "_day")) else b'"%b"')
        for name in ROW_MEMBERS[1:]
    )
    + b"}"
)


def row_from_groups(groups: Sequence[str]) -> Row:
    """Give the row of what REGULAR_ROW found."""
    key, tier, lifetime, lifetime_gemini, began, day, monthly, monthly_gemini, active = groups
    counts = int(lifetime), int(lifetime_gemini)
    return Row(key, tier, *counts, began, int(day), int(monthly), int(monthly_gemini), active)


def line_from_values(install_id: bytes, values: Sequence[bytes | None]) -> bytes | None:
    """Give the line of a row as Redis has it, if it needs no second look; None for any other, which may be as good.

    values: of STORED_FIELDS. The line is what `ledger_row.line_from_row` gives in ten times as long.
    """
    *own, extra = values
    if extra is not None or None in own:
        return None
    if not _COMMON_ROW.fullmatch(b"\n".join((install_id, *own))):  # type: ignore[arg-type]  # None was seen to
        return None
    return _COMMON_LINE % (install_id, install_id, *own)
