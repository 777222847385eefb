"""Records an answer for the repeats of its request: status, headers and body, as they were sent to the client.

The body is recorded up to a limit. Whether and where an answer is stored is not decided here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgpack  # type: ignore[import-untyped]  # it has no type hints (1.2)
from aiohttp import hdrs, web

from limiter.relay.http.connection import LateHeadResponse

_FORMAT = 1  # of a packed answer
_ANY_TEXT = "surrogateescape"  # how aiohttp decodes header bytes that are not UTF-8
_OF_THE_CONNECTION = frozenset(  # these belong to one request and not to its repeats
    name.lower()
    for name in (hdrs.CONNECTION, hdrs.CONTENT_LENGTH, hdrs.DATE, hdrs.KEEP_ALIVE, hdrs.SERVER, hdrs.TRANSFER_ENCODING)
) | {"x-request-id", "access-control-allow-origin", "access-control-expose-headers"}


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer as it was sent, with the id of the hold that paid for it."""

    hold_id: str
    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def packed(self) -> bytes:
        """Return the answer as Redis stores it."""
        members = [_FORMAT, self.hold_id, self.status, self.headers, self.body]
        packed: bytes = msgpack.packb(members, unicode_errors=_ANY_TEXT)
        return packed

    @classmethod
    def unpacked(cls, packed: bytes) -> "Answer | None":
        """Decode a stored answer; return None if another version of this format wrote it."""
        version, *members = msgpack.unpackb(packed, unicode_errors=_ANY_TEXT)
        if version != _FORMAT:
            return None
        hold_id, status, headers, body = members
        return cls(hold_id, status, tuple((name, value) for name, value in headers), body)


class AnswerRecorder:
    """The record of one attempt: whether it was debited, and its answer.

    Without `on_begin` nothing is recorded, at no cost, and everything here works the same.

    Args:
        hold_id: the attempt's.
        limit: the largest body that is recorded, in bytes.
        on_begin: called when something of an answer that was debited is sent.

    Attributes:
        hold_id: the attempt's.
        debit_stands: whether its hold is committed.
        has_room: called with the bytes of each further piece that is to be held; nothing is recorded if it says no.
    """

    __slots__ = ("_has_begun", "_limit", "_on_begin", "_tee", "_whole", "debit_stands", "has_room", "hold_id")

    def __init__(self, hold_id: str, limit: int = 0, on_begin: Callable[[], None] | None = None) -> None:
        self.hold_id = hold_id
        self.debit_stands = False
        self.has_room: Callable[[int], bool] = bool
        self._limit, self._on_begin, self._has_begun = limit, on_begin, False
        self._tee: _Tee | None = None
        self._whole: web.Response | None = None

    def stream(self, *, status: int, headers: Mapping[str, str]) -> web.StreamResponse:
        """Return the response for an answer that is sent in pieces, which are recorded as they are written."""
        if self._on_begin is None:
            return LateHeadResponse(status=status, headers=headers)
        self._tee = _Tee(self, self._limit, status=status, headers=headers)
        return self._tee

    def whole(self, *, status: int, headers: Mapping[str, str], body: bytes) -> web.Response:
        """Return the response for an answer that is sent at once."""
        self._whole = web.Response(status=status, headers=headers, body=body)
        return self._whole

    def debited(self) -> None:
        """Record that the hold is committed, so that the request is not attempted again."""
        self.debit_stands = True

    def begun(self) -> None:
        """Call `on_begin`, when the first of a debited answer is sent."""
        if self.debit_stands and not self._has_begun and self._on_begin is not None:
            self._has_begun = True
            self._on_begin()

    def passed(self, data: bytes) -> None:
        """Record a part of a stream that was sent past its response."""
        if self._tee is not None:
            self._tee.record(data)

    def discard(self) -> None:
        """Keep nothing of the answer: it broke off."""
        if self._tee is not None:
            self._tee.parts = None

    def answer(self) -> Answer | None:
        """Return the answer, if it is complete and small enough to be stored."""
        if self._whole is not None and isinstance(self._whole.body, bytes):
            return self._answer(self._whole, self._whole.body)
        if self._tee is not None and self._tee.parts is not None and self._tee.complete:
            return self._answer(self._tee, b"".join(self._tee.parts))
        return None

    def _answer(self, response: web.StreamResponse, body: bytes) -> Answer | None:
        if len(body) > self._limit:
            return None
        headers = tuple(item for item in response.headers.items() if item[0].lower() not in _OF_THE_CONNECTION)
        return Answer(self.hold_id, response.status, headers, body)


class _Tee(LateHeadResponse):
    """A response that records what is written to it, up to a limit, also after the client has left."""

    def __init__(self, recorder: AnswerRecorder, limit: int, *, status: int, headers: Mapping[str, str]) -> None:
        super().__init__(status=status, headers=headers)
        self.parts: list[bytes] | None = []
        self.complete = False
        self._recorder, self._left = recorder, limit

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        self.record(bytes(data))
        await super().write(data)

    async def write_eof(self, data: bytes = b"") -> None:
        self.record(data)
        self.complete = True
        await super().write_eof(data)

    def record(self, data: bytes) -> None:
        """Record a part of the body."""
        self._recorder.begun()
        self._left -= len(data)
        if self._left < 0:
            self.parts = None  # too large to be stored: its memory is released at once
        elif self.parts is not None and data:
            if self._recorder.has_room(len(data)):
                self.parts.append(data)
            else:
                self.parts = None
