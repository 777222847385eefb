"""Conversion of the rows' times: UTC text in the format of JavaScript's toISOString, and epoch milliseconds."""

import re
from datetime import UTC, datetime, timedelta

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_ISO = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", re.ASCII)


def iso_from_ms(ms: int) -> str:
    """Format epoch milliseconds as `2026-05-11T23:02:57.123Z`."""
    moment = _EPOCH + timedelta(milliseconds=ms)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.").rjust(20, "0") + f"{moment.microsecond // 1000:03d}Z"


def ms_from_iso(text: str) -> int:
    """Parse `2026-05-11T23:02:57.123Z`, or any other ISO 8601 text with a date; UTC unless it has an offset.

    Raises ValueError for anything else.
    """
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return (moment - _EPOCH) // timedelta(milliseconds=1)


def is_canonical(text: str) -> bool:
    """Return whether the text is in the stored format already."""
    return _ISO.fullmatch(text) is not None
