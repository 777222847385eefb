"""Liveness and readiness, for load balancers and operators. They decide nothing."""

from collections.abc import Callable, Mapping, Sequence

from aiohttp import web

from limiter.credits.models import CORE
from limiter.errors import LimiterError
from limiter.relay.handlers.context import RELAY
from limiter.relay.http.client_address import Network, is_within
from limiter.relay.http.json_response import json_response
from limiter.relay.telemetry.metrics import show_metrics

_PROBE = "readyz"  # an install id that no client can have, as it is not a UUID
Report = Callable[[], Mapping[str, object]]
REPORTS = web.AppKey("reports", dict[str, Report])
INSIDE_NETWORKS: web.AppKey[Sequence[Network]] = web.AppKey("inside_networks")


async def show_health(_request: web.Request) -> web.Response:
    """Respond that the process runs, whatever the state of Redis and the backends."""
    return json_response({"status": "ok"})


def is_inside(request: web.Request) -> bool:
    """Return whether a request comes from one of the operator's networks."""
    return is_within(request.app[RELAY].addresses.of(request), request.app[INSIDE_NETWORKS])


async def show_metrics_inside(request: web.Request) -> web.Response:
    """Serve the metrics to the operator's networks; for others the path is unknown."""
    if not is_inside(request):
        raise web.HTTPNotFound
    return await show_metrics(request)


async def show_readiness(request: web.Request) -> web.Response:
    """Respond whether requests can be served for credits, which is checked by a call of the balance script.

    With `?unmetered=1` it is enough that hardware serves requests unmetered while Redis is unavailable. Only the
    operator's networks see more than the status.
    """
    relay = request.app[RELAY]
    document: dict[str, object] = {
        "backends": {name: client.label for name, client in relay.backends.items()},
        "breakers": {name: client.breaker.state for name, client in relay.backends.items()},
    }
    status, readiness = 200, {"status": "ready", "redis": "ok"}
    try:
        await relay.limiter.balance(_PROBE, tier=CORE)
        if relay.availability.state == "out_of_memory":
            status, readiness = 503, {"status": "not ready", "redis": "out of memory"}
    except LimiterError as error:
        unmetered = relay.availability.serves_unmetered and relay.backends["hardware"].breaker.state != "open"
        status = 200 if unmetered and request.query.get("unmetered") == "1" else 503
        readiness = {"status": "unmetered" if unmetered else "not ready", "redis": str(error)}
    if not is_inside(request):
        return json_response({"status": readiness["status"]}, status=status)
    reports = {name: dict(report()) for name, report in request.app[REPORTS].items()}
    return json_response(readiness | document | reports, status=status)
