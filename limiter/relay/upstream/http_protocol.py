"""One connection to a backend: writes requests, parses answers, and says when it can be used again.

httptools (llhttp) parses. It leaves to us: the end of a body that has neither length nor chunks, trailers (which it
gives as headers), interim answers (which it gives as messages), and every bound. None of its leniencies is on. An
answer with Transfer-Encoding and Content-Length, a bare line feed, a blank before a colon or a folded header is an
error: a proxy that reads such a thing otherwise than its neighbours can be made to mix up the answers of two clients.

A connection that has ended is closed at once, in the callback that says so: what waits for it is woken there, and a
transport that still had a request to write would otherwise go on trying.
"""

import asyncio
from collections.abc import Callable
from math import inf
from typing import cast

import httptools
from aiohttp import hdrs
from multidict import CIMultiDict

MAX_HEAD_BYTES = 64 << 10
MAX_HEADERS = 256
_BUFFERED = 128 << 10  # of a body that nobody reads: more pauses the backend
_INTERIM = range(100, 200)
_SWITCHING_PROTOCOLS = 101
_SUCCESS = range(200, 300)
_WITHOUT_BODY = frozenset({204, 304})
_VERSIONS = frozenset({"1.0", "1.1"})
_KEEP_ALIVE_TIMEOUT = "timeout="
MAX_READ_BYTES = 256 << 10  # that asyncio and uvloop give at once


class TransportError(ConnectionError):
    """A backend cannot be reached, broke off, or sent what is not HTTP. unused: not one byte of an answer arrived."""

    def __init__(self, problem: str, *, unused: bool = False) -> None:
        super().__init__(problem)
        self.unused = unused


class AnswerTooLarge(TransportError):  # noqa: N818  names the thing
    """The headers of an answer are over the bounds. The backend works: nothing speaks against the next request."""


class Exchange:
    """One request and its answer, as far as it has arrived. `read` returns the body piece by piece, `pipe` its rest.

    deadline_s: when the head, or else what is waited for of the body, must have arrived, in loop time. idle_s: how long
    that may take. ends_s: when all of the body must have been read.
    """

    __slots__ = (
        "_connection",
        "_drainer",
        "_error",
        "_is_paused",
        "_pieces",
        "_sending",
        "_sink",
        "_size",
        "_waiter",
        "complete",
        "deadline_s",
        "ends_s",
        "headers",
        "idle_s",
        "status",
    )

    def __init__(self, connection: "HttpConnection", *, deadline_s: float) -> None:
        self._connection = connection
        self._pieces: list[bytes] = []
        self._size = 0
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._drainer: asyncio.Future[None] | None = None
        self._sending: asyncio.Task[bool] | None = None
        self._sink: Callable[[bytes], None] | None = None
        self._is_paused = False
        self.status = 0
        self.headers: CIMultiDict[str] = CIMultiDict()
        self.complete = False
        self.deadline_s, self.ends_s, self.idle_s = deadline_s, inf, inf

    async def head(self) -> None:
        """Wait for the head of the answer. Raises TransportError, TimeoutError."""
        while not self.status and self._error is None:
            await self._more()
        if not self.status:
            assert self._error is not None  # noqa: S101  the loop's end
            raise self._error

    async def read(self) -> bytes:
        """Return what has arrived of the body, or wait for it; b"" at its end. Raises TransportError, TimeoutError."""
        if self._connection.loop.time() >= self.ends_s:  # of a body that always has more no wait would ever end
            raise TimeoutError
        while not self._pieces:
            if self.complete:
                return b""
            if self._error is not None:
                raise self._error
            self.deadline_s = min(self._connection.loop.time() + self.idle_s, self.ends_s)
            await self._more()
            self.deadline_s = inf  # a client that reads slowly is no fault of the backend's
        return self._take()

    async def pipe(self, sink: Callable[[bytes], None]) -> None:
        """Pass the rest of the body to a function, in the callback that receives it. Raises as `read`.

        No task, future or queue is in between, so `pause` and `resume` are how the receiver slows the backend down.
        """
        self._sink = sink
        try:
            if self._pieces:
                sink(self._take())
            while not self.is_over:
                self._restart_idle()
                await self._more()
            if self._pieces:  # of a read that ended in an error
                sink(self._take())
        finally:
            self._sink = None
            self.deadline_s = inf
        if self._error is not None:
            raise self._error

    def pause(self) -> None:
        """Read no more of the body for now. Meanwhile only its total time runs: the delay is not the backend's."""
        self._is_paused = True
        self.deadline_s = self.ends_s
        self._connection.pause_reading()

    def resume(self) -> None:
        """Read on."""
        self._is_paused = False
        self._restart_idle()
        self._connection.resume_reading()

    def received(self) -> None:
        """Pass on what one read of the connection has brought, in one piece."""
        if self._sink is None:
            self.wake()
            return
        if self._pieces:
            self._sink(self._take())  # which may change the times that are allowed, or pause
            self._restart_idle()
        if self.complete:
            self.wake()

    async def drain(self) -> bool:
        """Wait until the backend takes more of the request. Return whether it wants more: see `wants_more`."""
        while self._connection.is_full and self.wants_more:
            self._drainer = self._connection.loop.create_future()
            try:
                await self._drainer
            finally:
                self._drainer = None
        return self.wants_more

    async def until_sent(self, sending: "asyncio.Task[bool]") -> None:
        """Wait for the end of an upload, or for the head of an answer that comes before it."""
        sending.add_done_callback(lambda _: self.wake())
        while not self.status and not self.is_over and not sending.done():
            await self._more()

    def keep_sending(self, sending: "asyncio.Task[bool]") -> None:
        """Let an upload go on while its answer is read, and end with the exchange. Its failure is nobody's then."""
        self._sending = sending
        sending.add_done_callback(lambda task: task.cancelled() or task.exception())

    def release(self) -> None:
        """End the exchange: after the last byte its connection can be used again, earlier it closes."""
        self._stop_sending()
        self._connection.end(self)

    def close(self) -> None:
        """End the exchange and close its connection, which stops the backend's work."""
        self._stop_sending()
        self._connection.abandon(self)

    def fail(self, error: Exception) -> None:
        """Let whoever reads see an error, after what has arrived."""
        if not self.complete and self._error is None:
            self._error = error
        self.wake()

    @property
    def is_over(self) -> bool:
        """Whether nothing more arrives."""
        return self.complete or self._error is not None

    @property
    def wants_more(self) -> bool:
        """Whether the rest of the request is of use: not after a refusal, nor when nothing more arrives."""
        return not self.is_over and (not self.status or self.status in _SUCCESS)

    def arrived(self, data: bytes) -> None:
        """Take a part of the body."""
        self._pieces.append(data)
        self._size += len(data)
        if self._size > _BUFFERED and self._sink is None:
            self._connection.pause_reading()

    def _take(self) -> bytes:
        """Return what has arrived of the body, which is something."""
        pieces = self._pieces
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        if self._size > _BUFFERED and not self._is_paused:
            self._connection.resume_reading()
        self._size = 0
        return data

    def _restart_idle(self) -> None:
        self.deadline_s = self.ends_s
        if not self._is_paused:
            self.deadline_s = min(self._connection.loop.time() + self.idle_s, self.ends_s)

    def _stop_sending(self) -> None:
        if self._sending is not None:
            self._sending.cancel()

    def wake(self) -> None:
        """Let who waits look again."""
        waiter, drainer = self._waiter, self._drainer
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
        if drainer is not None and not drainer.done():
            drainer.set_result(None)

    async def _more(self) -> None:
        self._waiter = self._connection.loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None


class HttpConnection(asyncio.Protocol):
    """A connection, used for one exchange after the other. The pool makes, keeps and forgets it.

    reusable: whether another request may be written to it. used: how many were. idle_since_s: in loop time. is_full:
    whether what is written has to wait. on_end: is told when an exchange ended and left it reusable, and when it is
    closed, once.
    """

    __slots__ = (
        "_bytes_beside_body",
        "_closed",
        "_exchange",
        "_header_bytes",
        "_headers",
        "_is_interim",
        "_on_end",
        "_parser",
        "_paused",
        "_transport",
        "_until_eof",
        "idle_since_s",
        "is_full",
        "keepalive_s",
        "loop",
        "reusable",
        "used",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, on_end: Callable[["HttpConnection"], None]) -> None:
        self.loop = loop
        self.reusable = True
        self.used = 0
        self.is_full = False
        self.idle_since_s = 0.0
        self.keepalive_s = inf
        self._on_end = on_end
        self._transport: asyncio.Transport = cast("asyncio.Transport", None)
        self._exchange: Exchange | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._headers: list[tuple[bytes, bytes]] = []
        self._header_bytes = 0
        self._bytes_beside_body = 0  # since the last byte of a body
        self._until_eof = False
        self._paused = False
        self._is_interim = False
        self._closed = False

    def begin(self, deadline_s: float) -> Exchange:
        """Begin an exchange: the next answer is its. Write the request by `write` then."""
        self.used += 1
        self._exchange = exchange = Exchange(self, deadline_s=deadline_s)
        self._parser = httptools.HttpResponseParser(self)
        self._headers, self._header_bytes, self._bytes_beside_body, self._until_eof = [], 0, 0, False
        return exchange

    def write(self, data: bytes) -> None:
        """Write a part of a request. Of one that is lost the exchange has been told."""
        if not self._closed and not self._transport.is_closing():  # to which uvloop would raise RuntimeError
            self._transport.write(data)

    @property
    def is_open(self) -> bool:
        """Whether it has not ended."""
        return not self._closed and not self._transport.is_closing()

    def is_idle(self, now_s: float, keepalive_s: float) -> bool:
        """Return whether it can take a request now."""
        return self.reusable and self.is_open and now_s - self.idle_since_s < min(keepalive_s, self.keepalive_s)

    def end(self, exchange: Exchange) -> None:
        """End an exchange, and the connection, unless its answer is complete and allows another request."""
        if exchange is not self._exchange:
            return
        if exchange.complete and self.reusable and self.is_open and not self.is_full:
            self._exchange = self._parser = None
            self.idle_since_s = self.loop.time()
            self.resume_reading()
            self._on_end(self)
        else:
            self.close()

    def abandon(self, exchange: Exchange) -> None:
        """Close the connection, unless it has gone on to another exchange."""
        if exchange is self._exchange:
            self.close()

    def close(self, error: Exception | None = None) -> None:
        """Close the connection at once, and let the reader of its exchange see why."""
        self.reusable = False
        exchange, self._exchange, self._parser = self._exchange, None, None
        if exchange is not None:
            exchange.fail(error or TransportError("the connection was closed"))
        if not self._closed:
            self._closed = True
            if self._transport is not None:
                self._transport.abort()
            self._on_end(self)

    def pause_reading(self) -> None:
        """Let the backend wait: what it sent is not read yet."""
        if not self._paused and not self._closed:
            self._paused = True
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Read on."""
        if self._paused and not self._closed:
            self._paused = False
            self._transport.resume_reading()

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Parse what has arrived, and pass it on in one piece."""
        exchange, parser = self._exchange, self._parser
        if exchange is None or parser is None or exchange.is_over:  # it spoke unasked: never for another client
            self.close()
            return
        self._bytes_beside_body += len(data)
        try:
            parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self.reusable = False  # from here on it speaks another protocol
        except httptools.HttpParserError as error:
            if not exchange.complete:
                cause = error.__context__
                self.close(cause if isinstance(cause, TransportError) else TransportError(f"it is not HTTP: {error}"))
                return
            self.reusable = False  # more than one answer to one request
        if self._bytes_beside_body > MAX_HEAD_BYTES and not exchange.complete:
            if not exchange.status:
                self.close(_too_large())
                return
            if self._bytes_beside_body > 2 * MAX_READ_BYTES:  # of which one read may have ended the head
                self.close(AnswerTooLarge("between the parts of its answer is more than belongs there"))
                return
        exchange.received()

    def eof_received(self) -> bool:
        """End with the backend's side of the connection: a backend that has closed it has no more to say."""
        self._ended(None)
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """End with the connection."""
        self._ended(exc)

    def pause_writing(self) -> None:
        """Hold back the rest of a request."""
        self.is_full = True

    def resume_writing(self) -> None:
        """Let the rest of a request follow."""
        self.is_full = False
        if self._exchange is not None:
            self._exchange.wake()

    # What the parser calls

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take one header, or trailer: that passes to no client."""
        self._header_bytes += len(name) + len(value)
        if self._header_bytes > MAX_HEAD_BYTES:
            raise _too_large()
        self._headers.append((name, value))
        if len(self._headers) > MAX_HEADERS:
            raise AnswerTooLarge(f"its answer has more than {MAX_HEADERS} headers")

    def on_headers_complete(self) -> None:
        """Hand over the head of an answer; an interim one is passed over."""
        exchange, parser = self._exchange, self._parser
        if exchange is None or parser is None or exchange.complete:
            self.reusable = False
            return
        status, version = parser.get_status_code(), parser.get_http_version()
        if version not in _VERSIONS:
            raise TransportError(f"it answered in HTTP/{version}")
        if status < _INTERIM.start:
            raise TransportError(f"it answered with the status {status:03}")
        if status in _INTERIM and status != _SWITCHING_PROTOCOLS:
            self._is_interim = True
            return
        headers = CIMultiDict[str]()
        for name, value in self._headers:
            headers.add(name.decode("latin-1"), value.decode("latin-1"))
        self._headers, self._header_bytes = [], 0  # from here on for trailers
        codings = headers.getall(hdrs.TRANSFER_ENCODING, [])
        if codings and (len(codings) > 1 or codings[0].lower() != "chunked"):
            raise TransportError(f"its answer has the transfer coding {codings[-1][:40]!r}, which was not offered")
        self._until_eof = not codings and hdrs.CONTENT_LENGTH not in headers and status not in _WITHOUT_BODY
        if self._until_eof or not parser.should_keep_alive() or (codings and version == "1.0"):
            self.reusable = False
        self._note_keep_alive(headers)
        exchange.headers = headers
        exchange.status = status

    def on_body(self, data: bytes) -> None:
        """Take a part of a body."""
        exchange = self._exchange
        self._bytes_beside_body = 0
        if exchange is not None and exchange.status and not exchange.complete:
            exchange.arrived(data)
        else:
            self.reusable = False

    def on_message_complete(self) -> None:
        """Note the end of an answer, or of an interim one."""
        exchange = self._exchange
        if self._is_interim:
            self._is_interim = False
            self._headers, self._header_bytes = [], 0
            return
        if exchange is not None:
            exchange.complete = True

    def on_message_begin(self) -> None:
        """Note that something arrives behind an answer: it belongs to no request."""
        if self._exchange is not None and self._exchange.complete:
            self.reusable = False

    def _ended(self, exc: Exception | None) -> None:
        """End a body that ends with the connection, or fail the exchange."""
        exchange = self._exchange
        if exchange is not None and not exchange.complete and exchange.status and self._until_eof and exc is None:
            exchange.complete = True
        unused = not self._bytes_beside_body and (exchange is None or not exchange.status)
        self.close(TransportError(f"the connection was lost: {exc or 'the backend closed it'}", unused=unused))

    def _note_keep_alive(self, headers: CIMultiDict[str]) -> None:
        text = headers.get(hdrs.KEEP_ALIVE, "")
        at = text.lower().find(_KEEP_ALIVE_TIMEOUT)
        if at >= 0:
            seconds = text[at + len(_KEEP_ALIVE_TIMEOUT) :].split(",")[0].strip()
            if seconds.isascii() and seconds.isdigit() and len(seconds) < 6:  # noqa: PLR2004  a day has five digits
                self.keepalive_s = max(0, int(seconds) - 1)


def _too_large() -> AnswerTooLarge:
    return AnswerTooLarge(f"the headers of its answer are larger than {MAX_HEAD_BYTES >> 10} KiB")
