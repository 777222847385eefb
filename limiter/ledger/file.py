"""Reading credits.json as a whole. Rows are decoded by `row_codec` and `row_fast_path`.

No Redis here. It streams: memory does not grow with the file, except for 12 to 24 bytes an install id, to recognise
duplicates. Its errors have line, column and cause.
"""

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple, NoReturn, Self

import orjson

from limiter._util.fingerprint_set import FingerprintSet
from limiter.credits.keys import normalise_install_id
from limiter.credits.models import Row
from limiter.errors import InvalidInstallId, LedgerFileError, LedgerRowError
from limiter.ledger.json_stream import JsonStream, Unusable
from limiter.ledger.row_codec import row_from_member, undated_fields
from limiter.ledger.row_fast_path import REGULAR_ROW, row_from_groups

_MAX_NAMES = 64  # of the file itself: rows, meta, and any others that were added to it
_ROW_BYTES = 300  # of most rows, to estimate how many ids there are
_MAX_OTHER_BYTES = 8 * 1024 * 1024  # of each member besides rows
_KINDS = {"{": "an object", "[": "a list", '"': "a text", "t": "true", "f": "false", "n": "null"}


class Entry(NamedTuple):
    """One member of `rows`.

    found: the match of `row_fast_path.REGULAR_ROW`; None for any other form. value: the JSON value of the other forms.
    """

    install_id: str
    found: "re.Match[str] | None"
    value: object

    @property
    def is_regular(self) -> bool:
        """Whether it is of the regular form, which needs no checking."""
        return self.found is not None

    @property
    def groups(self) -> tuple[str, ...]:
        """The values of ROW_MEMBERS in the regular form; else empty."""
        return () if self.found is None else self.found.groups()

    @property
    def member(self) -> object:
        """The JSON value of the member: numbers are int or Decimal; unusable JSON is its text."""
        if self.is_regular:
            return row_from_groups(self.groups).as_dict()
        return orjson.Fragment(self.value.text) if isinstance(self.value, Unusable) else self.value

    @property
    def undated(self) -> frozenset[str]:
        """The fields of its row that the file leaves open; see `row_codec.undated_fields`."""
        return frozenset() if self.is_regular else undated_fields(self.value)

    def row(self, *, now_ms: int) -> Row:
        """Return its row. now_ms: the start of the period of a row without one. Raises LedgerFileError."""
        if self.is_regular:
            return row_from_groups(self.groups)
        if isinstance(self.value, Unusable):
            raise LedgerRowError(self.install_id, f"it {self.value.fault}", f"it {self.value.fault}")
        return row_from_member(self.install_id, self.value, now_ms=now_ms)


class LedgerFile:
    """An open credits.json, read from its start as often as needed. A `with` block closes it.

    It stays the same file if another one takes its path meanwhile. Raises LedgerFileError if it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.meta: object = None  # known after a whole reading
        self._ids_differ = False  # the same
        try:
            # Without O_NONBLOCK the open of a pipe would wait for its writer.
            self._stream: BinaryIO = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", 0)
            self.stat = os.fstat(self._stream.fileno())
        except OSError as error:
            raise LedgerFileError(f"{path} cannot be read: {error.strerror}") from error
        if not stat.S_ISREG(self.stat.st_mode):
            self._stream.close()
            raise LedgerFileError(f"{path} cannot be read: it is not a regular file")
        self._text = JsonStream(path, self._stream)

    @property
    def size_bytes(self) -> int:
        """The size of the file."""
        return self.stat.st_size

    @property
    def has_checksum(self) -> bool:
        """Whether its member meta has one, as in a dump; known after the whole file was read."""
        return isinstance(self.meta, dict) and "checksum" in self.meta

    @property
    def read_bytes(self) -> int:
        """How many bytes have been read so far."""
        return self._text.read_bytes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def rows(self, *, now_ms: int) -> Iterator[tuple[str, Row | LedgerFileError]]:
        """Read every row; one that is not valid becomes its error. now_ms: the start of the period of rows without one.

        Raises LedgerFileError, with line, column and cause, if the file as a whole is not valid.
        """
        for entry in self.entries():
            try:
                yield entry.install_id, entry.row(now_ms=now_ms)
            except LedgerFileError as error:
                yield entry.install_id, error

    def members(self) -> Iterator[tuple[str, object]]:
        """Read every member of `rows` without decoding it. Raises as `rows`."""
        for entry in self.entries():
            yield entry.install_id, entry.member

    def entries(self) -> Iterator[Entry]:
        """Read every member of `rows`, from the start of the file; one reading at a time. Raises as `rows`."""
        self._check_unchanged()
        text = self._text = JsonStream(self.path, self._stream)
        names: set[str] = set()
        self._expect_object(text, "it is {}, want an object with a member rows")
        for name in text.names():
            if name in names:
                text.fail(f"the member {name[:80]!r} is there twice")
            if len(names) == _MAX_NAMES:
                text.fail(f"it has more than {_MAX_NAMES} members beside rows")
            names.add(name)
            if name == "rows":
                self._expect_object(text, "rows is {}, want an object")
                yield from self._rows(text)
                continue
            value = text.value(f"the member {name[:80]!r}", most_bytes=_MAX_OTHER_BYTES)
            if name == "meta":
                self.meta = value
        if text.peek():
            text.fail("it is not JSON: something follows its end")
        if "rows" not in names:
            text.fail("it has no member rows")
        self._check_unchanged()
        self._ids_differ = True

    def _check_unchanged(self) -> None:
        now = os.fstat(self._stream.fileno())
        if (now.st_size, now.st_mtime_ns) != (self.stat.st_size, self.stat.st_mtime_ns):
            raise LedgerFileError(f"{self.path} was written to while it was read: stop what writes it, or take a copy")

    def _expect_object(self, text: JsonStream, want: str) -> None:
        mark = text.peek()
        if not mark:
            text.expect("{", "an object")
        if mark != "{":
            text.fail(want.format(_KINDS.get(mark, "a number" if mark.isdigit() or mark == "-" else "no JSON")))

    def _rows(self, text: JsonStream) -> Iterator[Entry]:
        # Only after all of the file was read are they known to differ.
        is_new = _is_new if self._ids_differ else FingerprintSet(self.size_bytes // _ROW_BYTES).add
        match = REGULAR_ROW.match
        text.expect("{", "an object")
        after = "," if text.peek() != "}" else text.expect("}", "}")
        while after == ",":
            text.peek()  # a dump has each row on a line of its own
            # Nearly all rows are of one form, which needs no parser; the match includes the comma.
            while found := match(text.window, text.at):
                install_id = found[1]
                if not is_new(install_id):
                    _fail_twice(text, install_id)
                text.at = found.end()
                yield Entry(install_id, found, None)
            install_id = text.name()
            if not is_new(_stored_id(install_id)):
                _fail_twice(text, install_id)
            yield Entry(install_id, None, text.item(f"row {install_id[:80]!r}"))
            after = text.expect(",}", "a comma or }")


def _stored_id(install_id: str) -> str:
    """Return the id as it would be stored; an invalid one as it is."""
    try:
        return normalise_install_id(install_id)
    except InvalidInstallId:
        return install_id


def _is_new(_install_id: str) -> bool:
    return True


def _fail_twice(text: JsonStream, install_id: str) -> NoReturn:
    text.fail(f"the install id {install_id[:80]!r} is there twice; a UUID is the same in upper and lower case")
