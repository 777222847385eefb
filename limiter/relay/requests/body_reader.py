"""Reads the body of a request as it arrives, from a client that neither stands still nor dribbles."""

import asyncio
from typing import NamedTuple

from aiohttp import ClientError, web
from aiohttp.http_exceptions import HttpProcessingError

from limiter.relay.http.connection import send_continue
from limiter.relay.http.problems import Problem, ProblemRaised, fail


class BodyPace(NamedTuple):
    """How fast a client must send a body. While the relay does not read, as a backend takes no more, no time counts.

    Attributes:
        total_s: how long all of it may take, in seconds.
        idle_s: how long the client may pause, in seconds.
        min_rate_b: how many bytes a second must arrive on average, once idle_s have passed; 0: any number.
    """

    total_s: float
    idle_s: float = 30
    min_rate_b: int = 1024


class BodyReader:
    """Reads one body. An `Expect: 100-continue` is answered at its first read: after all checks that need no body."""

    __slots__ = ("_content", "_ends_s", "_loop", "_pace", "_request", "_waited_s", "read_b")

    def __init__(self, request: web.Request, pace: BodyPace) -> None:
        self._request, self._content, self._pace = request, request.content, pace
        self._loop = asyncio.get_running_loop()
        self._ends_s = self._loop.time() + pace.total_s
        self._waited_s = 0.0
        self.read_b = 0

    @property
    def is_at_end(self) -> bool:
        """Whether all of it has been read."""
        return self._content.at_eof() and self._content.exception() is None

    async def read(self) -> bytes:
        """Return what has arrived, or arrives next; b"" at the end. Raises ProblemRaised: 400 and 408."""
        try:
            if self._content.is_eof():
                chunk = self._content.read_nowait()
            else:
                await send_continue(self._request)
                chunk = await self._wait()
        except TimeoutError:
            fail(408, "request_timeout", "Request timeout", self._too_slow())
        except (web.RequestPayloadError, ClientError, HttpProcessingError, OSError):
            detail = "The body cannot be read: it broke off, or its encoding is damaged."
            raise ProblemRaised(Problem(400, "invalid_body", "Invalid body", detail)) from None
        self.read_b += len(chunk)
        return chunk

    async def _wait(self) -> bytes:
        pace, began_s = self._pace, self._loop.time()
        patience_s = pace.idle_s
        if pace.min_rate_b:
            patience_s = min(patience_s, pace.idle_s + self.read_b / pace.min_rate_b - self._waited_s)
        try:
            async with asyncio.timeout_at(min(self._ends_s, began_s + patience_s)):
                return await self._content.readany()
        finally:
            self._waited_s += self._loop.time() - began_s

    def _too_slow(self) -> str:
        pace = self._pace
        rate = f", or fewer than {pace.min_rate_b} bytes a second" if pace.min_rate_b else ""
        return f"No byte of the body arrived for {pace.idle_s:g} s{rate}, or not all of it within {pace.total_s:g} s."
