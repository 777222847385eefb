"""Fixtures for the relay's tests: real backends and real relays on ports. Afterwards nothing may be left held.

A test module takes them with `pytest_plugins = ["tests.relay_fixtures"]`.
"""

from collections.abc import AsyncIterator, Iterator

import pytest
from redis.asyncio import Redis

from tests.backend import Backend, running_backend
from tests.relaying import RunningRelay, StartRelay, client_of, relays_on
from tests.sdk_clients import Sdk, sdk_of


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
    async with relays_on(redis) as start:
        yield start


@pytest.fixture
async def relay(start_relay: StartRelay, gemini: Backend, hardware: Backend) -> RunningRelay:
    """A relay with both backends; each gets the model's name as the client gave it."""
    return await start_relay(client_of("gemini", gemini.url), client_of("hardware", hardware.url))


@pytest.fixture(scope="module", params=["python", "javascript"])
def sdk(request: pytest.FixtureRequest) -> Iterator[Sdk]:
    """Each of OpenAI's SDKs, the second where Node and its package are installed."""
    with sdk_of(request.param) as sdk:
        yield sdk
