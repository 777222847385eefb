"""From settings to a connected limiter or session: what the relay and the commands have in common."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from limiter.config.settings import Settings
from limiter.credits.limiter import CreditLimiter
from limiter.credits.session import Session
from limiter.redis.connect import connect

_ATTEMPTS_IN_A_DEADLINE = 3


@asynccontextmanager
async def open_limiter(settings: Settings) -> AsyncIterator[CreditLimiter]:
    """Connect a limiter, and close the connection at the end. Raises SettingsError, LimiterUnavailable."""
    redis = await connect(
        settings.redis.url,
        timeout_ms=settings.redis.timeout_ms,
        allow_eviction=settings.redis.allow_eviction,
        embedded_maxmemory_mb=settings.redis.embedded_maxmemory_mb,
    )
    try:
        yield CreditLimiter(
            redis,
            settings.limits(),
            prefix=settings.redis.prefix,
            hold_ms=settings.relay.hold_s * 1000,
            timeout_ms=settings.redis.timeout_ms,
            deadline_ms=_ATTEMPTS_IN_A_DEADLINE * settings.redis.timeout_ms,
            deny_cache_ms=settings.redis.deny_cache_ms,
            enforces_bounds=settings.relay.bounds == "enforce",
        )
    finally:
        await redis.aclose()


@asynccontextmanager
async def open_session(settings: Settings) -> AsyncIterator[Session]:
    """Connect a session, for commands that reserve nothing. Raises as `open_limiter`."""
    async with open_limiter(settings) as limiter:
        yield limiter.session
