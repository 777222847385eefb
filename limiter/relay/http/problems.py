"""The error object of the relay's own responses.

It follows two conventions at once: the members of RFC 9457 and the `error` object of OpenAI's API.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from aiohttp import hdrs, web

from limiter.errors import BrokenRow, InvalidInstallId, LimiterUnavailable, OutOfMemory, Overloaded
from limiter.relay.http.json_response import json_response

REQUEST_ID = web.RequestKey("request_id", str)
_QUOTA_EXCEEDED = (
    "https://iana.org/assignments/http-problem-types#quota-exceeded"  # draft-ietf-httpapi-ratelimit-headers
)
_OPENAI_TYPES = {
    401: "authentication_error",
    402: "insufficient_quota",
    403: "permission_error",
    429: "rate_limit_error",
}
_SERVER_ERROR = 500


@dataclass(frozen=True, slots=True)
class Problem:
    """One error as the client sees it. `code` is stable; `retry_after_s` becomes the header Retry-After."""

    status: int
    code: str
    title: str
    detail: str
    retry_after_s: int | None = None
    may_retry: bool = True
    param: str | None = None
    renews_at: str | None = None
    violated_policies: Sequence[str] = ()

    def as_dict(self, request_id: str) -> dict[str, object]:
        """Return the error object."""
        fallback = "server_error" if self.status >= _SERVER_ERROR else "invalid_request_error"
        body: dict[str, object] = {
            "type": _QUOTA_EXCEEDED if self.violated_policies else f"urn:limiter:error:{self.code}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "instance": f"urn:limiter:request:{request_id}",
            "error": {
                "message": self.detail,
                "type": _OPENAI_TYPES.get(self.status, fallback),
                "code": self.code,
                "param": self.param,
            },
        }
        if self.violated_policies:
            body["violated-policies"] = list(self.violated_policies)
            body["renews_at"] = self.renews_at
        return body

    def headers(self) -> dict[str, str]:
        """Return the headers of the error response."""
        headers: dict[str, str] = {}
        if self.retry_after_s is not None:
            headers[hdrs.RETRY_AFTER] = str(self.retry_after_s)
        if not self.may_retry:
            headers["x-should-retry"] = "false"  # in the OpenAI SDKs this header overrides their own rules
        return headers


class ProblemRaised(Exception):  # noqa: N818  carries a Problem out of a handler; the middleware responds
    """A request that ends in an error object. headers: more of them for the response."""

    def __init__(self, problem: Problem, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(problem.detail)
        self.problem = problem
        self.headers = headers or {}


def fail(status: int, code: str, title: str, detail: str, *, param: str | None = None) -> NoReturn:
    """Raise ProblemRaised with an error that the client can avoid by sending another request."""
    raise ProblemRaised(Problem(status, code, title, detail, param=param))


def problem_response(request: web.Request, problem: Problem, headers: Mapping[str, str] | None = None) -> web.Response:
    """Return the response with an error object, as application/problem+json if `Accept` has that."""
    accepts_problem = "application/problem+json" in request.headers.get(hdrs.ACCEPT, "")
    return json_response(
        problem.as_dict(request[REQUEST_ID]),
        status=problem.status,
        content_type="application/problem+json" if accepts_problem else "application/json",
        headers={**(headers or {}), **problem.headers()},
    )


def problem_from(error: Exception) -> Problem:  # noqa: PLR0911  a table of cases
    """Return the problem for an exception; that of an unexpected exception reveals nothing about it."""
    match error:
        case ProblemRaised():
            return error.problem
        case InvalidInstallId():
            return Problem(400, "invalid_install_id", "Invalid install id", str(error))
        case LimiterUnavailable():
            return _undecided(error)
        case BrokenRow():
            return Problem(
                500, "broken_row", "Broken row", "The record of this install needs its operator's attention."
            )
        case web.HTTPRequestEntityTooLarge():
            return Problem(413, "request_too_large", "Request too large", "The body is larger than this relay accepts.")
        case web.HTTPNotFound():
            return Problem(404, "unknown_path", "Not found", "This relay does not serve this path.")
        case web.HTTPMethodNotAllowed():
            allowed = ", ".join(sorted(error.allowed_methods))
            return Problem(405, "method_not_allowed", "Method not allowed", f"This path accepts {allowed}.")
        case web.HTTPException():
            return Problem(error.status, "http_error", error.reason, error.text or error.reason)
        case _:
            return Problem(500, "internal_error", "Internal error", "The relay failed; its log says why.")


def _undecided(error: LimiterUnavailable) -> Problem:
    match error:
        case Overloaded():
            detail = "Too many decisions are waiting already."
            return Problem(503, "limiter_overloaded", "Limiter overloaded", detail, retry_after_s=1)
        case OutOfMemory():
            detail = "No credits can be reserved at the moment: the memory for them is used up."
            return Problem(503, "limiter_out_of_memory", "Limiter out of memory", detail, retry_after_s=5)
        case _:
            detail = "Credits cannot be checked at the moment."
            return Problem(503, "limiter_unavailable", "Limiter unavailable", detail, retry_after_s=2)
