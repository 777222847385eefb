"""From settings to a connected limiter: what the relay and the commands have in common."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from limiter.config.settings import Settings
from limiter.credits.limiter import CreditLimiter
from limiter.redis.connect import connect


@asynccontextmanager
async def open_limiter(settings: Settings) -> AsyncIterator[CreditLimiter]:
    """Connect, and close at the end."""
    redis = await connect(
        settings.redis.url, timeout_ms=settings.redis.timeout_ms, allow_eviction=settings.redis.allow_eviction
    )
    try:
        yield CreditLimiter(
            redis,
            settings.limits(),
            prefix=settings.redis.prefix,
            hold_ms=settings.relay.hold_s * 1000,
            timeout_ms=settings.redis.timeout_ms,
            deadline_ms=3 * settings.redis.timeout_ms,
            deny_cache_ms=settings.redis.deny_cache_ms,
        )
    finally:
        await redis.aclose()
