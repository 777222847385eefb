"""The balance of the client's install."""

from aiohttp import hdrs, web

from limiter.relay.handlers.context import RELAY
from limiter.relay.http.json_response import json_response
from limiter.relay.http.ratelimit_headers import ratelimit_headers


async def show_credits(request: web.Request) -> web.Response:
    """Serve the balance of the client's install."""
    relay = request.app[RELAY]
    identity = relay.identify(request)
    balance = await relay.limiter.balance(identity.install_id, tier=identity.tier)
    document = {
        "object": "credits",
        "install_id": identity.install_id,
        "tier": balance.tier,
        "capped": balance.capped,
        "quota": balance.quota,
        "remaining": balance.remaining,
        "gemini_cap": balance.gemini_cap,
        "gemini_remaining": balance.gemini_remaining,
        "held": balance.held,
        "renews_at": balance.renews_at,
    }
    headers = {**ratelimit_headers(balance), **identity.headers(), hdrs.CACHE_CONTROL: "no-store"}
    return json_response(document, headers=headers)
