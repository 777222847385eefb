"""The relay's connections: no answer is aiohttp's own, and nobody keeps one by doing nothing.

Every private part of aiohttp's server that is used is used here.

aiohttp answers by itself what it cannot read, and `Expect` headers that it does not know; here both go the way of every
other request, with the problem noted beforehand. Nothing here knows what is served.
"""

import asyncio
from collections.abc import Callable
from typing import Any, cast

from aiohttp import HttpVersion11, hdrs, web
from aiohttp.http import RawRequestMessage
from aiohttp.http_exceptions import LineTooLong
from multidict import CIMultiDict, CIMultiDictProxy

from limiter._util.ids import random_id
from limiter._util.private_names import require
from limiter.relay.http.problems import REQUEST_ID, Problem, problem_from, problem_response

SUPPORTED = "aiohttp>=3.14,<3.15"
_REQUIRES = {
    "aiohttp.web.BaseRunner": ("_make_server",),
    "aiohttp.web.RequestHandler": ("_current_request", "_loop", "_make_error_handler", "_messages", "_request_handler"),
    "aiohttp.web.Server": ("_kwargs", "_loop"),
    "aiohttp.web.StreamResponse": ("_send_headers_immediately",),
}
require(SUPPORTED, _REQUIRES)

REFUSED = web.RequestKey("refused", Problem)  # why a request is not to be served, whatever it asks for
_CONTINUE = "100-continue"
_LOOKS = 4  # at what is unsent, within the time that a client may take none of it
_TOO_MANY_HEADERS = "Too many headers received"


class LateHeadResponse(web.StreamResponse):
    """A response whose head leaves in one write with its first bytes, which are there already when it is prepared."""

    _send_headers_immediately = False


class RelayRunner(web.AppRunner):
    """Runs an app on such connections.

    More options than aiohttp's: write_idle_s: how long a client may take nothing of what is written to it.
    keepalive_timeout, which aiohttp has, is also how long the head of a request may take.
    """

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        return _Server(
            made.request_handler,
            request_factory=_without_odd_expect(made.request_factory),
            handler_cancellation=made.handler_cancellation,
            **made._kwargs,  # noqa: SLF001  the app makes the options complete, and has no place to name a class
        )


class _Server(web.Server):
    def __call__(self) -> web.RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)


class _Connection(web.RequestHandler):
    __slots__ = ("_look_again", "_looks", "_unsent", "_write_idle_s")

    def __init__(self, manager: web.Server, *, write_idle_s: float, **options: Any) -> None:
        super().__init__(manager, **options)
        self._write_idle_s = write_idle_s
        self._look_again: asyncio.TimerHandle | None = None
        self._looks = self._unsent = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._look(cast("asyncio.Transport", transport))

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._look_again is not None:
            self._look_again.cancel()
        super().connection_lost(exc)

    def resume_writing(self) -> None:
        self._looks = 0
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        request = self._current_request
        if request is None or len(self._messages) != 1 or isinstance(self._messages[0][0], RawRequestMessage):
            return
        # Its body cannot be read on, which aiohttp's C parser (3.14) tells the request after it, and not this one.
        if not request.content.is_eof():
            request.content.set_exception(web.RequestPayloadError("damaged"))
            request.content.feed_eof()
            self.close()

    def _look(self, transport: asyncio.Transport) -> None:
        """Break the connection off when several looks in a row find the same bytes unsent."""
        unsent = transport.get_write_buffer_size()
        self._looks = self._looks + 1 if unsent and unsent == self._unsent else 0
        self._unsent = unsent
        if self._looks == _LOOKS:
            transport.abort()
        else:
            self._look_again = self._loop.call_later(self._write_idle_s / _LOOKS, self._look, transport)

    def _make_error_handler(self, err_info: Any) -> Any:
        """Serve what could not be read as a request that is refused; in place of aiohttp's own page."""
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
        """Answer a request that failed outside of the middleware that answers errors."""
        self.logger.error("unexpected", exc_info=exc)
        if request.writer.output_size or not isinstance(request, web.Request):
            raise ConnectionError("half an answer is not an answer")
        if REQUEST_ID not in request:
            request[REQUEST_ID] = random_id()
        response = problem_response(request, problem_from(RuntimeError()))
        response.force_close()
        return response


def _without_odd_expect(make: Callable[..., Any]) -> Callable[..., web.Request]:
    """Refuse an `Expect` that is not 100-continue before aiohttp does; HTTP/1.0 has none."""

    def make_request(message: RawRequestMessage, *rest: Any) -> web.Request:
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


def _unreadable(error: BaseException) -> Problem:
    if isinstance(error, LineTooLong) or getattr(error, "message", "") == _TOO_MANY_HEADERS:
        detail = "The request line and each header can have 8190 bytes, and there can be 128 headers."
        return Problem(431, "head_too_large", "Request head too large", detail)
    return Problem(400, "malformed_request", "Malformed request", "What came is no HTTP/1.1 request.")
