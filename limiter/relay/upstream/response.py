"""The response of a backend, read piece by piece, or the reason why there is none. Requests are not known here."""

from collections.abc import Callable
from types import TracebackType
from typing import Literal, Self

from aiohttp import hdrs
from multidict import CIMultiDict

from limiter.credits.models import Backend
from limiter.relay.http.problems import Problem
from limiter.relay.upstream.http_protocol import AnswerTooLarge, Exchange, TransportError
from limiter.relay.upstream.transport import NoConnectionFree

Outcome = Literal["served", "refused", "failed", "timeout", "cancelled", "breaker_open", "busy"]
FAILURES = (TimeoutError, TransportError, OSError)
SUCCESS = range(200, 300)


class BackendFailed(Exception):  # noqa: N818  reads as what happened
    """A backend sent no response that the client should see.

    alive: it did respond, so that the call does not count against its circuit breaker. outcome: for the metrics;
    `breaker_open` and `busy` are calls that were not made, and say nothing about the backend.
    """

    def __init__(self, problem: Problem, *, alive: bool = False, outcome: Outcome = "failed") -> None:
        super().__init__(problem.detail)
        self.problem = problem
        self.alive = alive
        self.outcome = outcome


class BackendResponse:
    """A backend's response whose first bytes have arrived. `first` and `read` return the bytes that the backend sent.

    Use it as `with upstream:`. Leaving the block before the end of the response closes the connection, which stops the
    backend's work.

    Args:
        backend: its name.
        response: the response as the transport returned it.
        first: the first bytes of the body.
        headers: those that pass to the client.
        on_end: called with the outcome of the call.
    """

    __slots__ = ("_on_end", "_outcome", "_response", "backend", "first", "headers")

    def __init__(
        self,
        backend: Backend,
        response: Exchange,
        first: bytes,
        headers: CIMultiDict[str],
        *,
        on_end: Callable[[Outcome], None],
    ) -> None:
        self.backend, self.first, self.headers = backend, first, headers
        self._response = response
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
        try:
            chunk = await self._response.read()
        except FAILURES as error:
            failure = failed(self.backend, error)
            self._outcome = failure.outcome  # for a stream, the `with` block ends without an error
            raise failure from error
        if not chunk:
            self._outcome = "served" if self.succeeded else "refused"
        return chunk

    def end(self, error: BaseException | None) -> None:
        """End the call. error: the exception that interrupted it."""
        self._response.release()
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
    if isinstance(error, NoConnectionFree):
        detail = f"All connections that this relay may have to the backend {name!r} are in use."
        return BackendFailed(Problem(503, "relay_busy", "Relay busy", detail, retry_after_s=1), outcome="busy")
    if isinstance(error, AnswerTooLarge):
        what = f"sent headers that cannot be read: {error}"
        return BackendFailed(backend_problem(name, 502, "backend_unavailable", what), alive=True)
    return BackendFailed(
        backend_problem(name, 502, "backend_unavailable", "cannot be reached, or the connection broke")
    )
