"""The response of a backend, read piece by piece, or the reason why there is none. Requests are not known here."""

import asyncio
import zlib
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Literal, Self

from aiohttp import hdrs
from multidict import CIMultiDict

from limiter.credits.models import Backend
from limiter.relay.http.problems import Problem
from limiter.relay.upstream.first_event import (
    FirstEvent,
    Verdict,
    error_at_end,
    is_error_document,
    status_of_error,
)
from limiter.relay.upstream.http_protocol import AnswerTooLarge, Exchange, TransportError
from limiter.relay.upstream.refusal import about_operator, wait_s
from limiter.relay.upstream.transport import NoConnectionFree

Outcome = Literal["served", "refused", "failed", "timeout", "cancelled", "breaker_open", "busy"]
FAILURES = (TimeoutError, TransportError, OSError)
_SERVER_ERROR = 500
SUCCESS = range(200, 300)
MAX_WHOLE_BYTES = 1 << 20  # of an answer that is read whole before any of it passes
MAX_HELD_BYTES = 64 << 10  # of a stream before its first event that carries something


class BackendFailed(Exception):  # noqa: N818  reads as what happened
    """A backend sent no response that the client should see.

    alive: it did respond, so that the call does not count against its circuit breaker. outcome: for the metrics;
    `breaker_open` and `busy` are calls that were not made, and say nothing about the backend.
    is_logged: the log has a line of its own on it.
    """

    def __init__(
        self, problem: Problem, *, alive: bool = False, outcome: Outcome = "failed", is_logged: bool = False
    ) -> None:
        super().__init__(problem.detail)
        self.problem = problem
        self.alive = alive
        self.outcome = outcome
        self.is_logged = is_logged or outcome == "breaker_open"  # the opening of the breaker is logged once


class BackendResponse:
    """A backend's answer, as far as it has been read. `begun` and what `read` returns are as the backend sent them.

    Use it as `with answer:`. Leaving the block before the end of the answer closes the connection, which stops the
    backend's work.

    begun: what was read of the body before the client is to see any of it. complete: whether that is all of it.
    delivered: whether something has arrived that a credit is for. has_failed: whether it ended as an error, or within
    itself, so that what has passed is no answer for a repeat of the request.

    Args:
        backend: whose it is.
        exchange: the answer on its connection.
        headers: those that pass to the client.
        streams: whether it passes on as it arrives.
        judged: called with None once the backend has served, or with how it failed.
        over: called with how the call ended.
    """

    __slots__ = (
        "_exchange",
        "_first_event",
        "_judged",
        "_outcome",
        "_over",
        "_tail",
        "_then",
        "backend",
        "begun",
        "complete",
        "headers",
        "streams",
    )

    def __init__(
        self,
        backend: Backend,
        exchange: Exchange,
        headers: CIMultiDict[str],
        *,
        streams: bool,
        judged: Callable[[BackendFailed | None], None],
        over: Callable[[Outcome], None],
    ) -> None:
        self.backend, self.headers, self.streams = backend, headers, streams
        self.begun, self.complete = b"", False
        self._exchange, self._judged, self._over = exchange, judged, over
        self._first_event = FirstEvent(is_sse=is_event_stream(headers), is_packed=bool(packing_of(headers)))
        self._tail = (b"", b"")  # the last two chunks of a stream
        self._then = (0.0, 0.0)
        self._outcome: Outcome = "cancelled"  # as by a client that leaves, until it comes to another end

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(error)

    @property
    def status(self) -> int:
        """The status of the answer."""
        return self._exchange.status

    @property
    def succeeded(self) -> bool:
        """Whether the backend served the request."""
        return self._exchange.status in SUCCESS

    @property
    def delivered(self) -> bool:
        """Whether a stream has carried something, or a whole answer is complete."""
        return self._first_event.verdict is Verdict.CARRIES if self.streams else self.complete

    @property
    def is_sse(self) -> bool:
        """Whether it is a stream of server-sent events that can be read, and so can be written into."""
        return self.streams and self._first_event.is_sse

    @property
    def has_failed(self) -> bool:
        """Whether it ended as an error, or within itself."""
        return self._outcome in ("failed", "timeout")

    async def begin_whole(self, *, idle_s: float, ends_s: float) -> None:
        """Read an answer that is no stream, up to a limit, so that a broken one can still become another answer.

        idle_s, ends_s: of the answer after its first bytes. Raises BackendFailed for one that is empty, or an error.
        """
        parts: list[bytes] = []
        size = 0
        while size <= MAX_WHOLE_BYTES:
            part = await self._exchange.read()
            if not part:
                self.complete = True
                break
            if not parts:
                self._exchange.idle_s, self._exchange.ends_s = idle_s, ends_s
            parts.append(part)
            size += len(part)
        self.begun = b"".join(parts)
        if self.complete and self.succeeded:
            plain = unpacked(self.begun, packing_of(self.headers), MAX_WHOLE_BYTES)
            if not self.begun or (_is_json(self.headers) and plain is not None and not plain.strip()):
                raise self._failure("sent an empty answer")
            if plain is not None and is_error_document(plain):
                raise self._failure("answered with an error", plain)
        if self.complete:
            self._outcome = "served" if self.succeeded else "refused"

    async def begin_stream(self, *, pass_on_s: float, idle_s: float, ends_s: float) -> None:
        """Read a stream until it carries something, or has been silent but for pings until `pass_on_s` (loop time).

        idle_s, ends_s: from its first event that carries something. Raises BackendFailed for one that is an error, or
        ends, before that.
        """
        self._then = (idle_s, ends_s)
        held: list[bytes] = []
        size = 0
        while True:
            limit_s = pass_on_s if held else None
            try:
                async with asyncio.timeout_at(limit_s):
                    part = await self._exchange.read()
            except TimeoutError:
                if limit_s is None or asyncio.get_running_loop().time() < limit_s:
                    raise
                break
            verdict = self._first_event.feed(part) if part else self._first_event.end()
            held.append(part)
            size += len(part)
            if verdict is Verdict.ERROR:
                raise self._failure("answered with an error", self._first_event.error)
            if verdict is Verdict.CARRIES:
                self._delivered()
                break
            if not part:
                raise self._failure("sent an empty answer")
            if size > MAX_HELD_BYTES:
                break
        self.begun = b"".join(held)
        self._tail = (b"", self.begun)

    async def read(self) -> bytes:
        """Return the next bytes after `begun`; b"" at the end. Raises BackendFailed."""
        if self.complete:
            return b""
        try:
            chunk = await self._exchange.read()
        except FAILURES as error:
            raise self._broken(error) from error
        if self.streams:
            self._follow(chunk)
        elif not chunk:
            self._outcome = "served" if self.succeeded else "refused"
        return chunk

    async def pipe(self, sink: Callable[[bytes], None]) -> None:
        """Pass the rest of a stream to a function, in the callback that receives it. Raises BackendFailed.

        While the function is called, `delivered` and `has_failed` include what it is given.
        """

        def received(data: bytes) -> None:
            self._follow(data)
            sink(data)

        try:
            await self._exchange.pipe(received)
        except FAILURES as error:
            raise self._broken(error) from error
        self._follow(b"")

    def pause(self) -> None:
        """Slow the backend down: the client reads more slowly than it sends."""
        self._exchange.pause()

    def resume(self) -> None:
        """Let the backend go on."""
        self._exchange.resume()

    def _broken(self, error: BaseException) -> BackendFailed:
        failure = failed(self.backend, error)
        self._outcome = failure.outcome  # the client is told of it in the stream, and the block ends without an error
        self._judged(failure)
        return failure

    def _follow(self, chunk: bytes) -> None:
        """Note what a stream says as it goes on, and how it ends. Raises BackendFailed if it ends without anything."""
        if self.delivered:
            if chunk:
                self._tail = (self._tail[1], chunk)
            elif self.is_sse and (error := error_at_end(b"".join(self._tail))) is not None:
                self._fail("ended with an error", error)
            else:
                self._outcome = "served"
            return
        before = self._first_event.verdict
        verdict = self._first_event.feed(chunk) if chunk else self._first_event.end()
        if verdict is Verdict.CARRIES:
            self._delivered()
            self._judged(None)
            self._tail = (b"", chunk)
            if not chunk:
                self._outcome = "served"
        elif verdict is Verdict.ERROR and before is not verdict:
            self._fail("answered with an error", self._first_event.error)
        elif not chunk and verdict is Verdict.NOTHING:
            raise self._fail("sent an empty answer")

    def _fail(self, what: str, error: bytes = b"") -> BackendFailed:
        """Count a failure of a stream that has begun for the client."""
        failure = self._failure(what, error)
        self._outcome = failure.outcome
        self._judged(failure)
        return failure

    def _failure(self, what: str, error: bytes = b"") -> BackendFailed:
        """Return a failure. error: its own object; one about the request, or its rate, says that the backend works."""
        status = status_of_error(error)
        refusal = about_operator(status or self.status, error) if error else None
        alive = status is not None and status < _SERVER_ERROR and not (refusal is not None and refusal.is_certain)
        problem = backend_problem(self.backend, 502, "backend_unavailable", what, wait_s({}, error))
        return BackendFailed(problem, alive=alive)

    def _delivered(self) -> None:
        self._exchange.idle_s, self._exchange.ends_s = self._then

    def end(self, error: BaseException | None) -> None:
        """End the call, with what broke it off."""
        self._exchange.release()
        self._over(error.outcome if isinstance(error, BackendFailed) else self._outcome)


def is_event_stream(headers: Mapping[str, str]) -> bool:
    """Return whether an answer is a stream of server-sent events by its Content-Type."""
    return headers.get(hdrs.CONTENT_TYPE, "").lower().startswith("text/event-stream")


def _is_json(headers: Mapping[str, str]) -> bool:
    return headers.get(hdrs.CONTENT_TYPE, "").lower().startswith("application/json")


def packing_of(headers: Mapping[str, str]) -> str:
    """Return the content coding of a body, in lower case; "" for none."""
    coding = headers.get(hdrs.CONTENT_ENCODING, "").strip().lower()
    return "" if coding == "identity" else coding.removeprefix("x-")


def unpacked(text: bytes, packing: str, limit: int) -> bytes | None:
    """Unpack a text; None when it is damaged, longer than the limit, or packed as the standard library cannot read."""
    if not packing:
        return text
    if packing not in ("gzip", "deflate"):
        return None
    unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # either of the two, by its head
    try:
        plain = unpacker.decompress(text, limit)
    except zlib.error:
        return None
    return plain if unpacker.eof else None


def backend_problem(name: Backend, status: int, code: str, what: str, retry_after_s: int = 1) -> Problem:
    """Return the problem of a backend. what: the predicate of the sentence about it."""
    title = "Backend timeout" if code == "backend_timeout" else "Backend unavailable"
    return Problem(status, code, title, f"The backend {name!r} {what}.", retry_after_s=retry_after_s)


def failed(name: Backend, error: BaseException) -> BackendFailed:
    """Return the error for one of FAILURES."""
    if isinstance(error, TimeoutError):
        problem = backend_problem(name, 504, "backend_timeout", "did not answer in time")
        return BackendFailed(problem, outcome="timeout")
    if isinstance(error, NoConnectionFree):
        detail = f"All connections that this relay may have to the backend {name!r} are in use."
        return BackendFailed(Problem(503, "relay_busy", "Relay busy", detail, retry_after_s=1), outcome="busy")
    if isinstance(error, AnswerTooLarge):
        what = f"sent headers that cannot be read: {error}"
        return BackendFailed(backend_problem(name, 502, "backend_unavailable", what), alive=True)
    return BackendFailed(
        backend_problem(name, 502, "backend_unavailable", "cannot be reached, or the connection broke")
    )
