"""Whether the process runs, and whether it can serve: for load balancers, and for whoever looks. It decides nothing."""

from collections.abc import Callable, Mapping

import orjson
from aiohttp import web

from limiter.errors import LimiterError
from limiter.model import CORE
from limiter.relay.metered import RELAY

_PROBE = "readyz"  # an install id that no client can have: it is no UUID
Report = Callable[[], Mapping[str, object]]
REPORTS = web.AppKey("reports", dict[str, Report])


async def show_health(_request: web.Request) -> web.Response:
    """Tell that the process runs, whatever else does."""
    return _json(200, {"status": "ok"})


async def show_readiness(request: web.Request) -> web.Response:
    """Tell whether requests can be served: runs the balance script, as a decision would."""
    relay = request.app[RELAY]
    document: dict[str, object] = {
        "backends": {name: client.label for name, client in relay.backends.items()},
        "breakers": {name: client.breaker.state for name, client in relay.backends.items()},
    }
    document |= {name: dict(report()) for name, report in request.app[REPORTS].items()}
    try:
        await relay.mode.call(lambda: relay.limiter.balance(_PROBE, tier=CORE))
    except LimiterError as error:
        return _json(503, {"status": "not ready", "redis": str(error)} | document)
    return _json(200, {"status": "ready", "redis": "ok"} | document)


def _json(status: int, document: Mapping[str, object]) -> web.Response:
    return web.Response(status=status, body=orjson.dumps(document), content_type="application/json")
