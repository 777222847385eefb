"""A file beside a ledger, for rows that the ledger cannot have: rejected by an import, or unreadable to a dump."""

import asyncio
from pathlib import Path
from types import TracebackType
from typing import Self

from limiter._util.atomic_file import AtomicFile, in_thread
from limiter.errors import LedgerFileError
from limiter.ledger.row_codec import json_bytes


class SideFile:
    """A JSON file `{"<word>": […]}`, one item a line; it is created with its first item."""

    def __init__(self, path: Path, word: str) -> None:
        self.path = path
        self.count = 0
        self._word = word
        self._file: AtomicFile | None = None
        self._adding = asyncio.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.discard()

    async def add(self, item: dict[str, object]) -> None:
        """Append an item; concurrent calls are safe. Raises LedgerFileError."""
        async with self._adding:
            text = (b",\n" if self.count else b'{"%s": [\n' % self._word.encode()) + json_bytes(item)
            try:
                if self._file is None:
                    self._file = AtomicFile(self.path)
                await in_thread(self._file.write, text)
            except OSError as error:
                raise LedgerFileError(f"{self.path} cannot be written: {error.strerror or error}") from error
            self.count += 1

    async def publish(self) -> Path | None:
        """Publish the file, and return its path; None if there are no items. Raises LedgerFileError."""
        if self._file is None:
            return None
        try:
            await in_thread(self._file.write, b"\n]}\n")
            await in_thread(self._file.publish)
        except OSError as error:
            raise LedgerFileError(f"{self.path} cannot be written: {error.strerror or error}") from error
        return self.path
