"""credits.json, written: the rows as they come, to a file that takes the name of the old one when it is whole.

No Redis here. The form, which JSON.parse reads as the old ledger's:

    {"rows": {
    "<install id>":{…},
    "<install id>":{…}
    }, "meta": {"format":1,"time":"2026-05-11T23:02:57.123Z","rows":2,"checksum":"sha256:…"}}

The checksum is that of the lines between the first and the last: `sed '1d;$d' credits.json | sha256sum`.
"""

import hashlib
import os
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import orjson

from limiter.atomic_file import AtomicFile, in_thread
from limiter.errors import LedgerFileError
from limiter.ledger_row import json_bytes, line_from_row
from limiter.model import Row
from limiter.timestamps import iso_from_ms

FORMAT = 1
_WRITE_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class Written:
    """What `write_ledger` wrote. `stat` tells this file from any other that takes its name."""

    time: str
    rows: int
    size_bytes: int
    checksum: str
    kept: Path | None
    stat: os.stat_result


async def write_ledger(
    path: Path,
    rows: AsyncIterable[Row] | Iterable[Row],
    *,
    now_ms: int,
    unfit: Callable[[Row, LedgerFileError], Awaitable[None]] | None = None,
    before: Callable[[int], Awaitable[Path | None]] | None = None,
) -> Written:
    """Write the rows to a temp file beside `path`, bring it to disk, and rename it.

    unfit: told of each row that an import would not take back, which is left out; without it such a row is an error.
    before: called with the number of rows when all is written and nothing replaced. It may raise, to refuse, or give
    the name under which the replaced file stays. Raises LedgerFileError; then, as on any other error or
    cancellation, the file at `path` is as it was and the temp file gone.
    """
    time, count = iso_from_ms(now_ms), 0
    try:
        with AtomicFile(path) as file:
            lines = _Lines(file)
            await in_thread(file.write, b'{"rows": {\n')
            async with aclosing(_async(rows)) as given:
                async for row in given:
                    try:
                        line = line_from_row(row)
                    except LedgerFileError as error:
                        if unfit is None:
                            raise
                        await unfit(row, error)
                        continue
                    await lines.add(b",\n" + line if count else line)
                    count += 1
            await lines.flush(b"\n" if count else b"")
            checksum = f"sha256:{lines.digest.hexdigest()}"
            meta = {"format": FORMAT, "time": time, "rows": count, "checksum": checksum}
            await in_thread(file.write, b'}, "meta": %s}\n' % orjson.dumps(meta))
            kept = None if before is None else await before(count)
            status = await in_thread(file.publish, keep_as=kept)
    except OSError as error:
        raise LedgerFileError(f"{path} cannot be written: {error.strerror or error}; nothing was replaced") from error
    return Written(time, count, status.st_size, checksum, kept, status)


class _Lines:
    """The lines of the rows on their way to the file: gathered, summed up, and written in a thread."""

    def __init__(self, file: AtomicFile) -> None:
        self.digest = hashlib.sha256()
        self._file = file
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0

    async def add(self, line: bytes) -> None:
        self._waiting.append(line)
        self._waiting_bytes += len(line)
        if self._waiting_bytes >= _WRITE_BYTES:
            await self.flush()

    async def flush(self, end: bytes = b"") -> None:
        data = b"".join(self._waiting) + end
        self._waiting.clear()
        self._waiting_bytes = 0
        await in_thread(self._write, data)

    def _write(self, data: bytes) -> None:
        self.digest.update(data)
        self._file.write(data)


class ListFile:
    """A JSON file `{"<word>": […]}`, one item a line, of what a ledger cannot hold; it is made with its first item."""

    def __init__(self, path: Path, word: str) -> None:
        self.path = path
        self.count = 0
        self._word = word
        self._file: AtomicFile | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.discard()

    async def add(self, item: dict[str, object]) -> None:
        """Append an item. Raises LedgerFileError."""
        text = (b",\n" if self.count else b'{"%s": [\n' % self._word.encode()) + json_bytes(item)
        try:
            if self._file is None:
                self._file = AtomicFile(self.path)
            await in_thread(self._file.write, text)
        except OSError as error:
            raise LedgerFileError(f"{self.path} cannot be written: {error.strerror or error}") from error
        self.count += 1

    async def publish(self) -> Path | None:
        """Bring it under its name; None when there was nothing to write. Raises LedgerFileError."""
        if self._file is None:
            return None
        try:
            await in_thread(self._file.write, b"\n]}\n")
            await in_thread(self._file.publish)
        except OSError as error:
            raise LedgerFileError(f"{self.path} cannot be written: {error.strerror or error}") from error
        return self.path


async def _async(rows: AsyncIterable[Row] | Iterable[Row]) -> AsyncGenerator[Row, None]:
    if isinstance(rows, AsyncIterable):
        async for row in rows:
            yield row
    else:
        for row in rows:
            yield row
