"""Assembles the relay: its routes, and what starts and stops with the app."""

import logging
from collections.abc import AsyncIterator, Mapping
from functools import partial

from aiohttp import web

from limiter._util.open_files import clients_within, open_files
from limiter.config.settings import RelaySettings, Settings
from limiter.credits.limiter import CreditLimiter
from limiter.credits.models import Backend
from limiter.licences.revocations import RevokedNames
from limiter.licences.seats import Seats
from limiter.licences.tokens import Licences
from limiter.log_config import short_names
from limiter.relay.handlers.context import RELAY, Relay
from limiter.relay.handlers.credits import show_credits
from limiter.relay.handlers.health import (
    INSIDE_NETWORKS,
    REPORTS,
    Report,
    show_health,
    show_metrics_inside,
    show_readiness,
)
from limiter.relay.handlers.metered import serve_json, serve_upload
from limiter.relay.handlers.models import MODELS, Models, show_model, show_models
from limiter.relay.handlers.openapi import show_openapi
from limiter.relay.http.acceptor import ConnectionLimits
from limiter.relay.http.client_address import ClientAddresses, parse_networks
from limiter.relay.http.connection import RelayRunner, close_after_unframed, close_without_body, expect_later
from limiter.relay.http.handler import Handler
from limiter.relay.metering.address_rate_limit import AddressRateLimit
from limiter.relay.metering.admission import Admission
from limiter.relay.metering.availability import RedisAvailability, WatchedLimiter
from limiter.relay.metering.background_retries import BackgroundRetries
from limiter.relay.metering.claims import Claims
from limiter.relay.metering.idempotency import Idempotency
from limiter.relay.metering.install_rate_limit import InstallRateLimit
from limiter.relay.metering.settlement import Settlements
from limiter.relay.middleware.access_log import add_access_log
from limiter.relay.middleware.cors import add_cors
from limiter.relay.middleware.errors import ADDRESS_RATE_LIMIT, add_request_id, error_middleware
from limiter.relay.requests.body_reader import BodyPace
from limiter.relay.requests.bounds import Bounds, TierBounds
from limiter.relay.requests.memory_budget import MemoryBudget
from limiter.relay.requests.places import Places
from limiter.relay.requests.upload import UploadLimits
from limiter.relay.telemetry.metrics import METRICS, Metrics
from limiter.relay.telemetry.over_bounds import OverBounds
from limiter.relay.upstream.client import BackendClient

_MIB = 1 << 20
_KIB = 1 << 10
_LINGER_S = 2.0  # how long to drain what a refused client still sends, so that it sees its answer


def create_app(
    limiter: CreditLimiter,
    backends: Mapping[Backend, BackendClient],
    settings: Settings,
    reports: Mapping[str, Report] | None = None,
) -> web.Application:
    """Create the application. Run it with `make_runner`.

    Args:
        limiter: the caller owns it, and closes it after the app.
        backends: the same holds for them.
        settings: those that limiter and backends were made from are not read again.
        reports: more members of `/readyz` by name.
    """
    app = web.Application(client_max_size=settings.relay.body_limit_mb * _MIB, middlewares=[error_middleware])
    metrics = Metrics(tiers=limiter.tiers, routes=[path for _, path, _ in _ROUTES])
    availability = RedisAvailability(limiter, on_redis_down=settings.redis.on_redis_down, timed=metrics.decision_took)
    revoked = RevokedNames(limiter.session)
    app[RELAY] = relay = _relay(limiter, backends, settings, availability, metrics, revoked=revoked)
    limits = settings.relay
    app[INSIDE_NETWORKS] = parse_networks("relay.inside_networks", limits.inside_networks)
    app[ADDRESS_RATE_LIMIT] = AddressRateLimit(
        limits.rate_per_min_per_address, addresses=relay.addresses, on_limited=metrics.address_limited
    )
    app[MODELS] = Models(backends)
    app[REPORTS] = {"redis_mode": availability.report, **(reports or {})}
    for method, path, handler in _ROUTES:
        for served in (method, "HEAD") if method == "GET" else (method,):
            # The id of a model may contain slashes.
            app.router.add_route(served, path.replace("}", ":.+}"), handler, expect_handler=expect_later)
    app.on_response_prepare.extend([add_request_id, close_after_unframed, close_without_body])
    add_cors(app, settings.relay.cors_origins)
    add_access_log(app, metrics, short_names(settings.logs.key.get_secret_value()))
    metrics.watch_redis(lambda: availability.state)
    metrics.watch_settlements(relay.retries.under_way)
    metrics.watch_memory(lambda: relay.memory.held_b)
    for name, client in backends.items():
        client.watch(partial(metrics.backend_called, name))
        metrics.watch_breaker(name, partial(getattr, client.breaker, "state"))
        metrics.watch_connections(name, partial(getattr, client, "connections"))

    async def watch_redis(_app: web.Application) -> AsyncIterator[None]:
        async with availability:
            yield

    async def renew_streams(_app: web.Application) -> AsyncIterator[None]:
        async with relay.settlements.renewing():
            yield

    async def end_no_leaves(_app: web.Application) -> None:
        relay.settlements.stops = True  # what is cancelled from now on was not left by its client

    async def drain_settlements(_app: web.Application) -> AsyncIterator[None]:
        yield
        await relay.retries.drain(settings.relay.drain_s)

    async def watch_revoked(_app: web.Application) -> AsyncIterator[None]:
        async with revoked:
            yield

    if settings.licence.public_keys:  # without keys no licence is valid
        app.cleanup_ctx.append(watch_revoked)
    app.on_shutdown.append(end_no_leaves)
    app.cleanup_ctx.extend([watch_redis, drain_settlements, renew_streams])  # they end in reverse order
    return app


def _relay(
    limiter: CreditLimiter,
    backends: Mapping[Backend, BackendClient],
    settings: Settings,
    availability: RedisAvailability,
    metrics: Metrics,
    *,
    revoked: RevokedNames,
) -> Relay:
    limits, idempotency = settings.relay, settings.idempotency
    watched = WatchedLimiter(limiter, availability)
    over_bounds = OverBounds(metrics, enforces=limits.bounds == "enforce")
    addresses = ClientAddresses(
        parse_networks("relay.trusted_proxies", limits.trusted_proxies),
        parse_networks("relay.exempt_networks", limits.exempt_networks),
    )
    retries = BackgroundRetries(availability, give_up_s=limiter.hold_ms / 1000)
    return Relay(
        tiers=limiter.tiers,
        limiter=watched,
        availability=availability,
        licences=Licences(settings.licence.public_keys, revoked),
        backends=backends,
        costs=settings.costs,
        bounds=_bounds(settings, over_bounds),
        uploads=UploadLimits(limits.upload_limit_mb * _MIB, limits.replay_limit_kb * _KIB, _pace(limits)),
        memory=MemoryBudget(limits.bodies_in_memory_mb * _MIB, partial(metrics.share_used_up, "memory")),
        places=Places(_clients(limits), partial(metrics.share_used_up, "requests")),
        addresses=addresses,
        admission=Admission(
            watched,
            Seats(watched.session),
            InstallRateLimit(
                watched.session,
                per_ip=limits.mint_per_ip,
                per_ipv4_24=limits.mint_per_ipv4_24,
                per_ipv6_48=limits.mint_per_ipv6_48,
                per_ipv6_32=limits.mint_per_ipv6_32,
                overall=limits.mint_overall,
            ),
            trusted_proxies=addresses.trusted_proxies,
        ),
        idempotency=Idempotency(
            Claims(watched.session),
            retries,
            hold_ms=limiter.hold_ms,
            keep_s=idempotency.keep_s,
            keep_bytes=idempotency.answer_limit_kb * _KIB,
            retry_window_s=idempotency.retry_window_s,
            keep_per_install_b=idempotency.keep_mb_per_install * _MIB,
            keep_in_all_b=idempotency.keep_mb * _MIB,
            counted=metrics.recorded,
        ),
        retries=retries,
        settlements=Settlements(limiter, retries, metrics, over_bounds),
        over_bounds=over_bounds,
    )


def _bounds(settings: Settings, over_bounds: OverBounds) -> Bounds:
    tiers = {
        name: TierBounds(each.max_n, each.max_inputs, each.max_output_tokens) for name, each in settings.tiers.items()
    }
    models = settings.models if settings.relay.models == "listed" else None
    return Bounds(tiers, models, over_bounds)


def _clients(limits: RelaySettings) -> int:
    """Return how many clients there may be at a time; 0 for any number."""
    return limits.max_connections or clients_within(open_files())


def _pace(limits: RelaySettings) -> BodyPace:
    return BodyPace(limits.upload_s, limits.body_idle_s, limits.body_min_rate_kb * _KIB)


def make_runner(app: web.Application, limits: RelaySettings) -> RelayRunner:
    """Return the runner of an app. A request is cancelled when its client disconnects."""
    exempt = ("relay.exempt_networks", limits.exempt_networks), ("relay.trusted_proxies", limits.trusted_proxies)
    runner = RelayRunner(
        app,
        handler_cancellation=True,
        auto_decompress=False,  # 30 KB could unpack to 30 MB, before the client has been identified
        access_log=None,
        logger=logging.getLogger("limiter.relay.http"),
        lingering_time=_LINGER_S,
        keepalive_timeout=limits.keepalive_s,
        head_s=limits.head_s,
        write_idle_s=limits.write_idle_s,
        limits=ConnectionLimits(
            overall=_clients(limits),
            per_address=limits.max_connections_per_address,
            # Behind a trusted proxy are many clients, which it tells apart only in their requests.
            exempt=[network for setting, texts in exempt for network in parse_networks(setting, texts)],
        ),
        refused=app[METRICS].connection_refused,
        shutdown_timeout=limits.drain_s,
    )
    app[METRICS].watch_clients(runner.connections)
    return runner


def routes() -> list[tuple[str, str]]:
    """Return the routes that are served: method and path."""
    return [(method, path) for method, path, _ in _ROUTES]


_ROUTES: list[tuple[str, str, Handler]] = [
    ("POST", "/v1/chat/completions", serve_json),
    ("POST", "/v1/completions", serve_json),
    ("POST", "/v1/embeddings", serve_json),
    ("POST", "/v1/responses", serve_json),
    ("POST", "/v1/audio/transcriptions", serve_upload),
    ("GET", "/v1/models", show_models),
    ("GET", "/v1/models/{id}", show_model),
    ("GET", "/v1/credits", show_credits),
    ("GET", "/healthz", show_health),
    ("GET", "/readyz", show_readiness),
    ("GET", "/metrics", show_metrics_inside),
    ("GET", "/openapi.json", show_openapi),
]
