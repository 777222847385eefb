"""Times as the rows hold them: UTC text in the form of JavaScript's toISOString, and epoch milliseconds."""

import re
from datetime import UTC, datetime, timedelta

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_ISO = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", re.ASCII)


def iso_from_ms(ms: int) -> str:
    """Print epoch milliseconds as `2026-05-11T23:02:57.123Z`."""
    moment = _EPOCH + timedelta(milliseconds=ms)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.").rjust(20, "0") + f"{moment.microsecond // 1000:03d}Z"


def ms_from_iso(text: str) -> int:
    """Read `2026-05-11T23:02:57.123Z`, or any ISO 8601 form that has a date; without an offset it is UTC.

    Raises ValueError for anything else.
    """
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return (moment - _EPOCH) // timedelta(milliseconds=1)


def is_canonical(text: str) -> bool:
    """Tell whether the text is already in the stored form."""
    return _ISO.fullmatch(text) is not None
