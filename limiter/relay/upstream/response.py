"""What a backend answers, bit by bit, or why it does not. Who is asked, and with what, is not known here."""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Literal, Self

import aiohttp
from aiohttp import hdrs
from aiohttp.http_exceptions import HttpProcessingError
from multidict import CIMultiDict

from limiter.credits.models import Backend
from limiter.relay.http.problems import Problem
from limiter.relay.upstream.transport import Answer

Outcome = Literal["served", "refused", "failed", "timeout", "cancelled", "breaker_open"]
FAILURES = (TimeoutError, aiohttp.ClientError, HttpProcessingError, OSError)  # the third: a body that is no HTTP
SUCCESS = range(200, 300)


class BackendFailed(Exception):  # noqa: N818  reads as what happened
    """A backend gave nothing that the client should see.

    alive: it answered, if not well, so that nothing speaks against the next try. outcome: what the call is counted as.
    """

    def __init__(self, problem: Problem, *, alive: bool = False, outcome: Outcome = "failed") -> None:
        super().__init__(problem.detail)
        self.problem = problem
        self.alive = alive
        self.outcome = outcome


async def next_piece(content: aiohttp.StreamReader) -> bytes:
    """Give what has come of a body, or else wait for it; nothing at its end. Raises one of FAILURES."""
    try:
        return await content.readany()
    except RuntimeError as error:
        # So says aiohttp (3.14) of a body that it forgot, as its parser refused a chunk, when the connection closed.
        raise aiohttp.ClientPayloadError("the connection closed within the body") from error


class BackendResponse:
    """A backend's answer whose first bytes have come. `first` and what `read` gives are as the backend sent them.

    Use it as `with upstream:`. Leaving the block before the end of the answer closes the connection, which stops the
    backend's work. idle_s: between two pieces of the answer. ends_s: when all of it must have come, in loop time.
    may_stay: whether the connection can be used again. over: told how the call ended.
    """

    __slots__ = ("_ends_s", "_idle_s", "_may_stay", "_outcome", "_over", "_response", "backend", "first", "headers")

    def __init__(
        self,
        backend: Backend,
        response: Answer,
        first: bytes,
        headers: CIMultiDict[str],
        *,
        idle_s: float,
        ends_s: float,
        may_stay: bool,
        over: Callable[[Outcome], None],
    ) -> None:
        self.backend, self.first, self.headers = backend, first, headers
        self._response, self._idle_s, self._ends_s, self._may_stay = response, idle_s, ends_s, may_stay
        self._over = over
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
        return self._response.status

    @property
    def succeeded(self) -> bool:
        """Whether the backend served the request."""
        return self._response.status in SUCCESS

    @property
    def streams(self) -> bool:
        """Whether the answer is a stream of server-sent events."""
        return self.headers.get(hdrs.CONTENT_TYPE, "").lower().startswith("text/event-stream")

    async def read(self) -> bytes:
        """Give the next bytes after `first`; none at the end. Raises BackendFailed."""
        content = self._response.content
        try:
            # What is there already needs no timer: most answers have come whole by now.
            if content.at_eof() and content.exception() is None:
                chunk = b""
            else:
                loop = asyncio.get_running_loop()
                now_s = loop.time()
                if now_s >= self._ends_s:  # of one that always has more no timer would ever be heard
                    raise TimeoutError
                ends_s = min(now_s + self._idle_s, self._ends_s)
                timer = loop.call_at(ends_s, content.set_exception, TimeoutError())
                try:
                    chunk = await next_piece(content)
                finally:
                    timer.cancel()
        except FAILURES as error:
            failure = failed(self.backend, error)
            self._outcome = failure.outcome  # a stream's client is told of it, and the block ends as if it were well
            raise failure from error
        if not chunk:
            self._outcome = "served" if self.succeeded else "refused"
        return chunk

    def end(self, error: BaseException | None) -> None:
        """End the call, with what broke it off."""
        if self._may_stay and self._response.content.at_eof():
            self._response.release()
        else:
            self._response.close()
        self._over(error.outcome if isinstance(error, BackendFailed) else self._outcome)


def backend_problem(name: Backend, status: int, code: str, what: str, retry_after_s: int = 1) -> Problem:
    """Say what is wrong with a backend."""
    title = "Backend timeout" if code == "backend_timeout" else "Backend unavailable"
    return Problem(status, code, title, f"The backend {name!r} {what}.", retry_after_s=retry_after_s)


def failed(name: Backend, error: BaseException) -> BackendFailed:
    """Say what one of FAILURES means."""
    if isinstance(error, TimeoutError):
        problem = backend_problem(name, 504, "backend_timeout", "did not answer in time")
        return BackendFailed(problem, outcome="timeout")
    return BackendFailed(backend_problem(name, 502, "backend_unavailable", "cannot be reached, or broke off"))
