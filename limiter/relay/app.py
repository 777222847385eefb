"""Puts the relay together: routes, the middleware that answers every error, and what starts and stops with the app."""

import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import partial

import orjson
from aiohttp import HttpVersion10, hdrs, web

from limiter.credit_limiter import CreditLimiter
from limiter.errors import LimiterError
from limiter.licence import Licences
from limiter.logs import short_names, shorten_malformed
from limiter.model import CORE, Backend
from limiter.relay.admission import Admission, trusted_networks
from limiter.relay.answers import REQUEST_ID, Problem, ProblemRaised, fail, problem_of, problem_response
from limiter.relay.backends import BackendClient
from limiter.relay.cors import allow_origins, preflight
from limiter.relay.idempotency import Idempotency
from limiter.relay.metered import RELAY, Relay, serve_metered, serve_upload, show_credits
from limiter.relay.metrics import BreakerState, Metrics, show_metrics
from limiter.relay.models import MODELS, Models, show_models
from limiter.relay.observing import observe
from limiter.relay.openapi import show_openapi
from limiter.relay.redis_mode import RedisMode
from limiter.relay.settlement import Settlements
from limiter.relay.stores import Stores
from limiter.relay.uploads import UploadLimits, expect_later

_LOG = logging.getLogger("limiter.relay")
_MIB = 1 << 20
_KIB = 1 << 10
_LINGER_S = 2.0  # how long what a refused client still sends is read away, so that it sees its answer
_WORTH_READING = 64 * _KIB
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
    upload_limit_mb: int = 128,
    replay_limit_kb: int = 1024,
    upload_s: float = 300,
    cors_origins: Sequence[str] = (),
    mint_per_ip: int = 20,
    mint_overall: int = 10_000,
    trusted_proxies: Sequence[str] = (),
    keep_s: int = 86_400,
    answer_limit_kb: int = 1024,
    retry_window_s: int = 60,
    timeout_ms: int = 1000,
    drain_s: float = 30,
    log_key: str = "",
    reports: Mapping[str, Report] | None = None,
) -> web.Application:
    """Make the application. The caller owns limiter and backends, and closes them after the app.

    reports: parts of `/readyz` by name. Run it with `runner_of`.
    """
    app = web.Application(client_max_size=body_limit_mb * _MIB, middlewares=[_answer_errors])
    uploads = UploadLimits(upload_limit_mb * _MIB, replay_limit_kb * _KIB, upload_s)
    metrics = Metrics(tiers=limiter.tiers, routes=[path for _, path, _ in _ROUTES])
    mode = RedisMode(limiter, timed=metrics.decision_took)
    stores = Stores(limiter, timeout_ms=timeout_ms, call=mode.call)
    settlements = Settlements(limiter, mode, metrics)
    admission = Admission(
        stores,
        mint_per_ip=mint_per_ip,
        mint_overall=mint_overall,
        trusted_proxies=trusted_networks(trusted_proxies),
    )
    idempotency = Idempotency(
        stores,
        settlements.start,
        keep_s=keep_s,
        keep_bytes=answer_limit_kb * _KIB,
        retry_window_s=retry_window_s,
    )
    app[RELAY] = Relay(limiter, licences, backends, settlements, costs, uploads, admission, idempotency, mode)
    app[MODELS] = Models(backends)
    app[_REPORTS] = {"redis_mode": mode.report, **(reports or {})}
    for method, path, handler in _ROUTES:
        expect = expect_later if handler is serve_upload else None
        app.router.add_route(method, path, handler, expect_handler=expect)
    app.on_response_prepare.append(_add_request_id)
    allow_origins(app, cors_origins)
    observe(app, metrics, short_names(log_key))
    metrics.watch_redis(lambda: mode.state == "ok")
    metrics.watch_settlements(settlements.under_way)
    for name, client in backends.items():
        metrics.watch_breaker(name, partial(_breaker_state, client))

    async def watch_redis(_app: web.Application) -> AsyncIterator[None]:
        async with mode:
            yield

    app.cleanup_ctx.append(watch_redis)  # before the other: it ends after it

    async def settle_at_the_end(app: web.Application) -> AsyncIterator[None]:
        yield
        await app[RELAY].settlements.drain(drain_s)

    app.cleanup_ctx.append(settle_at_the_end)
    return app


def runner_of(app: web.Application, *, shutdown_s: float) -> web.AppRunner:
    """Make the runner of an app. It sees clients leave, and keeps malformed requests out of the log."""
    return web.AppRunner(
        app,
        handler_cancellation=True,
        auto_decompress=False,  # 30 KB could unpack to 30 MB, before anybody was asked who they are
        access_log=None,
        logger=_server_log(),
        lingering_time=_LINGER_S,
        shutdown_timeout=shutdown_s,
    )


def _server_log() -> logging.Logger:
    """Give aiohttp a log that drops its traceback of each request that is no HTTP: anybody sends such."""
    log = logging.getLogger("limiter.relay.http")
    if not log.filters:
        log.addFilter(shorten_malformed)
    return log


def _breaker_state(client: BackendClient) -> BreakerState:
    return client.breaker.state


@web.middleware
async def _answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    request[REQUEST_ID] = uuid.uuid4().hex
    try:
        if request.version < HttpVersion10:
            fail(400, "unsupported_http_version", "Unsupported HTTP version", "This relay speaks HTTP/1.0 and 1.1.")
        if request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower() != "identity":
            fail(415, "packed_body", "Packed body", "Send the body as it is, without a Content-Encoding.")
        if _wants_upgrade(request):
            return _refuse_upgrade(request)
        return preflight(request) or await handler(request)
    except ProblemRaised as raised:
        return _answer(request, raised.problem, raised.headers)
    except (LimiterError, web.HTTPException) as error:
        problem = problem_of(error)
        if problem.status >= _SERVER_ERROR:
            _LOG.error("%s: %s", request[REQUEST_ID], error)
        headers = {"Allow": error.headers["Allow"]} if isinstance(error, web.HTTPMethodNotAllowed) else None
        return _answer(request, problem, headers)
    except Exception as error:  # noqa: BLE001  the last resort: the client gets an answer, the log the traceback
        _LOG.exception("%s: unexpected", request[REQUEST_ID])
        return _answer(request, problem_of(error))


def _answer(request: web.Request, problem: Problem, headers: Mapping[str, str] | None = None) -> web.Response:
    response = problem_response(request, problem, headers)
    length = request.content_length
    if not request.content.at_eof() and (length is None or length > _WORTH_READING):
        response.force_close()  # the connection would have to carry all the rest before the next request
    return response


def _wants_upgrade(request: web.Request) -> bool:
    """Tell whether another protocol is asked for. h2c does not count: some clients offer it with each first request."""
    tokens = [token.strip().lower() for token in request.headers.get(hdrs.CONNECTION, "").split(",")]
    return "upgrade" in tokens and request.headers.get(hdrs.UPGRADE, "").strip().lower() not in ("", "h2c")


def _refuse_upgrade(request: web.Request) -> web.Response:
    detail = "This relay speaks HTTP/1.1 and upgrades to nothing."
    response = problem_response(request, Problem(400, "upgrade_not_offered", "Upgrade not offered", detail))
    response.force_close()  # its body was not read as one: whatever it holds is not to be taken for requests
    return response


async def _add_request_id(request: web.Request, response: web.StreamResponse) -> None:
    if REQUEST_ID in request:
        response.headers["X-Request-Id"] = request[REQUEST_ID]


async def _healthz(_request: web.Request) -> web.Response:
    """Tell that the process runs, whatever else does."""
    return _json(200, {"status": "ok"})


async def _readyz(request: web.Request) -> web.Response:
    """Tell whether requests can be served: runs the balance script, as a decision would."""
    relay = request.app[RELAY]
    document: dict[str, object] = {
        "backends": {name: client.label for name, client in relay.backends.items()},
        "breakers": {name: client.breaker.state for name, client in relay.backends.items()},
    }
    document |= {name: dict(report()) for name, report in request.app[_REPORTS].items()}
    try:
        await relay.mode.call(lambda: relay.limiter.balance(_PROBE, tier=CORE))
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
    ("POST", "/v1/completions", serve_metered),
    ("POST", "/v1/embeddings", serve_metered),
    ("POST", "/v1/responses", serve_metered),
    ("POST", "/v1/audio/transcriptions", serve_upload),
    ("GET", "/v1/models", show_models),
    ("GET", "/v1/credits", show_credits),
    ("GET", "/healthz", _healthz),
    ("GET", "/readyz", _readyz),
    ("GET", "/metrics", show_metrics),
    ("GET", "/openapi.json", show_openapi),
]
