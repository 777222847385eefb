"""Fixtures for the relay's tests: real backends and real relays on ports. Afterwards nothing may be left held.

The conftest.py of each folder that uses them imports them.
"""

from collections.abc import AsyncIterator, Iterator

import pytest
from redis.asyncio import Redis

from tests.support.openai_backend import Backend, running_backend
from tests.support.openai_sdks import Sdk, sdk_of
from tests.support.relay import RunningRelay, StartRelay, client_of, relays_on


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
