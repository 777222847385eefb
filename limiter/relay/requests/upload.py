"""A multipart body on its way to a backend: read at the backend's pace, counted, and kept only up to a limit.

A kept body can be sent again to the other backend. Nothing here knows of credits.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from email.message import Message

from aiohttp import hdrs, web

from limiter.relay.http.problems import Problem, ProblemRaised, fail
from limiter.relay.requests.body_reader import BodyPace, BodyReader
from limiter.relay.requests.memory_budget import Reservation
from limiter.relay.requests.multipart_rewriter import MAX_PARTS, ModelField, TooManyParts, UnreadableForm
from limiter.relay.upstream.client import BackendClient, Streamed

_MAX_BOUNDARY_LENGTH = 70  # RFC 2046
_FED_AT_ONCE = 1 << 16  # so that no other request waits for long while a form is read


@dataclass(frozen=True, slots=True)
class UploadLimits:
    """The limits of one upload.

    Attributes:
        size_b: the largest body, in bytes.
        kept_b: how many bytes are kept for the fallback.
        pace: how fast it must arrive.
    """

    size_b: int
    kept_b: int
    pace: BodyPace


class Upload:
    """The body of one request. Raises ProblemRaised if its head shows already that it cannot be served.

    Args:
        request: its body is read here.
        limits: those of one upload.
        reservation: for the memory of the kept bytes.
        on_model: called with each model name that passes; what it raises ends the upload.
        must_name_model: whether a form is refused in which a reader might find another model than those.

    End it with `close`.
    """

    def __init__(
        self,
        request: web.Request,
        limits: UploadLimits,
        reservation: Reservation,
        on_model: Callable[[str], None],
        *,
        must_name_model: bool = False,
    ) -> None:
        self._is_strict = must_name_model
        self.path = request.path.removeprefix("/v1/")
        self.stream = False  # what the form asks for is not read: its answer's Content-Type says it
        self.headers: Mapping[str, str] = request.headers
        self._boundary = _boundary(request)
        self._length = request.content_length
        if self._length is not None and self._length > limits.size_b:
            raise _too_large()
        self._reader, self._limits, self._on_model = BodyReader(request, limits.pace), limits, on_model
        self._kept: list[bytes] = []
        self._reservation, self._keeps = reservation, True
        self._fault: ProblemRaised | None = None
        self._reading: asyncio.Task[bytes] | None = None

    @property
    def replayable(self) -> bool:
        """Whether everything that was read so far is kept."""
        return self._keeps and self._fault is None

    def body_for(self, client: BackendClient) -> Streamed:
        """Return the body from its start, with the backend's name for the model, wherever in the form it is.

        It is chunked if names are mapped, as its length is then not known; else it has the client's Content-Length.
        """

        def rename(name: str) -> str:
            self._on_model(name)
            return client.model(name)

        chunks = self._renamed(ModelField(self._boundary, rename, is_strict=self._is_strict))
        return Streamed(chunks, None if client.models else self._length, lambda: self._fault)

    def close(self) -> None:
        """Stop reading."""
        if self._reading is not None:
            self._reading.cancel()

    async def _renamed(self, field: ModelField) -> AsyncIterator[bytes]:
        at = 0
        while chunk := self._kept[at] if at < len(self._kept) else await self._next():
            at += 1
            for begin in range(0, len(chunk), _FED_AT_ONCE):
                if out := self._feed(field, chunk[begin : begin + _FED_AT_ONCE]):
                    yield out
        if out := field.rest():
            yield out

    def _feed(self, field: ModelField, piece: bytes) -> bytes:
        try:
            return field.feed(piece)
        except ProblemRaised as fault:
            self._fault = fault
            raise
        except (TooManyParts, UnreadableForm) as error:
            has = f"has more than {MAX_PARTS} parts" if isinstance(error, TooManyParts) else "names a model unreadably"
            self._fault = ProblemRaised(Problem(400, "invalid_body", "Invalid body", f"The form {has}."))
            raise self._fault from None

    async def _next(self) -> bytes:
        """Read the next chunk; one read at a time, even if the call to a failed backend still waits for it."""
        if self._reading is None:
            self._reading = asyncio.create_task(self._read())
        chunk = await asyncio.shield(self._reading)
        if self._fault is not None:
            raise self._fault
        return chunk

    async def _read(self) -> bytes:
        """Read and keep what has arrived; b"" at the end, or after a fault."""
        try:
            chunk = await self._reader.read()
        except ProblemRaised as fault:
            self._fault = fault
            return b""
        finally:
            self._reading = None
        if self._reader.read_b > self._limits.size_b:
            self._fault = _too_large()
            return b""
        self._keeps = (
            self._keeps and self._reader.read_b <= self._limits.kept_b and self._reservation.try_add(len(chunk))
        )
        if not self._keeps:
            self._kept.clear()
            self._reservation.release()
        elif chunk and self._fault is None:
            self._kept.append(chunk)
        return chunk


def _too_large() -> ProblemRaised:
    detail = "The file is larger than this relay accepts."
    return ProblemRaised(Problem(413, "request_too_large", "Request too large", detail))


def _boundary(request: web.Request) -> str:
    message = Message()
    message[hdrs.CONTENT_TYPE] = request.headers.get(hdrs.CONTENT_TYPE, "")
    boundary = message.get_boundary()
    if request.content_type != "multipart/form-data":
        fail(415, "unsupported_media_type", "Unsupported media type", "Send the body as multipart/form-data.")
    if not boundary or len(boundary) > _MAX_BOUNDARY_LENGTH or not boundary.isascii():
        fail(400, "invalid_body", "Invalid body", "The Content-Type must have a boundary of 1 to 70 ASCII characters.")
    return boundary
