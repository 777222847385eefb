"""The least that a metering relay of our own parts can be, as a process: server, transport, two decisions.

    python -m benchmarks.metered_passthrough BACKEND_URL REDIS_URL

It prints its port. It reserves, forwards a whole answer and commits, and does nothing else that the relay does: no
identity but a header, no bounds, fallback or circuit breaker, no log, no metrics. It serves no streams.
"""

import asyncio
import sys

import uvloop
from aiohttp import web
from yarl import URL

from benchmarks.aiohttp_passthrough import serve
from limiter import CreditLimiter, Tiers, connect
from limiter.credits.models import Settlement
from limiter.relay.upstream.transport import HttpTransport


async def main(backend: str, redis_url: str) -> None:
    """Serve until the process is ended."""
    tiers = Tiers.from_mapping({"core": {"lifetime": 10**9, "gemini_cap": 10**9, "max_in_flight": 100_000}})
    redis = await connect(redis_url)
    limiter = CreditLimiter(redis, tiers)
    transport = HttpTransport(URL(f"{backend}/v1/"), connect_s=10)

    async def pass_on(request: web.Request) -> web.Response:
        install_id = request.headers["X-Install-Id"]
        body = await request.read()
        decision = await limiter.reserve(install_id, tier="core", has_hardware=False)
        exchange = await transport.request(
            "POST", "chat/completions", {"Content-Type": "application/json"}, body, within_s=30
        )
        answer = await exchange.read()
        exchange.release()
        committing = asyncio.create_task(limiter.commit(install_id, decision.hold_id, backend="gemini"))
        under_way.add(committing)
        committing.add_done_callback(under_way.discard)
        return web.Response(status=exchange.status, body=answer, content_type="application/json")

    under_way: set[asyncio.Task[Settlement]] = set()
    await serve(pass_on)


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], sys.argv[2]))
