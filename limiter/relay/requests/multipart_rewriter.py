"""Rewrites the `model` field of a multipart form while it passes; every other byte stays as it is.

Of a file, only the few bytes that may begin a boundary are held back. No I/O.
"""

import re
from collections.abc import Callable
from enum import Enum, auto

_MAX_HEAD_LENGTH = 8192
_MAX_NAME_LENGTH = 1024
_DISPOSITION = re.compile(rb"^content-disposition:(.*)$", re.IGNORECASE | re.MULTILINE)
_PARAMETER = re.compile(rb';\s*([^=;\s]+)\s*=\s*("(?:[^"\\]|\\.)*"|[^;\s]*)')


class _Place(Enum):
    BODY = auto()  # in a part that passes unchanged, or before the first boundary
    HEAD = auto()  # just after a boundary
    MODEL = auto()  # in the body of the part that names the model
    END = auto()  # after the last boundary, or the body is not a valid form: the rest passes unchanged


class ModelField:
    """Rewrites the model of one form. rename: returns the name to send in place of the client's."""

    def __init__(self, boundary: str, rename: Callable[[str], str]) -> None:
        self._delimiter = b"\r\n--" + boundary.encode("ascii", "surrogateescape")
        self._rename = rename
        self._held = b"\r\n"  # the first boundary has no line break before it
        self._place = _Place.BODY
        self._unsent = 2  # of those two bytes, which are not the client's

    def feed(self, chunk: bytes) -> bytes:
        """Process the next bytes and return those that can be forwarded; `rest` returns the last ones."""
        self._held += chunk
        out = bytearray()
        while (step := self._step()) is not None:
            out += step
        return self._drop_prefix(bytes(out))

    def rest(self) -> bytes:
        """Return the bytes that are still held back, at the end of the form."""
        held, self._held = self._held, b""
        return self._drop_prefix(held)

    def _drop_prefix(self, out: bytes) -> bytes:
        skipped = min(self._unsent, len(out))
        self._unsent -= skipped
        return out[skipped:]

    def _step(self) -> bytes | None:
        """Return the next piece to forward, having moved to the next place; None when more bytes are needed."""
        match self._place:
            case _Place.BODY:
                return self._body()
            case _Place.HEAD:
                return self._head()
            case _Place.MODEL:
                return self._model()
            case _Place.END:
                return self._take(len(self._held), _Place.END) if self._held else None

    def _body(self) -> bytes | None:
        at = self._held.find(self._delimiter)
        if at >= 0:
            return self._take(at + len(self._delimiter), _Place.HEAD)
        certain = len(self._held) - len(self._delimiter) + 1
        return self._take(certain, _Place.BODY) if certain > 0 else None

    def _head(self) -> bytes | None:
        if self._held.startswith(b"--"):
            return self._take(len(self._held), _Place.END)
        end = self._held.find(b"\r\n\r\n")
        if end > _MAX_HEAD_LENGTH or (end < 0 and len(self._held) > _MAX_HEAD_LENGTH + 4):
            return self._take(len(self._held), _Place.END)
        if end < 0:
            return None
        return self._take(end + 4, _Place.MODEL if _names_model(self._held[:end]) else _Place.BODY)

    def _model(self) -> bytes | None:
        at = self._held.find(self._delimiter)
        if at > _MAX_NAME_LENGTH or (at < 0 and len(self._held) > _MAX_NAME_LENGTH + len(self._delimiter)):
            return self._take(0, _Place.BODY)
        if at < 0:
            return None
        value = self._take(at, _Place.BODY)
        try:
            return self._rename(value.decode()).encode()
        except UnicodeDecodeError:
            return value

    def _take(self, size: int, place: _Place) -> bytes:
        self._place = place
        taken, self._held = self._held[:size], self._held[size:]
        return taken


def _names_model(head: bytes) -> bool:
    line = _DISPOSITION.search(head.replace(b"\r\n", b"\n"))
    parameters = {name.lower(): value.strip(b'"') for name, value in _PARAMETER.findall(line[1])} if line else {}
    return parameters.get(b"name") == b"model" and not parameters.keys() & {b"filename", b"filename*"}
