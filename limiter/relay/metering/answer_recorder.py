"""What an answer leaves for the repeats of its request: status, headers and body, as the client was sent them.

It remembers, up to a limit, and packs. Whether anything is kept, and where, is not decided here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgpack  # type: ignore[import-untyped]  # it has no type hints (1.2)
from aiohttp import hdrs, web

from limiter.relay.http.connection import LateHeadResponse

_FORMAT = 1  # of a packed answer
_ANY_TEXT = "surrogateescape"  # aiohttp's form of header bytes that are no UTF-8
_OF_THE_CONNECTION = frozenset(  # and so of one request, not of its repeats
    name.lower()
    for name in (hdrs.CONNECTION, hdrs.CONTENT_LENGTH, hdrs.DATE, hdrs.KEEP_ALIVE, hdrs.SERVER, hdrs.TRANSFER_ENCODING)
) | {"x-request-id", "access-control-allow-origin", "access-control-expose-headers"}


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer as it was sent, under the hold that paid for it."""

    hold_id: str
    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def packed(self) -> bytes:
        """Give it as Redis keeps it."""
        members = [_FORMAT, self.hold_id, self.status, self.headers, self.body]
        packed: bytes = msgpack.packb(members, unicode_errors=_ANY_TEXT)
        return packed

    @classmethod
    def unpacked(cls, packed: bytes) -> "Answer | None":
        """Read such an answer; None for one of another version."""
        version, *members = msgpack.unpackb(packed, unicode_errors=_ANY_TEXT)
        if version != _FORMAT:
            return None
        hold_id, status, headers, body = members
        return cls(hold_id, status, tuple((name, value) for name, value in headers), body)


class AnswerRecorder:
    """What one attempt tells of itself: that it was debited, and what it answered.

    An attempt without a key is not recorded, at no cost: everything here works the same.
    """

    __slots__ = ("_begun", "_limit", "_note", "_tee", "_whole", "debit_stands", "hold_id")

    def __init__(self, hold_id: str, limit: int = 0, note: Callable[[], None] | None = None) -> None:
        self.hold_id = hold_id
        self.debit_stands = False
        self._limit, self._note, self._begun = limit, note, False
        self._tee: _Tee | None = None
        self._whole: web.Response | None = None

    def stream(self, *, status: int, headers: Mapping[str, str]) -> web.StreamResponse:
        """Make the response of an answer that passes bit by bit: what is written to it is what a repeat will get."""
        if self._note is None:
            return LateHeadResponse(status=status, headers=headers)
        self._tee = _Tee(self, self._limit, status=status, headers=headers)
        return self._tee

    def whole(self, *, status: int, headers: Mapping[str, str], body: bytes) -> web.Response:
        """Make the response of an answer that is sent at once."""
        self._whole = web.Response(status=status, headers=headers, body=body)
        return self._whole

    def debited(self) -> None:
        """Say that the hold is being committed: from here on there is no second attempt. Call it at the commit."""
        self.debit_stands = True

    def begun(self) -> None:
        """Note at the first byte that the client gets for its debit that there will be no second one."""
        if self.debit_stands and not self._begun and self._note is not None:
            self._begun = True
            self._note()

    def answer(self) -> Answer | None:
        """Give the answer, if it is complete and small enough to keep."""
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
    """A response that remembers what is written to it, up to a limit, whether or not the client still listens."""

    def __init__(self, recorder: AnswerRecorder, limit: int, *, status: int, headers: Mapping[str, str]) -> None:
        super().__init__(status=status, headers=headers)
        self.parts: list[bytes] | None = []
        self.complete = False
        self._recorder, self._left = recorder, limit

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        self._remember(bytes(data))
        await super().write(data)

    async def write_eof(self, data: bytes = b"") -> None:
        self._remember(data)
        self.complete = True
        await super().write_eof(data)

    def _remember(self, data: bytes) -> None:
        self._recorder.begun()
        self._left -= len(data)
        if self._left < 0:
            self.parts = None  # too large to be kept: its memory is free at once
        elif self.parts is not None:
            self.parts.append(data)
