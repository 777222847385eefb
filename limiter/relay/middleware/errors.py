"""The one place where an exception becomes an error response, and where unsupported requests are refused."""

import logging
from collections.abc import Mapping

from aiohttp import HttpVersion10, hdrs, web

from limiter._util.ids import random_id
from limiter.errors import LimiterError, OutOfMemory
from limiter.log_events import event
from limiter.relay.http.connection import REFUSED
from limiter.relay.http.handler import Handler
from limiter.relay.http.problems import REQUEST_ID, Problem, ProblemRaised, fail, problem_from, problem_response
from limiter.relay.metering.address_rate_limit import AddressRateLimit
from limiter.relay.metering.availability import RedisUnavailable
from limiter.relay.middleware.cors import preflight

ADDRESS_RATE_LIMIT = web.AppKey("address_rate_limit", AddressRateLimit)
_LOG = logging.getLogger("limiter.relay")
_WORTH_READING = 64 << 10  # bytes that a refused client still sends
_SERVER_ERROR = 500


@web.middleware
async def error_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Assign the request id, refuse unsupported requests, and turn every exception into the error object."""
    request[REQUEST_ID] = random_id()
    try:
        _check(request)
        if _wants_upgrade(request):
            return _refuse_upgrade(request)
        return preflight(request) or await handler(request)
    except ProblemRaised as raised:
        return _respond(request, raised.problem, raised.headers)
    except (LimiterError, web.HTTPException) as error:
        problem = problem_from(error)
        logged_once = isinstance(error, RedisUnavailable | OutOfMemory)  # each is a state of Redis
        if problem.status >= _SERVER_ERROR and not logged_once:
            _LOG.error("%s", error, extra=event("request_failed", request_id=request[REQUEST_ID]))
        headers = {"Allow": error.headers["Allow"]} if isinstance(error, web.HTTPMethodNotAllowed) else None
        return _respond(request, problem, headers)
    except Exception as error:  # the last resort: the client gets a response, the log the traceback
        if request.writer.output_size:  # a second response within the first could be taken for a part of it
            raise
        _LOG.exception(
            "An error of this program ended a request", extra=event("unexpected_error", request_id=request[REQUEST_ID])
        )
        return _respond(request, problem_from(error))


def _check(request: web.Request) -> None:
    """Refuse what is refused whatever it asks for. Raises ProblemRaised."""
    if (rate_limit := request.app.get(ADDRESS_RATE_LIMIT)) is not None:
        rate_limit.count(request)
    if refused := request.get(REFUSED):
        raise ProblemRaised(refused)
    if request.version < HttpVersion10:
        fail(400, "unsupported_http_version", "Unsupported HTTP version", "This relay speaks HTTP/1.0 and 1.1.")
    if request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower() != "identity":
        fail(415, "packed_body", "Packed body", "Send the body uncompressed, without a Content-Encoding.")


def _respond(request: web.Request, problem: Problem, headers: Mapping[str, str] | None = None) -> web.Response:
    response = problem_response(request, problem, headers)
    length = request.content_length
    if not request.content.at_eof() and (length is None or length > _WORTH_READING):
        response.force_close()  # the client would have to send all the rest before its next request
    return response


def _wants_upgrade(request: web.Request) -> bool:
    """Return whether the client requests another protocol. Not h2c, which some clients offer on each connection."""
    if request.headers.get(hdrs.UPGRADE, "").strip().lower() in ("", "h2c"):
        return False
    tokens = [token.strip().lower() for token in request.headers.get(hdrs.CONNECTION, "").split(",")]
    return "upgrade" in tokens


def _refuse_upgrade(request: web.Request) -> web.Response:
    detail = "This relay speaks HTTP/1.1 and offers no upgrade."
    response = problem_response(request, Problem(400, "upgrade_not_offered", "Upgrade not offered", detail))
    response.force_close()  # its body was not parsed as one: it must not be taken for more requests
    return response


async def add_request_id(request: web.Request, response: web.StreamResponse) -> None:
    """Add X-Request-Id to every response, and remove the Server header that aiohttp adds."""
    response.headers.popall(hdrs.SERVER, None)
    if REQUEST_ID in request:
        response.headers["X-Request-Id"] = request[REQUEST_ID]
