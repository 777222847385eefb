"""Puts the relay together: routes, the middleware that answers every error, and what starts and stops with the app."""

import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

import orjson
from aiohttp import web

from limiter.credit_limiter import CreditLimiter
from limiter.errors import LimiterError
from limiter.licence import Licences
from limiter.model import CORE, Backend
from limiter.relay.answers import REQUEST_ID, ProblemRaised, problem_of, problem_response
from limiter.relay.backends import BackendClient
from limiter.relay.metered import RELAY, Relay, serve_metered, show_credits
from limiter.relay.settlement import Settlements

_LOG = logging.getLogger("limiter.relay")
_MIB = 1 << 20
_SERVER_ERROR = 500
_PROBE = "readyz"  # an install id that no client can have: it is no UUID
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Report = Callable[[], Mapping[str, object]]
_REPORTS = web.AppKey("reports", dict[str, Report])


def create_app(
    limiter: CreditLimiter,
    backends: Mapping[Backend, BackendClient],
    *,
    licences: Licences,
    costs: Mapping[str, int],
    body_limit_mb: int = 32,
    drain_s: float = 30,
    reports: Mapping[str, Report] | None = None,
) -> web.Application:
    """Make the application. The caller owns limiter and backends, and closes them after the app.

    reports: parts of `/readyz` by name. Run it with `handler_cancellation=True`: else no client is seen to leave.
    """
    app = web.Application(client_max_size=body_limit_mb * _MIB, middlewares=[_answer_errors])
    app[RELAY] = Relay(limiter, licences, backends, Settlements(limiter), costs)
    app[_REPORTS] = dict(reports or {})
    for method, path, handler in _ROUTES:
        app.router.add_route(method, path, handler)
    app.on_response_prepare.append(_add_request_id)

    async def settle_at_the_end(app: web.Application) -> AsyncIterator[None]:
        yield
        await app[RELAY].settlements.drain(drain_s)

    app.cleanup_ctx.append(settle_at_the_end)
    return app


@web.middleware
async def _answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    request[REQUEST_ID] = uuid.uuid4().hex
    try:
        return await handler(request)
    except ProblemRaised as raised:
        return problem_response(request, raised.problem, raised.headers)
    except (LimiterError, web.HTTPException) as error:
        problem = problem_of(error)
        if problem.status >= _SERVER_ERROR:
            _LOG.error("%s: %s", request[REQUEST_ID], error)
        headers = {"Allow": error.headers["Allow"]} if isinstance(error, web.HTTPMethodNotAllowed) else None
        return problem_response(request, problem, headers)
    except Exception as error:  # noqa: BLE001  the last resort: the client gets an answer, the log the traceback
        _LOG.exception("%s: unexpected", request[REQUEST_ID])
        return problem_response(request, problem_of(error))


async def _add_request_id(request: web.Request, response: web.StreamResponse) -> None:
    if REQUEST_ID in request:
        response.headers["X-Request-Id"] = request[REQUEST_ID]


async def _healthz(_request: web.Request) -> web.Response:
    """Tell that the process runs, whatever else does."""
    return _json(200, {"status": "ok"})


async def _readyz(request: web.Request) -> web.Response:
    """Tell whether requests can be served: runs the balance script, as a decision would."""
    relay = request.app[RELAY]
    document: dict[str, object] = {"backends": {name: client.label for name, client in relay.backends.items()}}
    document |= {name: dict(report()) for name, report in request.app[_REPORTS].items()}
    try:
        await relay.limiter.balance(_PROBE, tier=CORE)
    except LimiterError as error:
        return _json(503, {"status": "not ready", "redis": str(error)} | document)
    return _json(200, {"status": "ready", "redis": "ok"} | document)


def _json(status: int, document: Mapping[str, object]) -> web.Response:
    return web.Response(status=status, body=orjson.dumps(document), content_type="application/json")


def routes() -> list[tuple[str, str]]:
    """List what is served: method and path."""
    return [(method, path) for method, path, _ in _ROUTES]


_ROUTES: list[tuple[str, str, Handler]] = [
    ("POST", "/v1/chat/completions", serve_metered),
    ("POST", "/v1/embeddings", serve_metered),
    ("GET", "/v1/credits", show_credits),
    ("GET", "/healthz", _healthz),
    ("GET", "/readyz", _readyz),
]
