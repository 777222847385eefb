"""Fixtures for the relay's tests: real backends and real relays on ports. Afterwards nothing may be left held.

A test module takes them with `pytest_plugins = ["tests.relay_fixtures"]`.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from redis.asyncio import Redis

from limiter import CreditLimiter, Tiers
from limiter.licence import Licences
from limiter.relay import create_app
from limiter.relay.backends import BackendClient
from tests.backend import Backend, running_backend
from tests.relaying import RELAY_TIERS, RunningRelay, StartRelay, client_of


@pytest.fixture
async def gemini() -> AsyncIterator[Backend]:
    async with running_backend() as backend:
        yield backend


@pytest.fixture
async def hardware() -> AsyncIterator[Backend]:
    async with running_backend() as backend:
        yield backend


@pytest.fixture
async def start_relay(redis: Redis) -> AsyncIterator[StartRelay]:
    """Start relays. Afterwards, when all are drained, no row may hold anything."""
    async with AsyncExitStack() as stack:

        async def start(
            *clients: BackendClient,
            on: CreditLimiter | None = None,
            tiers: Tiers = RELAY_TIERS,
            public_keys: Sequence[str] = (),
            costs: Mapping[str, int] | None = None,
            **options: Any,
        ) -> RunningRelay:
            for client in clients:
                stack.push_async_callback(client.aclose)
            limiter = on or CreditLimiter(redis, tiers)
            app = create_app(
                limiter,
                {client.name: client for client in clients},
                licences=Licences(public_keys),
                costs={"default": 1, **(costs or {})},
                **options,
            )
            runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=5)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            connector = aiohttp.TCPConnector(limit=0)
            session = aiohttp.ClientSession(
                connector=connector, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()
            )
            stack.push_async_callback(session.close)
            return RunningRelay(f"http://127.0.0.1:{runner.addresses[0][1]}", limiter, app, runner, session)

        yield start
    for key in await redis.keys("*:install:*"):
        held = [name for name in await redis.hkeys(key) if "hold:" in str(name)]
        assert not held, f"{key!r} was left with {held}"


@pytest.fixture
async def relay(start_relay: StartRelay, gemini: Backend, hardware: Backend) -> RunningRelay:
    """A relay with both backends; each gets the model's name as the client gave it."""
    return await start_relay(client_of("gemini", gemini.url), client_of("hardware", hardware.url))
