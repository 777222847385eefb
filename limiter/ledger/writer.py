"""Writing credits.json: line by line, to a temporary file that replaces the old one when it is complete.

No Redis here. The format, which JSON.parse reads like the old ledger's:

    {"rows": {
    "<install id>":{…},
    "<install id>":{…}
    }, "meta": {…}}

`row_fast_path` and `row_codec` make the lines, `trailer` makes the last one.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from limiter._util.atomic_file import AtomicFile, in_thread
from limiter.errors import LedgerFileError
from limiter.ledger.trailer import HEAD, DumpedFile, Trailer, checksum_end, meta_line

A = TypeVar("A")
T = TypeVar("T")
_WRITE_BYTES = 256 * 1024


class LedgerWriter:
    """A new credits.json: `add` the rows, then `write_trailer` and `publish`.

    Unless it is published, the end of the `with` block removes the temporary file. Methods raise LedgerFileError; the
    file at `path` is then unchanged.
    """

    def __init__(self, path: Path) -> None:
        self.rows = 0
        self._path = path
        self._digest = hashlib.sha256()
        self._waiting: list[bytes] = [HEAD]
        self._waiting_bytes = 0
        self._trailer: Trailer | None = None
        try:
            self._file = AtomicFile(path)
        except OSError as error:
            raise _unwritten(path, error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.discard()

    async def add(self, lines: Sequence[bytes]) -> None:
        """Append rows, as lines that `line_from_row` returned."""
        if not lines:
            return
        text = b",\n".join(lines)
        self._waiting.append(b",\n" + text if self.rows else text)
        self._waiting_bytes += len(text)
        self.rows += len(lines)
        if self._waiting_bytes >= _WRITE_BYTES:
            await self._flush()

    async def rows_digest(self) -> bytes:
        """End the rows, and return their digest, equal for files with the same rows."""
        if self.rows:
            self._waiting.append(b"\n")
        await self._flush()
        return self._digest.digest()

    async def write_trailer(self, *, epoch: int, sequence: int, time: str, broken: int) -> Trailer:
        """Write the last line, after `rows_digest`, and sync the file to disk."""
        line = meta_line(epoch=epoch, sequence=sequence, time=time, rows=self.rows, broken=broken)
        self._waiting.append(line)
        await self._flush()
        self._trailer = Trailer(epoch, sequence, time, self.rows, broken, f"sha256:{self._digest.hexdigest()}")
        await self._run(self._end, checksum_end(self._trailer.checksum))
        return self._trailer

    async def publish(self, rows_digest: bytes, *, keep_as: Path | None) -> DumpedFile:
        """Replace the file at `path`. keep_as: the name under which the replaced file stays."""
        status = await self._run(self._publish, keep_as)
        return DumpedFile(self._trailer, is_intact=True, rows_digest=rows_digest, stat=status)

    async def _flush(self) -> None:
        data = b"".join(self._waiting)
        self._waiting.clear()
        self._waiting_bytes = 0
        await self._run(self._write, data)

    def _write(self, data: bytes) -> None:
        self._digest.update(data)
        self._file.write(data)

    def _end(self, data: bytes) -> None:
        self._file.write(data)
        self._file.sync()

    def _publish(self, keep_as: Path | None) -> os.stat_result:
        return self._file.publish(keep_as=keep_as)

    async def _run(self, function: Callable[[A], T], argument: A) -> T:
        try:
            return await in_thread(function, argument)
        except OSError as error:
            raise _unwritten(self._path, error) from error


def _unwritten(path: Path, error: OSError) -> LedgerFileError:
    return LedgerFileError(f"{path} cannot be written: {error.strerror or error}; nothing was replaced")
