"""credits.json, read as a whole. The other parts of the format: `ledger_row` has the row, `ledger_writer` the writing.

No Redis here. It streams: memory does not grow with the file, but for 12 to 24 bytes an install id, by which
duplicates are told. What it gives up, it gives up with line, column and cause, and before anybody wrote anything.
"""

import os
import re
import stat
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NoReturn, Self

import ijson  # type: ignore[import-untyped]  # it has no type hints (3.6)

from limiter.errors import InvalidInstallId, LedgerFileError
from limiter.keys import normalise_install_id
from limiter.ledger_row import kind_of, row_from_member, undated_fields
from limiter.ledger_writer import Written, write_ledger
from limiter.model import Row
from limiter.seen import SeenTexts

__all__ = ["LedgerFile", "Written", "row_from_member", "undated_fields", "write_ledger"]

_CHUNK_BYTES = 64 * 1024
_MAX_ITEM_BYTES = 1024 * 1024  # of one row, or of one text elsewhere; what a ledger holds is far below
_MAX_DEPTH = 64
_MAX_NAMES = 64  # of the file itself: rows, meta, and whatever else somebody keeps there
_BOM = b"\xef\xbb\xbf"
_WIDE = (b"\xff\xfe", b"\xfe\xff")
# Half of a surrogate pair, escaped. yajl makes a question mark of the first half (ijson 3.6) and refuses the second.
_HALF = re.compile(rb"(?<!\\)(?:\\\\)*\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])")
_ESCAPE_BYTES = 12
_CONTINUATION = bytes(range(0x80, 0xC0))
_STARTS: dict[str, Callable[[], Any]] = {"start_map": dict, "start_array": list}
_ENDS = ("end_map", "end_array")
# What ijson raises for a file that is no JSON; SystemError and ArithmeticError for numbers beyond every range (3.6).
_NOT_JSON = (ijson.JSONError, ValueError, ArithmeticError, SystemError)
_Event = tuple[str, Any]


class LedgerFile:
    """An open credits.json, read from its start as often as asked. A `with` block closes it.

    It stays the same file when another takes its name meanwhile. Raises LedgerFileError when it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.meta: object = None  # known after a whole reading
        try:
            # Without O_NONBLOCK the open of a pipe would wait for its writer.
            self._stream: BinaryIO = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", 0)
            status = os.fstat(self._stream.fileno())
        except OSError as error:
            raise LedgerFileError(f"{path} cannot be read: {error.strerror}") from error
        if not stat.S_ISREG(status.st_mode):
            self._stream.close()
            raise LedgerFileError(f"{path} cannot be read: it is no regular file")
        self.size_bytes = status.st_size
        self.read_bytes = 0  # of the running reading, in chunks
        self._chunk_at = self._event = self._item_at = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def rows(self, *, now_ms: int) -> Iterator[tuple[str, Row | LedgerFileError]]:
        """Read every row; one that cannot be taken comes as its error. now_ms: where rows without a period begin.

        Raises LedgerFileError, with line, column and cause, where the file is broken as a whole.
        """
        for install_id, member in self.members():
            try:
                yield install_id, row_from_member(install_id, member, now_ms=now_ms)
            except LedgerFileError as error:
                yield install_id, error

    def members(self) -> Iterator[tuple[str, object]]:
        """Read every member of `rows` as it is: numbers are int or Decimal. Raises as `rows`."""
        events = self._events()
        opening, value = next(events)
        if opening != "start_map":
            self._fail(f"it is {_kind_of_event(opening, value)}, want an object with a member rows")
        names: set[str] = set()
        for event, name in events:
            if event == "end_map":
                break
            self._check_name(name, names)
            names.add(name)
            opening, value = next(events)
            if name == "rows":
                if opening != "start_map":
                    self._fail(f"rows is {_kind_of_event(opening, value)}, want an object")
                yield from self._rows(events)
            elif name == "meta":
                self.meta = self._value(events, opening, value)
            else:
                self._skip(events, opening)
        # Nothing follows, but the parser has yet to see that the file ends here.
        next(events, None)
        if "rows" not in names:
            self._fail("it has no member rows")

    def _check_name(self, name: str, names: Collection[str]) -> None:
        if name in names:
            self._fail(f"the member {name[:80]!r} is there twice")
        if len(names) == _MAX_NAMES:
            self._fail(f"it has more than {_MAX_NAMES} members beside rows")

    def _rows(self, events: Iterator[_Event]) -> Iterator[tuple[str, object]]:
        seen = SeenTexts()
        for event, install_id in events:
            if event == "end_map":
                return
            try:
                stored_id = normalise_install_id(install_id)
            except InvalidInstallId:
                stored_id = install_id
            if not seen.add(stored_id):
                self._fail(f"the install id {install_id[:80]!r} is there twice")
            yield install_id, self._value(events, *next(events))
            self._item_at = self._chunk_at

    def _value(self, events: Iterator[_Event], opening: str, scalar: object) -> object:
        """Build the value that begins with this event."""
        if opening not in _STARTS:
            return scalar
        root = current = _STARTS[opening]()
        outer: list[Any] = []
        name = ""
        for event, given in events:
            if event == "map_key":
                name = given
                if name in current:
                    self._fail(f"the member {name[:80]!r} is there twice")
                continue
            if event in _ENDS:
                if not outer:
                    break
                current = outer.pop()
                continue
            opens = _STARTS.get(event)
            value = given if opens is None else opens()
            if type(current) is list:
                current.append(value)
            else:
                current[name] = value
            if opens is not None:
                outer.append(current)
                current = value
                self._check_depth(outer)
        return root

    def _check_depth(self, outer: list[Any]) -> None:
        if len(outer) == _MAX_DEPTH:
            self._fail(f"it is nested more than {_MAX_DEPTH} deep")

    def _skip(self, events: Iterator[_Event], opening: str) -> None:
        depth = int(opening in _STARTS)
        while depth:
            event, _ = next(events)
            self._item_at = self._chunk_at
            depth += (event in _STARTS) - (event in _ENDS)

    def _events(self) -> Iterator[_Event]:
        """Parse the file. The parser stands in this object, so that an error can say where."""
        found = ijson.sendable_list()
        parser = ijson.basic_parse_coro(found)
        self.read_bytes = self._item_at = 0
        for start, chunk in self._chunks():
            self._chunk_at, self._event = start, -1
            self.read_bytes = start + len(chunk)
            if start - self._item_at > _MAX_ITEM_BYTES:
                self._fail(f"one row, or one text, is longer than {_MAX_ITEM_BYTES} bytes", at=self._item_at)
            half = _HALF.search(chunk) if b"\\u" in chunk else None
            if half is not None:
                self._fail("an escape is half of a surrogate pair", at=start + half.end())
            try:
                parser.send(chunk)
            except _NOT_JSON as error:
                self._fail(_cause(error), at=self._refused_at(start))
            for self._event, event in enumerate(found):
                yield event
            del found[:]
        try:
            parser.close()
        except _NOT_JSON as error:
            self._fail(_cause(error) if self.read_bytes else "it is empty", at=self.read_bytes)
        yield from found  # a number alone is told only now: it might have gone on

    def _chunks(self) -> Iterator[tuple[int, bytes]]:
        """Read the file in pieces that break no escape sequence, each with its offset."""
        start = 0
        self._seek(0)
        while chunk := self._read(_CHUNK_BYTES):
            while b"\\" in chunk[-_ESCAPE_BYTES:] and len(chunk) < 2 * _CHUNK_BYTES and (more := self._read(64)):
                chunk += more
            size = len(chunk)
            if start == 0:
                if chunk.startswith(_WIDE) or b"\0" in chunk[:4]:
                    self._fail("it is UTF-16 or UTF-32, want UTF-8", at=0)
                chunk = chunk.removeprefix(_BOM)  # some editors put it there; it changes nothing
            if chunk:
                yield start + (size - len(chunk)), chunk
            start += size
            self._seek(start)  # an error looked elsewhere, or the caller reads twice at once

    def _read(self, size: int) -> bytes:
        try:
            return self._stream.read(size)
        except OSError as error:
            raise LedgerFileError(f"{self.path} cannot be read: {error.strerror}") from error

    def _seek(self, offset: int) -> None:
        self._stream.seek(offset)

    def _fail(self, cause: str, *, at: int | None = None) -> NoReturn:
        """Raise with line and column of an offset, or of the event that was read last."""
        line, column = self._place(self._refused_at(self._chunk_at, self._event) if at is None else at)
        raise LedgerFileError(f"{self.path} line {line}, column {column}: {cause}")

    def _refused_at(self, chunk_at: int, event: int | None = None) -> int:
        """Parse again, the chunk at this offset byte by byte: where its event ends, or else where the parser stops."""
        found = ijson.sendable_list()
        parser = ijson.basic_parse_coro(found)
        offset = 0
        try:
            for start, chunk in self._chunks():
                offset = start
                if start < chunk_at:
                    parser.send(chunk)
                    del found[:]
                    continue
                for index in range(len(chunk)):
                    offset = start + index
                    parser.send(chunk[index : index + 1])
                    if event is not None and len(found) > event:
                        return offset
                break
        except _NOT_JSON:
            pass
        return offset

    def _place(self, offset: int) -> tuple[int, int]:
        """Give line and column of an offset, both from 1, the column in characters."""
        line, column = 1, 1
        self._seek(0)
        rest = offset
        while rest and (chunk := self._read(min(rest, _CHUNK_BYTES))):
            rest -= len(chunk)
            head, newline, tail = chunk.rpartition(b"\n")
            if newline:
                line, column = line + head.count(b"\n") + 1, 1
            column += len(tail.translate(None, _CONTINUATION))
        return line, column


def _kind_of_event(event: str, value: object) -> str:
    return kind_of(_STARTS[event]() if event in _STARTS else value)


def _cause(error: BaseException) -> str:
    """Say in our words why the parser stopped."""
    told = error.args[0] if error.args else ""
    text = told.decode(errors="replace") if isinstance(told, bytes) else str(told)
    if "premature EOF" in text:
        return "the file ends in the middle: it is truncated"
    if isinstance(error, UnicodeDecodeError) or "UTF8" in text:
        return "it is not UTF-8"
    if isinstance(error, ArithmeticError | SystemError):
        return "a number is beyond every range"
    return f"it is not JSON: {text.splitlines()[0] if text else type(error).__name__}"
