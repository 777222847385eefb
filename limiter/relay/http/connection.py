"""The relay's connections: every error response is the relay's, and idle clients are disconnected.

All use of private names of aiohttp's server is in this module.

aiohttp itself responds to requests that it cannot parse and to `Expect` headers that it does not know. Here both are
dispatched like any other request, with the problem stored beforehand. Nothing here knows what is served.
"""

import asyncio
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast

from aiohttp import HttpVersion11, hdrs, web, web_protocol
from aiohttp.http import RawRequestMessage
from aiohttp.http_exceptions import LineTooLong
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from multidict import CIMultiDict, CIMultiDictProxy

from limiter._util.ids import random_id
from limiter._util.private_names import require
from limiter.log_events import event
from limiter.relay.http.acceptor import Acceptor, ConnectionLimits, Limit, OnClosed
from limiter.relay.http.problems import REQUEST_ID, Problem, problem_from, problem_response

SUPPORTED = "aiohttp>=3.14,<3.15"
_REQUIRES = {
    "aiohttp.web.BaseRunner": ("_make_server",),
    "aiohttp.web.BaseSite": ("_runner", "_server"),
    "aiohttp.web.RequestHandler": (
        "_current_request",
        "_loop",
        "_make_error_handler",
        "_messages",
        "_reading_paused",
        "_request_count",
        "_request_handler",
        "_waiter",
    ),
    "aiohttp.web.Server": ("_kwargs", "_loop"),
    "aiohttp.web.StreamResponse": ("_send_headers_immediately",),
    "aiohttp.web_protocol": ("_ErrInfo",),
}
require(SUPPORTED, _REQUIRES)

REFUSED = web.RequestKey("refused", Problem)  # why a request must be refused, whatever it is for
_CONTINUED = web.RequestKey("continued", bool)  # the client that waited for it was asked for the body
_CONTINUE = "100-continue"
_MAX_HEAD_BYTES = 64 << 10
_CHECKS = 4  # of the unsent bytes, within the time that a client may take to read any
_TOO_MANY_HEADERS = "Too many headers received"


class LateHeadResponse(web.StreamResponse):
    """A response that sends its head and first bytes in one write: the latter are there when it is prepared."""

    _send_headers_immediately = False


async def send_continue(request: web.Request) -> None:
    """Ask a client that waits for it (`Expect: 100-continue`) for the body. To be called before the first read."""
    if hdrs.EXPECT in request.headers and _CONTINUED not in request:
        request[_CONTINUED] = True
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # it is not part of the answer; aiohttp's own handler does the same


async def expect_later(_request: web.Request) -> None:
    """Leave an `Expect: 100-continue` to the first read: a client that is refused before it need not send the body."""


async def close_without_body(request: web.Request, response: web.StreamResponse) -> None:
    """Close the connection after a response to a client that was not asked for the body, and may send it or not."""
    if hdrs.EXPECT in request.headers and _CONTINUED not in request and not request.content.is_eof():
        response.force_close()
        response.headers[hdrs.CONNECTION] = "close"  # aiohttp has written its own headers before


async def close_after_unframed(request: web.Request, response: web.StreamResponse) -> None:
    """Close the connection after a response whose end nothing else shows: in HTTP/1.0, one without a length.

    aiohttp leaves it open if the client asked for keep-alive, as nginx may, and then the client waits for ever.
    """
    if request.version < HttpVersion11 and response.content_length is None:
        response.force_close()


class RelayRunner(web.AppRunner):
    """Runs an app on such connections.

    It takes more options than aiohttp's runner. aiohttp's `keepalive_timeout` also limits the time for the head of a
    request.

    Args:
        app: what it serves.
        limits: on the connections of clients.
        refused: called with the limit that a refused connection exceeded.
        options: aiohttp's, and in seconds `head_s`, the time for the head of a request, and `write_idle_s`, after which
            a client that reads nothing is disconnected.
    """

    def __init__(
        self,
        app: web.Application,
        *,
        limits: ConnectionLimits | None = None,
        refused: Callable[[Limit], None] = lambda _limit: None,
        **options: Any,
    ) -> None:
        super().__init__(app, **options)
        self._limits, self._refused = limits or ConnectionLimits(), refused

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        return _Server(
            made.request_handler,
            request_factory=_reject_unknown_expect(made.request_factory),
            handler_cancellation=made.handler_cancellation,
            **made._kwargs,  # noqa: SLF001  the app completes the options, and cannot be given another class
        )

    async def listen(self, listeners: Sequence[socket.socket]) -> None:
        """Serve the connections to sockets that listen already. They are closed with the runner."""
        await _Site(self, listeners, self._limits, self._refused).start()

    def connections(self) -> int:
        """Return how many connections are open."""
        return len(self.server.connections) if self.server is not None else 0


class _Site(web.BaseSite):
    """What a runner serves at, with an acceptor."""

    def __init__(
        self,
        runner: RelayRunner,
        listeners: Sequence[socket.socket],
        limits: ConnectionLimits,
        refused: Callable[[Limit], None],
    ) -> None:
        super().__init__(runner)
        self._listeners, self._limits, self._on_refused = listeners, limits, refused

    @property
    def name(self) -> str:
        """The addresses."""
        return ", ".join(str(listener.getsockname()) for listener in self._listeners)

    async def start(self) -> None:
        """Start to accept connections."""
        await super().start()
        server = cast("_Server", self._runner.server)
        acceptor = Acceptor(self._listeners, server.connection, self._limits, self._on_refused)
        self._server = cast("asyncio.AbstractServer", acceptor)  # it has what aiohttp uses of one


class _Server(web.Server):
    def __call__(self) -> Any:
        return self.connection()

    def connection(self, on_closed: OnClosed = lambda _connection: None) -> "RelayConnection":
        """Return the protocol of a new connection. on_closed: called with it at its end."""
        return RelayConnection(self, loop=self._loop, on_closed=on_closed, **self._kwargs)


class StreamSource(Protocol):
    """What a stream is read from."""

    def pause(self) -> None: ...  # noqa: D102  documented by the class
    def resume(self) -> None: ...  # noqa: D102


class RelayConnection(web.RequestHandler):
    """A client's connection."""

    __slots__ = (
        "_body",
        "_head_b",
        "_head_end",
        "_head_s",
        "_idle_checks",
        "_is_full",
        "_is_refused",
        "_next_check",
        "_on_closed",
        "_source",
        "_unsent",
        "_write_idle_s",
    )

    def __init__(
        self, manager: web.Server, *, head_s: float, write_idle_s: float, on_closed: OnClosed, **options: Any
    ) -> None:
        super().__init__(manager, **options)
        self._head_s, self._write_idle_s, self._on_closed = head_s, write_idle_s, on_closed
        self._body: StreamReader = EMPTY_PAYLOAD  # of the last request that came
        self._head_b = 0  # how much of an unfinished head has come
        self._head_end: asyncio.TimerHandle | None = None
        self._is_refused = False
        self._next_check: asyncio.TimerHandle | None = None
        self._idle_checks = self._unsent = 0
        self._source: StreamSource | None = None
        self._is_full = False

    @contextmanager
    def fed_by(self, source: StreamSource) -> Iterator[None]:
        """Pause a source within the block whenever the client does not take what is written to the transport."""
        self._source = source
        if self._is_full:
            source.pause()
        try:
            yield
        finally:
            self._source = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start to watch whether the client reads."""
        super().connection_made(transport)
        self._check_progress(cast("asyncio.Transport", transport))

    def connection_lost(self, exc: BaseException | None) -> None:
        """Stop that."""
        self._on_closed(self)
        for timer in (self._next_check, self._head_end):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Pause the source of a stream: the client does not take what is written."""
        self._is_full = True
        super().pause_writing()
        if self._source is not None:
            self._source.pause()

    def resume_writing(self) -> None:
        """Resume the source of a stream."""
        self._idle_checks = 0
        self._is_full = False
        super().resume_writing()
        if self._source is not None:
            self._source.resume()

    def resume_reading(self, resume_parser: bool = True) -> None:
        """Resume what was paused; aiohttp would parse again at each read of a body."""
        if self._reading_paused:
            super().resume_reading(resume_parser)

    def data_received(self, data: bytes) -> None:
        """Parse requests, end one whose body is damaged, and refuse one whose head is too large."""
        if self._is_refused:
            return  # the connection is about to close, and the client can still read why
        count, is_body = self._request_count, not self._body.is_eof()
        super().data_received(data)
        self._end_damaged_body()
        if (new := self._request_count - count) or is_body:
            self._end_head(new, len(data))
        elif data:
            self._head_b += len(data)
            if self._head_b > _MAX_HEAD_BYTES:
                self._refuse_head()
            elif self._head_end is None:
                self._head_end = self._loop.call_later(self._head_s, self._end_slow_head)

    def _end_damaged_body(self) -> None:
        request = self._current_request
        if request is None or len(self._messages) != 1 or isinstance(self._messages[0][0], RawRequestMessage):
            return
        # The rest of the body cannot be parsed, which aiohttp's C parser (3.14) reports to the next request only.
        if not request.content.is_eof():
            request.content.set_exception(web.RequestPayloadError("damaged"))
            request.content.feed_eof()
            self.close()

    def _end_head(self, new: int, received_b: int) -> None:
        """Note that new requests have come, or more of a body."""
        if self._head_end is not None:
            self._head_end.cancel()
            self._head_end = None
        # What came of the next head with the last piece is not known, and at most as large as a read of the socket.
        received_b, self._head_b = self._head_b + received_b, 0
        if new:
            self._body = self._messages[-1][1]
            if received_b > _MAX_HEAD_BYTES:
                while new and _head_size(self._messages[-new][0]) <= _MAX_HEAD_BYTES:
                    new -= 1
                if new:
                    for _ in range(new):
                        self._messages.pop()
                    self._refuse_head()

    def _refuse_head(self) -> None:
        """Answer that the head is too large, after the requests before it, and read nothing more."""
        self._is_refused = True
        self._messages.append((web_protocol._ErrInfo(431, _HeadTooLarge(), ""), EMPTY_PAYLOAD))  # noqa: SLF001  as aiohttp does
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _end_slow_head(self) -> None:
        """Close the connection: the head of a request took too long. A request before it is served first."""
        if self._current_request is None and not self._messages:
            self.force_close()
        else:
            self._head_end = self._loop.call_later(self._head_s, self._end_slow_head)

    def _check_progress(self, transport: asyncio.Transport) -> None:
        """Abort the connection when several checks in a row find the same bytes unsent."""
        unsent = transport.get_write_buffer_size()
        self._idle_checks = self._idle_checks + 1 if unsent and unsent == self._unsent else 0
        self._unsent = unsent
        if self._idle_checks == _CHECKS:
            transport.abort()
        else:
            self._next_check = self._loop.call_later(self._write_idle_s / _CHECKS, self._check_progress, transport)

    def _make_error_handler(self, err_info: Any) -> Any:
        """Serve an unreadable request as one that is refused, in place of aiohttp's own error page."""
        serve: Any = self._request_handler

        async def refuse(request: web.Request) -> web.StreamResponse:
            request[REFUSED] = _unreadable(err_info.exc)
            answer: web.StreamResponse = await serve(request)
            return answer

        return refuse

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,  # noqa: ARG002  an interface
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002  an interface
    ) -> web.StreamResponse:
        """Respond to a request that failed outside of the error middleware."""
        self.logger.error("An error of this program ended a request", exc_info=exc, extra=event("unexpected_error"))
        if request.writer.output_size or not isinstance(request, web.Request):
            raise ConnectionError("the response has begun already")
        if REQUEST_ID not in request:
            request[REQUEST_ID] = random_id()
        response = problem_response(request, problem_from(RuntimeError()))
        response.force_close()
        return response


def _reject_unknown_expect(make: Callable[..., Any]) -> Callable[..., web.Request]:
    """Refuse an `Expect` other than 100-continue before aiohttp does, and ignore any of HTTP/1.0, which has none."""

    def make_request(message: RawRequestMessage, *rest: Any) -> web.Request:
        given: object = message.headers
        if not isinstance(given, CIMultiDictProxy):  # aiohttp's stand-in for what it could not parse
            message = message._replace(headers=CIMultiDictProxy(CIMultiDict()))
        expected, is_old = message.headers.get(hdrs.EXPECT, "").lower(), message.version < HttpVersion11
        if expected and (is_old or expected != _CONTINUE):
            headers = CIMultiDict(message.headers)
            headers.popall(hdrs.EXPECT)
            message = message._replace(headers=CIMultiDictProxy(headers))
        request: web.Request = make(message, *rest)
        if expected not in ("", _CONTINUE) and not is_old:
            detail = "Expect can only be 100-continue."
            request[REFUSED] = Problem(417, "expectation_failed", "Expectation failed", detail)
        return request

    return make_request


class _HeadTooLarge(Exception):  # noqa: N818  a reason
    """A head of more than _MAX_HEAD_BYTES."""


def _head_size(message: object) -> int:
    """Return the size of the headers of a request, in bytes."""
    if not isinstance(message, RawRequestMessage):
        return 0
    return sum(len(name) + len(value) + 4 for name, value in message.raw_headers)


def _unreadable(error: BaseException) -> Problem:
    too_large = isinstance(error, LineTooLong | _HeadTooLarge)
    if too_large or getattr(error, "message", "") == _TOO_MANY_HEADERS:
        detail = "The request line and each header are limited to 8190 bytes, the headers to 128, and all to 64 KiB."
        return Problem(431, "head_too_large", "Request head too large", detail)
    return Problem(400, "malformed_request", "Malformed request", "This is not a valid HTTP/1.1 request.")
