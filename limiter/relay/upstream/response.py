"""The response of a backend, read piece by piece, or the reason why there is none. Requests are not known here."""

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
FAILURES = (
    TimeoutError,
    aiohttp.ClientError,
    HttpProcessingError,
    OSError,
)  # HttpProcessingError: a body that is not valid HTTP
SUCCESS = range(200, 300)


class BackendFailed(Exception):  # noqa: N818  reads as what happened
    """A backend sent no response that the client should see.

    alive: it did respond, so that the call does not count against its circuit breaker. outcome: for the metrics.
    """

    def __init__(self, problem: Problem, *, alive: bool = False, outcome: Outcome = "failed") -> None:
        super().__init__(problem.detail)
        self.problem = problem
        self.alive = alive
        self.outcome = outcome


async def next_piece(content: aiohttp.StreamReader) -> bytes:
    """Return the next bytes of a body, waiting for them if necessary; b"" at its end. Raises one of FAILURES."""
    try:
        return await content.readany()
    except RuntimeError as error:
        # aiohttp (3.14) raises it for a body whose chunk its parser rejected, once the connection has closed.
        raise aiohttp.ClientPayloadError("the connection closed within the body") from error


class BackendResponse:
    """A backend's response whose first bytes have arrived. `first` and `read` return the bytes that the backend sent.

    Use it as `with upstream:`. Leaving the block before the end of the response closes the connection, which stops the
    backend's work.

    Args:
        backend: its name.
        response: the response as the transport returned it.
        first: the first bytes of the body.
        headers: those that pass to the client.
        idle_s: the longest pause between two pieces of the body, in seconds.
        ends_s: when the body must be complete, in loop time.
        may_stay: whether the connection can be reused.
        on_end: called with the outcome of the call.
    """

    __slots__ = ("_ends_s", "_idle_s", "_may_stay", "_on_end", "_outcome", "_response", "backend", "first", "headers")

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
        on_end: Callable[[Outcome], None],
    ) -> None:
        self.backend, self.first, self.headers = backend, first, headers
        self._response, self._idle_s, self._ends_s, self._may_stay = response, idle_s, ends_s, may_stay
        self._on_end = on_end
        self._outcome: Outcome = "cancelled"  # as when the client disconnects, unless another outcome follows

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(error)

    @property
    def status(self) -> int:
        """The status of the response."""
        return self._response.status

    @property
    def succeeded(self) -> bool:
        """Whether the backend served the request."""
        return self._response.status in SUCCESS

    @property
    def streams(self) -> bool:
        """Whether the response is a stream of server-sent events."""
        return self.headers.get(hdrs.CONTENT_TYPE, "").lower().startswith("text/event-stream")

    async def read(self) -> bytes:
        """Return the next bytes after `first`; b"" at the end. Raises BackendFailed."""
        content = self._response.content
        try:
            # Bytes that have arrived need no timer: most responses are complete by now.
            if content.at_eof() and content.exception() is None:
                chunk = b""
            else:
                loop = asyncio.get_running_loop()
                now_s = loop.time()
                if now_s >= self._ends_s:  # no timer would ever fire for a body that always has more
                    raise TimeoutError
                ends_s = min(now_s + self._idle_s, self._ends_s)
                timer = loop.call_at(ends_s, content.set_exception, TimeoutError())
                try:
                    chunk = await next_piece(content)
                finally:
                    timer.cancel()
        except FAILURES as error:
            failure = failed(self.backend, error)
            self._outcome = failure.outcome  # for a stream, the `with` block ends without an error
            raise failure from error
        if not chunk:
            self._outcome = "served" if self.succeeded else "refused"
        return chunk

    def end(self, error: BaseException | None) -> None:
        """End the call. error: the exception that interrupted it."""
        if self._may_stay and self._response.content.at_eof():
            self._response.release()
        else:
            self._response.close()
        self._on_end(error.outcome if isinstance(error, BackendFailed) else self._outcome)


def backend_problem(name: Backend, status: int, code: str, what: str, retry_after_s: int = 1) -> Problem:
    """Return the problem of a backend. what: the predicate of the sentence about it."""
    title = "Backend timeout" if code == "backend_timeout" else "Backend unavailable"
    return Problem(status, code, title, f"The backend {name!r} {what}.", retry_after_s=retry_after_s)


def failed(name: Backend, error: BaseException) -> BackendFailed:
    """Return the error for one of FAILURES."""
    if isinstance(error, TimeoutError):
        problem = backend_problem(name, 504, "backend_timeout", "did not answer in time")
        return BackendFailed(problem, outcome="timeout")
    return BackendFailed(
        backend_problem(name, 502, "backend_unavailable", "cannot be reached, or the connection broke")
    )
