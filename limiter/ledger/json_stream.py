"""Reading the text of a ledger's file as JSON, piece by piece. It does not know rows.

It keeps a window of the file in memory, which grows with the value that is read, up to a bound.
"""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

from limiter.errors import LedgerFileError
from limiter.ledger.strict_json import DECODER, RefusedJson

READ_BYTES = 256 * 1024
_MAX_ITEM_BYTES = 1024 * 1024  # of a row, or a name
_MAX_DEPTH = 64
_WIDE = (b"\xff\xfe", b"\xfe\xff")
_SPACE = " \t\n\r"
_WORDS = (
    "true",
    "false",
    "null",
    "NaN",
    "Infinity",
    "-Infinity",
)  # the last three are not JSON, which is reported later
_MAX_WORD_LENGTH = max(map(len, _WORDS))
_TRUNCATED = "the file ends in the middle: it is truncated"


class JsonStream:
    """A window of the text, and the position in it. Each method continues from there.

    Methods raise LedgerFileError with line and column, both counted from 1, the column in characters.
    """

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self.window = ""
        self.at = 0
        self.read_bytes = 0
        self._path, self._stream = path, stream
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode  # a byte order mark, which some editors write
        self._line = self._column = 1  # of the window's first character
        self._stream.seek(0)

    def fill(self) -> bool:
        """Drop what was consumed, and read more; return False at the end of the file."""
        self._line, self._column = self._place(self.at)
        self.window, self.at = self.window[self.at :], 0
        try:
            raw = self._stream.read(
                max(READ_BYTES, len(self.window))
            )  # twice as much, so that a long value takes linear time
        except OSError as error:
            raise LedgerFileError(f"{self._path} cannot be read: {error.strerror}") from error
        if not self.read_bytes and (raw.startswith(_WIDE) or b"\0" in raw[:4]):
            self.fail("it is UTF-16 or UTF-32, want UTF-8: save it as that")
        self.read_bytes += len(raw)
        try:
            self.window += self._decode(raw, not raw)
        except UnicodeDecodeError as error:
            self.window += error.object[: error.start].decode("utf-8-sig")
            self.fail("it is not UTF-8" if raw else _TRUNCATED, at=len(self.window))
        return bool(raw)

    def peek(self) -> str:
        """Skip white space, and return the next character; "" at the end of the file."""
        while True:
            window, at = self.window, self.at
            while at < len(window) and window[at] in _SPACE:
                at += 1
            self.at = at
            if at < len(window):
                return window[at]
            if not self.fill():
                return ""

    def expect(self, marks: str, what: str) -> str:
        """Skip white space and one of these characters, and return it."""
        mark = self.peek()
        if not mark:
            self.fail("it is empty" if self._place(self.at) == (1, 1) else _TRUNCATED)
        if mark not in marks:
            self.fail(f"it is not JSON: want {what}")
        self.at += 1
        return mark

    def name(self) -> str:
        """Read the name of a member, and the colon after it."""
        if self.peek() != '"':
            self.expect("", "a name in quotes")
        name = self.value("a name")
        self.expect(":", "a colon")
        return str(name)

    def names(self) -> Iterator[str]:
        """Read an object, name by name: the caller reads each value before it takes the next name."""
        self.expect("{", "an object")
        if self.peek() == "}":
            self.at += 1
            return
        while True:
            yield self.name()
            if self.expect(",}", "a comma or }") == "}":
                return

    def value(self, of: str, *, most_bytes: int = _MAX_ITEM_BYTES) -> object:
        """Read a value whole: an integer of any size is an int, another number a Decimal. of: its name in errors.

        No name may occur twice in an object: only its author knows which of the two values counts.
        """
        value, end = self._decoded(of, most_bytes)
        if fault := _fault_of(value, self.window[self.at : end]):
            self.fail(f"{of} {fault}")
        self.at = end
        return value

    def item(self, of: str) -> object:
        """Read a value as `value` does; one that is JSON but cannot be used is returned as Unusable."""
        value, end = self._decoded(of, _MAX_ITEM_BYTES)
        text, self.at = self.window[self.at : end], end
        fault = _fault_of(value, text)
        return Unusable(fault, text) if fault else value

    def _decoded(self, of: str, most_bytes: int) -> tuple[object, int]:
        """Read until the window has a whole value; return it and where it ends."""
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self.window, self.at)
            except json.JSONDecodeError as error:
                if len(self.window) - self.at > most_bytes:
                    self.fail(f"{of} is longer than {most_bytes:,} bytes")
                offset = error.pos - self.at
                may_go_on = error.pos > len(self.window) - _MAX_WORD_LENGTH or error.msg.startswith("Unterminated")
                if may_go_on and self.fill():
                    continue
                self._fail_broken(error, self.at + offset)
            except RefusedJson as error:
                self.fail(f"{of}: {error}")
            except (ValueError, ArithmeticError):
                self.fail(f"{of} has a number beyond every range")
            except RecursionError:
                self.fail(f"{of} is nested more than {_MAX_DEPTH} deep")
            length, rest = end - self.at, len(self.window) - end
            if rest < len("e+5") and self.fill():  # a number may go on
                continue
            return value, self.at + length

    def fail(self, cause: str, *, at: int | None = None) -> NoReturn:
        """Raise LedgerFileError with the current position, or with another one in the window."""
        line, column = self._place(self.at if at is None else at)
        raise LedgerFileError(f"{self._path} line {line}, column {column}: {cause}")

    def _fail_broken(self, error: json.JSONDecodeError, at: int) -> NoReturn:
        rest = self.window[at:]
        is_cut = error.msg.startswith("Unterminated") or ("escape" in error.msg and '"' not in rest)
        if is_cut or any(word.startswith(rest) for word in _WORDS):
            self.fail(_TRUNCATED, at=len(self.window))
        self.fail(f"it is not JSON: {error.msg}", at=at)

    def _place(self, at: int) -> tuple[int, int]:
        lines = self.window.count("\n", 0, at)
        if lines:
            return self._line + lines, at - self.window.rindex("\n", 0, at)
        return self._line, self._column + at


class Unusable(NamedTuple):
    """JSON that cannot be used, and what is wrong with it."""

    fault: str
    text: str


def _fault_of(value: object, text: str) -> str:
    """Return why JSON cannot be used, although it is valid; empty for nearly all."""
    if text.count("[") + text.count("{") > _MAX_DEPTH and _is_deeper(value, _MAX_DEPTH):
        return f"is nested more than {_MAX_DEPTH} deep"
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError:
            return "has an escape that is half of a surrogate pair"
    return ""


def _is_deeper(value: object, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return inner is not None and (levels == 0 or any(_is_deeper(each, levels - 1) for each in inner))
