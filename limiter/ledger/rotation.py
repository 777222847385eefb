"""The files that a credits.json replaced and that stay beside it, as `credits.json.20260511T230257.123Z`, by time.

Files of any other name are never removed, nor are those kept as `credits.json.before-…`. It blocks, and does not use
Redis.
"""

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from limiter._util.atomic_file import free_name
from limiter.ledger.trailer import Trailer, check_trailer, read_trailer

KEEP = 5  # with the file itself
_SUFFIX = re.compile(r"\.\d{8}T\d{6}\.\d{3}Z(-\d+)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Generation:
    """One of the files, or the current one. trailer: None if its last line cannot be read."""

    path: Path
    trailer: Trailer | None


def generation_name(path: Path, trailer: Trailer) -> Path:
    """Return a free name for a file that is about to be replaced."""
    return free_name(path, _stamp(trailer.time))


def set_aside_name(path: Path, time: str) -> Path:
    """Return a free name for a file that must not be lost: it may have rows that Redis does not have."""
    return free_name(path, f"before-{_stamp(time)}")


def generations(path: Path) -> list[Generation]:
    """List the file and those that it replaced, the latest first; those that cannot be read come last."""
    path = path.resolve()
    found = []
    for entry in _beside(path):
        if entry == path or _SUFFIX.fullmatch(entry.name.removeprefix(path.name)):
            trailer = None
            with contextlib.suppress(OSError):
                trailer = read_trailer(entry)
            found.append(Generation(entry, trailer))
    return sorted(
        found, key=lambda each: (each.trailer.age_key if each.trailer else (-1, -1), each.path.name), reverse=True
    )


def set_aside(path: Path) -> list[Path]:
    """List the files that were set aside because Redis did not have all of their rows."""
    path = path.resolve()
    return [entry for entry in _beside(path) if entry.name.startswith(f"{path.name}.before-")]


def prune(path: Path, keep: int) -> list[Path]:
    """Remove all but the latest `keep`, and return those that were removed.

    The current file is checked first: unless it is good, nothing is removed. The latest one with every row always
    stays. Raises OSError.
    """
    listed = [each for each in generations(path) if each.trailer is not None]
    spare = _spare(listed, keep)
    if not spare or not check_trailer(path).is_intact:
        return []
    for each in spare:
        each.unlink(missing_ok=True)
    return spare


def _spare(listed: Sequence[Generation], keep: int) -> list[Path]:
    whole = next((each for each in listed if each.trailer is not None and each.trailer.broken == 0), None)
    return [each.path for each in listed[keep:] if each is not whole]


def _beside(path: Path) -> list[Path]:
    return sorted(entry for entry in path.parent.iterdir() if entry.name.startswith(path.name) and entry.is_file())


def _stamp(time: str) -> str:
    return time.replace("-", "").replace(":", "")
