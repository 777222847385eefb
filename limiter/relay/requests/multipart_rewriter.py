"""Rewrites the `model` field of a multipart form while it passes; every other byte stays as it is.

Of a file, only the few bytes that may begin a boundary are held back. Each byte is copied once, however many parts
there are, and a form with very many of them is refused. No I/O.
"""

import re
from collections.abc import Callable, Iterator
from enum import Enum, auto

MAX_PARTS = 100  # a transcription has about ten
_MAX_HEAD_LENGTH = 8192
_MAX_NAME_LENGTH = 1024
_DISPOSITION = re.compile(rb"^content-disposition:(.*)$", re.IGNORECASE | re.MULTILINE)
_FOLD = re.compile(rb"\r?\n[ \t]+")
_PARAMETER = re.compile(rb';\s*([^=;\s]+)\s*=\s*("(?:[^"\\]|\\.)*"|[^;\s]*)')


class TooManyParts(Exception):  # noqa: N818  names the thing
    """The form has more than MAX_PARTS parts."""


class UnreadableForm(Exception):  # noqa: N818  names the thing
    """The form cannot be read, or its model cannot, and another reader may find one in it."""


class _Place(Enum):
    BODY = auto()  # in a part that passes unchanged, or before the first boundary
    HEAD = auto()  # just after a boundary
    MODEL = auto()  # in the body of the part that names the model
    END = auto()  # after the last boundary, or the body is not a valid form: the rest passes unchanged


class ModelField:
    """Rewrites the model of one form.

    rename: returns the name to send in place of the client's. is_strict: whether no model may pass that is not seen.
    """

    def __init__(self, boundary: str, rename: Callable[[str], str], *, is_strict: bool = False) -> None:
        self._is_strict = is_strict
        self._delimiter = b"\r\n--" + boundary.encode("ascii", "surrogateescape")
        self._rename = rename
        self._held = b"\r\n"  # the first boundary has no line break before it
        self._at = 0  # how much of the held bytes was processed
        self._place = _Place.BODY
        self._parts = 0
        self._unsent = 2  # of those two bytes, which are not the client's

    def feed(self, chunk: bytes) -> bytes:
        """Process the next bytes and return those that can be forwarded; `rest` returns the last ones.

        Raises TooManyParts, and UnreadableForm if it is strict.
        """
        self._held += chunk
        self._at = 0
        out = b"".join(self._steps())
        self._held = self._held[self._at :]
        return self._drop_prefix(out)

    def rest(self) -> bytes:
        """Return the bytes that are still held back, at the end of the form."""
        held, self._held = self._held, b""
        return self._drop_prefix(held)

    def _drop_prefix(self, out: bytes) -> bytes:
        skipped = min(self._unsent, len(out))
        self._unsent -= skipped
        return out[skipped:]

    def _steps(self) -> Iterator[bytes]:
        """Yield the next pieces to forward, moving from place to place, until more bytes are needed."""
        steps = {_Place.BODY: self._body, _Place.HEAD: self._head, _Place.MODEL: self._model, _Place.END: self._end}
        while (step := steps[self._place]()) is not None:
            yield step

    def _body(self) -> bytes | None:
        end = self._held.find(self._delimiter, self._at)
        if end >= 0:
            self._parts += 1
            if self._parts > MAX_PARTS + 1:  # the last boundary begins no part
                raise TooManyParts
            return self._take(end + len(self._delimiter), _Place.HEAD)
        certain = len(self._held) - len(self._delimiter) + 1
        return self._take(certain, _Place.BODY) if certain > self._at else None

    def _head(self) -> bytes | None:
        if self._held.startswith(b"--", self._at):
            return self._take(len(self._held), _Place.END)
        end = self._held.find(b"\r\n\r\n", self._at)
        length = (end if end >= 0 else len(self._held) - 4) - self._at
        if length > _MAX_HEAD_LENGTH:
            return self._unread(len(self._held), _Place.END)
        if end < 0:
            return None
        return self._take(end + 4, _Place.MODEL if _names_model(self._held[self._at : end]) else _Place.BODY)

    def _model(self) -> bytes | None:
        end = self._held.find(self._delimiter, self._at)
        length = (end if end >= 0 else len(self._held) - len(self._delimiter)) - self._at
        if length > _MAX_NAME_LENGTH:
            return self._unread(self._at, _Place.BODY)
        if end < 0:
            return None
        try:
            name = self._held[self._at : end].decode()
        except UnicodeDecodeError:
            return self._unread(end, _Place.BODY)
        self._take(end, _Place.BODY)
        return self._rename(name).encode()

    def _end(self) -> bytes | None:
        return self._take(len(self._held), _Place.END) if self._at < len(self._held) else None

    def _unread(self, end: int, place: _Place) -> bytes:
        if self._is_strict:
            raise UnreadableForm
        return self._take(end, place)

    def _take(self, end: int, place: _Place) -> bytes:
        taken = self._held[self._at : end]
        self._at, self._place = end, place
        return taken


def _names_model(head: bytes) -> bool:
    """Return whether a part is the field `model`, by any of its lines, as readers differ about which one counts."""
    return any(map(_is_model, _DISPOSITION.findall(_FOLD.sub(b" ", head).replace(b"\r\n", b"\n"))))


def _is_model(disposition: bytes) -> bool:
    parameters = {name.lower(): value.strip(b'"') for name, value in _PARAMETER.findall(disposition)}
    return parameters.get(b"name") == b"model" and not parameters.keys() & {b"filename", b"filename*"}
