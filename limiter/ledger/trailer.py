"""The last line of a credits.json that limiter wrote: the writer's epoch, the time, the number of rows, a checksum.

    }, "meta": {"format":1,"epoch":3,"sequence":41,"time":"…","rows":2,"broken":0,"checksum":"sha256:…"}}

The checksum is that of every byte before its own member, as `head -c -88 credits.json | sha256sum` computes it, and
what follows it can have one form only: no change of a byte goes undetected. It blocks, and knows neither rows nor
Redis.
"""

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

FORMAT = 1
HEAD = b'{"rows": {\n'
CHECKSUM_BYTES = len(',"checksum":"sha256:"}}\n') + 64
_END = re.compile(
    rb'\}, "meta": \{"format":(\d{1,9}),"epoch":(\d{1,15}),"sequence":(\d{1,15}),"time":"([0-9TZ:.-]{24})"'
    rb',"rows":(\d{1,15}),"broken":(\d{1,15}),"checksum":"(sha256:[0-9a-f]{64})"\}\}\n\Z'
)
_END_BYTES = 512  # more than the line can have
_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Trailer:
    """The values of the last line.

    Args:
        epoch: of the writer's lease.
        sequence: the number of the dump.
        time: of the dump, as ISO text.
        rows: how many rows the file has.
        broken: how many rows were left out.
        checksum: of all before it.
    """

    epoch: int
    sequence: int
    time: str
    rows: int
    broken: int
    checksum: str

    @property
    def age_key(self) -> tuple[int, int]:
        """The sort key of files: a later dump has the larger one."""
        return self.epoch, self.sequence


@dataclass(frozen=True, slots=True)
class DumpedFile:
    """A file as it was found or published.

    Args:
        trailer: None without such a last line.
        is_intact: whether the checksum matches the file; False without a trailer.
        rows_digest: of all before the last line, equal for files with the same rows; empty unless intact.
        stat: of the file.
    """

    trailer: Trailer | None
    is_intact: bool
    rows_digest: bytes
    stat: os.stat_result

    def is_still(self, status: os.stat_result) -> bool:
        """Return whether a stat is that of this very file, unchanged."""
        return (
            os.path.samestat(status, self.stat)
            and status.st_mtime_ns == self.stat.st_mtime_ns
            and status.st_size == self.stat.st_size
        )


def meta_line(*, epoch: int, sequence: int, time: str, rows: int, broken: int) -> bytes:
    """Return the last line up to the checksum."""
    return b'}, "meta": {"format":%d,"epoch":%d,"sequence":%d,"time":"%s","rows":%d,"broken":%d' % (
        *(FORMAT, epoch, sequence, time.encode(), rows, broken),
    )


def checksum_end(checksum: str) -> bytes:
    """Return the rest of it."""
    return b',"checksum":"%s"}}\n' % checksum.encode()


def read_trailer(path: Path) -> Trailer | None:
    """Read the last line alone; None when it is not of this form. Raises OSError."""
    with path.open("rb") as stream:
        stream.seek(max(0, os.fstat(stream.fileno()).st_size - _END_BYTES))
        found = _END.search(stream.read(_END_BYTES))
    return None if found is None else _trailer(found)


def check_trailer(path: Path, *, on_read: Callable[[int], None] | None = None) -> DumpedFile:
    """Read the whole file and compare the checksum; rows are not looked at. Raises OSError."""
    with path.open("rb") as stream:
        status = os.fstat(stream.fileno())
        stream.seek(max(0, status.st_size - _END_BYTES))
        end = stream.read(_END_BYTES)
        found = _END.search(end)
        if found is None:
            return DumpedFile(None, is_intact=False, rows_digest=b"", stat=status)
        trailer = _trailer(found)
        stream.seek(0)
        digest, rest = hashlib.sha256(), status.st_size - (len(end) - found.start())
        while rest and (chunk := stream.read(min(rest, _READ_BYTES))):
            digest.update(chunk)
            rest -= len(chunk)
            if on_read is not None:
                on_read(len(chunk))
        rows_digest = digest.digest()
        digest.update(found[0][:-CHECKSUM_BYTES])
    is_intact = rest == 0 and int(found[1]) == FORMAT and trailer.checksum == f"sha256:{digest.hexdigest()}"
    return DumpedFile(trailer, is_intact=is_intact, rows_digest=rows_digest if is_intact else b"", stat=status)


def has_header(path: Path) -> bool:
    """Return whether a file begins like those that limiter writes. Raises OSError."""
    with path.open("rb") as stream:
        return stream.read(len(HEAD)) == HEAD


def _trailer(found: "re.Match[bytes]") -> Trailer:
    epoch, sequence, rows, broken = (int(found[group]) for group in (2, 3, 5, 6))
    return Trailer(epoch, sequence, found[4].decode(), rows, broken, found[7].decode())
