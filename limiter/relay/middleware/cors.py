"""CORS, for the origins that the operator configures. Without any, no response has a CORS header."""

import re
from collections.abc import Sequence

from aiohttp import hdrs, web

from limiter.relay.http.problems import REQUEST_ID

_ORIGINS = web.AppKey("cors_origins", frozenset[str])
_NAMES = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+(?:\s*,\s*[A-Za-z0-9!#$%&'*+.^_`|~-]+)*")
_MAX_NAMES_LENGTH = 2048
_MAX_AGE_S = "600"
_EXPOSED = (
    "Idempotency-Replayed, RateLimit, RateLimit-Policy, Retry-After, X-Credits-Backend, X-Credits-Unmetered, "
    "X-Licence, X-Request-Id, x-should-retry"
)


def add_cors(app: web.Application, origins: Sequence[str]) -> None:
    """Allow pages of these exact origins to call the app and read its headers. Cookies are never allowed."""
    if origins:
        app[_ORIGINS] = frozenset(origins)
        app.on_response_prepare.append(_add_headers)


def preflight(request: web.Request) -> web.Response | None:
    """Return the response to a preflight request of an allowed origin for a served path; None for other requests."""
    if request.method != hdrs.METH_OPTIONS or not _allowed(request):
        return None
    unserved = request.match_info.http_exception
    if hdrs.ACCESS_CONTROL_REQUEST_METHOD not in request.headers or not isinstance(unserved, web.HTTPMethodNotAllowed):
        return None
    headers = {
        hdrs.ACCESS_CONTROL_ALLOW_METHODS: ", ".join(sorted(unserved.allowed_methods)),
        hdrs.ACCESS_CONTROL_MAX_AGE: _MAX_AGE_S,
        hdrs.VARY: f"{hdrs.ACCESS_CONTROL_REQUEST_HEADERS}, {hdrs.ACCESS_CONTROL_REQUEST_METHOD}",
    }
    requested = request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_HEADERS, "")
    if len(requested) <= _MAX_NAMES_LENGTH and _NAMES.fullmatch(requested):
        headers[hdrs.ACCESS_CONTROL_ALLOW_HEADERS] = requested  # the backend client decides which are forwarded
    return web.Response(status=204, headers=headers)


def _allowed(request: web.Request) -> bool:
    return _ORIGINS in request.app and request.headers.get(hdrs.ORIGIN, "") in request.app[_ORIGINS]


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.add(hdrs.VARY, hdrs.ORIGIN)
    if REQUEST_ID in request and _allowed(request):
        response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = request.headers[hdrs.ORIGIN]
        response.headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = _EXPOSED
