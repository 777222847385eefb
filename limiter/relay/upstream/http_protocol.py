"""One connection to a backend: writes requests, parses answers, and says when it can be used again.

httptools (llhttp) parses. It leaves to us: the end of a body that has neither length nor chunks, trailers (which it
gives as headers), interim answers (which it gives as messages), and every bound. None of its leniencies is on. An
answer with Transfer-Encoding and Content-Length, a bare line feed, a blank before a colon or a folded header is an
error: a proxy that reads such a thing otherwise than its neighbours can be made to mix up the answers of two clients.
"""

import asyncio
from collections.abc import Callable
from math import inf
from typing import cast

import httptools
from multidict import CIMultiDict

MAX_HEAD_BYTES = 64 << 10
MAX_HEADERS = 256
_BUFFERED = 128 << 10  # of a body that nobody reads: more pauses the backend
_INTERIM = range(100, 200)
_SWITCHING_PROTOCOLS = 101
_WITHOUT_BODY = frozenset({204, 304})
_VERSIONS = frozenset({"1.0", "1.1"})
_KEEP_ALIVE_TIMEOUT = "timeout="


class TransportError(ConnectionError):
    """A backend cannot be reached, broke off, or sent what is not HTTP. unused: not one byte of an answer arrived."""

    def __init__(self, problem: str, *, unused: bool = False) -> None:
        super().__init__(problem)
        self.unused = unused


class AnswerTooLarge(TransportError):  # noqa: N818  names the thing
    """The head of an answer is over the bounds. The backend works: nothing speaks against the next request."""


class Exchange:
    """One request and its answer, as far as it has arrived. `read` and `pipe` take the body; one of them, not both.

    deadline_s: when the head, or else what `read` waits for, must have arrived, in loop time. idle_s: how long `read`
    waits. ends_s: when all of the body must have been read.
    """

    __slots__ = (
        "_connection",
        "_error",
        "_is_paused",
        "_pieces",
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
        pieces = self._pieces
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        if self._size > _BUFFERED:
            self._connection.resume_reading()
        self._size = 0
        return data

    async def pipe(self, sink: Callable[[bytes], None]) -> None:
        """Pass the rest of the body to a sink, from the very callback that receives it. Raises as `read`.

        No task, future or queue is between: `pause` and `resume` hold the backend back as the sink fills and empties.
        """
        if self._pieces:
            sink(await self.read())
        self._sink = sink
        now_s = self._connection.loop.time
        try:
            while not self.is_over:
                self.deadline_s = inf if self._is_paused else min(now_s() + self.idle_s, self.ends_s)
                await self._more()
        finally:
            self._sink = None
            self.deadline_s = inf
        if self._error is not None:
            raise self._error

    def pause(self) -> None:
        """Read no more of the body for now. No time of the backend's runs."""
        self._is_paused = True
        self.deadline_s = self.ends_s
        self._connection.pause_reading()

    def resume(self) -> None:
        """Read on."""
        self._is_paused = False
        self.deadline_s = min(self._connection.loop.time() + self.idle_s, self.ends_s)
        self._connection.resume_reading()

    def received(self) -> None:
        """Pass on what one read of the connection has brought, in one piece."""
        sink = self._sink
        if sink is None:
            self._wake()
            return
        pieces = self._pieces
        if pieces:
            data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            pieces.clear()
            self._size = 0
            self.deadline_s = inf if self._is_paused else min(self._connection.loop.time() + self.idle_s, self.ends_s)
            sink(data)
        if self.complete:
            self._wake()

    def release(self) -> None:
        """End the exchange: after the last byte its connection can be used again, earlier it closes."""
        self._connection.end(self)

    def close(self) -> None:
        """End the exchange and close its connection, which stops the backend's work."""
        self._connection.close()

    def fail(self, error: Exception) -> None:
        """Let whoever reads see an error, after what has arrived."""
        if not self.complete and self._error is None:
            self._error = error
        self._wake()

    @property
    def is_over(self) -> bool:
        """Whether nothing more arrives."""
        return self.complete or self._error is not None

    def arrived(self, data: bytes) -> None:
        """Take a part of the body."""
        self._pieces.append(data)
        self._size += len(data)
        if self._size > _BUFFERED and self._sink is None:
            self._connection.pause_reading()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def _more(self) -> None:
        self._waiter = self._connection.loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None


class HttpConnection(asyncio.Protocol):
    """A connection, used for one exchange after the other. The pool makes, keeps and forgets it.

    reusable: whether another request may be written to it. used: how many were. idle_since_s: in loop time.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, on_end: Callable[["HttpConnection"], None]) -> None:
        self.loop = loop
        self.reusable = True
        self.used = 0
        self.idle_since_s = 0.0
        self.keepalive_s = inf
        self._on_end = on_end
        self._transport: asyncio.Transport = cast("asyncio.Transport", None)
        self._exchange: Exchange | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._headers: list[tuple[bytes, bytes]] = []
        self._head_bytes = 0
        self._status = 0
        self._until_eof = False
        self._paused = False
        self._writable: asyncio.Future[None] | None = None
        self._is_interim = False
        self._closed = False

    def begin(self, deadline_s: float) -> Exchange:
        """Begin an exchange: the next answer is its. Write the request by `write` then."""
        self.used += 1
        self._exchange = exchange = Exchange(self, deadline_s=deadline_s)
        self._parser = httptools.HttpResponseParser(self)
        self._headers, self._head_bytes, self._until_eof = [], 0, False
        return exchange

    def write(self, data: bytes) -> None:
        """Write a part of a request."""
        self._transport.write(data)

    async def drain(self) -> None:
        """Wait until the backend takes more. Raises TransportError when the connection is lost."""
        if self._closed:
            raise TransportError("the connection was lost while the request was sent")
        if self._writable is not None:
            await asyncio.shield(self._writable)

    def is_idle(self, now_s: float, keepalive_s: float) -> bool:
        """Return whether it can take a request now."""
        return (
            self.reusable
            and not self._closed
            and not self._transport.is_closing()
            and now_s - self.idle_since_s < min(keepalive_s, self.keepalive_s)
        )

    def end(self, exchange: Exchange) -> None:
        """End an exchange, and the connection, unless its answer is complete and allows another request."""
        if exchange is not self._exchange:
            return
        if exchange.complete and self.reusable and not self._closed:
            self._exchange = self._parser = None
            self.idle_since_s = self.loop.time()
            self.resume_reading()
            self._on_end(self)
        else:
            self.close()

    def close(self) -> None:
        """Close the connection at once."""
        self.reusable = False
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.fail(TransportError("the connection was closed"))
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
        if exchange is None or parser is None:  # it spoke unasked: never for another client
            self.close()
            return
        if not exchange.status:
            self._head_bytes += len(data)
        try:
            parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self.reusable = False  # from here on it speaks another protocol
        except httptools.HttpParserCallbackError as error:
            self._fail(cast("Exception", error.__context__ or error))
            return
        except httptools.HttpParserError as error:
            if exchange.complete:  # more than one answer to one request
                self.reusable = False
            else:
                self._fail(TransportError(f"it sent what is not HTTP: {error}"))
                return
        if not exchange.status and self._head_bytes > MAX_HEAD_BYTES:
            self._fail(AnswerTooLarge(f"the head of its answer is larger than {MAX_HEAD_BYTES >> 10} KiB"))
            return
        exchange.received()

    def eof_received(self) -> bool:
        """Let the transport close: a backend that closes its side has no more to say."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """End a body that ends with the connection, or fail the exchange."""
        exchange = self._exchange
        if exchange is not None and exchange.status and self._until_eof and exc is None:
            exchange.complete = True
            exchange._wake()  # noqa: SLF001
        elif exchange is not None and not exchange.complete:
            unused = not self._head_bytes
            exchange.fail(TransportError(f"the connection was lost: {exc or 'the backend closed it'}", unused=unused))
        if self._writable is not None and not self._writable.done():
            self._writable.set_exception(TransportError("the connection was lost while the request was sent"))
            self._writable.exception()  # a request that has been answered waits for nothing
        if not self._closed:
            self._closed, self.reusable = True, False
            self._on_end(self)

    def pause_writing(self) -> None:
        """Hold back the rest of a request."""
        self._writable = self.loop.create_future()

    def resume_writing(self) -> None:
        """Let the rest of a request follow."""
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        self._writable = None

    # What the parser calls

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take one header, or trailer: that passes to no client."""
        exchange = self._exchange
        if exchange is None or exchange.status:
            self._head_bytes += len(name) + len(value)
            if self._head_bytes > 2 * MAX_HEAD_BYTES:
                raise AnswerTooLarge("the trailers of its answer are too large")
            return
        self._headers.append((name, value))
        if len(self._headers) > MAX_HEADERS:
            raise AnswerTooLarge(f"its answer has more than {MAX_HEADERS} headers")

    def on_headers_complete(self) -> None:
        """Hand over the head of an answer; an interim one is passed over."""
        exchange, parser = self._exchange, self._parser
        if exchange is None or parser is None or exchange.complete:
            self.reusable = False
            return
        status = parser.get_status_code()
        if parser.get_http_version() not in _VERSIONS:
            raise TransportError(f"it answered in HTTP/{parser.get_http_version()}")
        if status < _INTERIM.start:
            raise TransportError(f"it answered with the status {status:03}")
        if status in _INTERIM and status != _SWITCHING_PROTOCOLS:
            self._is_interim = True
            return
        headers = CIMultiDict[str]()
        for name, value in self._headers:
            headers.add(name.decode("latin-1"), value.decode("latin-1"))
        coding = headers.get("Transfer-Encoding")
        if coding is not None and coding.strip().lower() != "chunked":
            raise TransportError(f"its answer has the transfer coding {coding[:40]!r}, which was not offered")
        self._until_eof = coding is None and "Content-Length" not in headers and status not in _WITHOUT_BODY
        if self._until_eof or not parser.should_keep_alive():
            self.reusable = False
        self._note_keep_alive(headers)
        exchange.headers = headers
        exchange.status = status

    def on_body(self, data: bytes) -> None:
        """Take a part of a body."""
        exchange = self._exchange
        if exchange is not None and exchange.status and not exchange.complete:
            exchange.arrived(data)
        else:
            self.reusable = False

    def on_message_complete(self) -> None:
        """Note the end of an answer, or of an interim one."""
        exchange = self._exchange
        if self._is_interim:
            self._is_interim = False
            self._headers = []
            return
        if exchange is not None:
            exchange.complete = True

    def on_message_begin(self) -> None:
        """Note that something arrives behind an answer: it belongs to no request."""
        if self._exchange is not None and self._exchange.complete:
            self.reusable = False

    def _fail(self, error: Exception) -> None:
        exchange = self._exchange
        if exchange is not None:
            exchange.fail(error)
        self.close()

    def _note_keep_alive(self, headers: CIMultiDict[str]) -> None:
        text = headers.get("Keep-Alive", "")
        at = text.lower().find(_KEEP_ALIVE_TIMEOUT)
        if at >= 0:
            seconds = text[at + len(_KEEP_ALIVE_TIMEOUT) :].split(",")[0].strip()
            if seconds.isascii() and seconds.isdigit() and len(seconds) < 6:  # noqa: PLR2004  a day has five digits
                self.keepalive_s = max(0, int(seconds) - 1)
