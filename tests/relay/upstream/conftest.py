"""The way to the backends is tested on both loops: production runs on uvloop, the other tests on asyncio's."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from typing import Any

import pytest
import uvloop
from yarl import URL

from limiter.relay.upstream.transport import HttpTransport

MakeTransport = Callable[..., HttpTransport]


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture
async def transport_to() -> AsyncIterator[MakeTransport]:
    """Make transports to a port, which must have forgotten everything by their end."""
    made: list[HttpTransport] = []

    def make(port: int, host: str = "127.0.0.1", *, scheme: str = "http", **options: Any) -> HttpTransport:
        base = URL.build(scheme=scheme, host=host, port=port, path="/v1/")
        transport = HttpTransport(base, **{"connect_s": 5, "shortest_s": 0.1, **options})
        made.append(transport)
        return transport

    yield make
    for transport in made:
        with suppress(TimeoutError):
            async with asyncio.timeout(3):
                while any(not each.is_over for each in transport._exchanges):
                    await asyncio.sleep(0.01)
        assert not [each for each in transport._exchanges if not each.is_over], "an exchange was never ended"
        assert set(transport._idle) == transport._open, "a connection is in no exchange, and not idle"
        assert transport._making == 0
        if transport._slots is not None:
            assert transport._slots.taken == 0
            assert transport._takers == {}
        await transport.aclose()
        assert not transport._open
        assert not transport._idle
