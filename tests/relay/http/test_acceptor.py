"""Limits on the connections of clients, and a system that has no file left for the next one."""

import asyncio
import json
import logging
import re
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from limiter.relay.telemetry.metrics import METRICS
from tests.support.openai_backend import Backend
from tests.support.relay import ONE_SERVER, RunningRelay, StartRelay, client_of
from tests.support.wait import eventually

pytestmark = ONE_SERVER
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: relay\r\nConnection: close\r\n\r\n"


@pytest.fixture
def clients() -> Iterator[ExitStack]:
    """Connections that clients keep open."""
    with ExitStack() as stack:
        yield stack


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def connect(relay: RunningRelay, clients: ExitStack, source: str = "127.0.0.1") -> socket.socket:
    client = clients.enter_context(socket.socket())
    client.setblocking(False)
    client.bind((source, 0))
    await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", relay.port))
    return client


async def answer(relay: RunningRelay, clients: ExitStack, source: str = "127.0.0.1") -> tuple[int, str]:
    """Ask on a connection of its own, and return the status and the code of an error."""
    loop = asyncio.get_running_loop()
    client = await connect(relay, clients, source)
    await loop.sock_sendall(client, HEALTH)
    received = b""
    while part := await asyncio.wait_for(loop.sock_recv(client, 65_536), 5):
        received += part
    client.close()
    head, _, body = received.partition(b"\r\n\r\n")
    assert re.search(rb"\r\nx-request-id: [0-9a-f]{32}", head, re.IGNORECASE)
    return int(head[9:12]), json.loads(body).get("error", {}).get("code", "")


async def test_connections_when_one_address_has_as_many_as_it_may_then_only_its_next_one_is_refused(
    start_relay: StartRelay, gemini: Backend, clients: ExitStack
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url), exempt_networks=[], max_connections_per_address=3)
    kept = [await connect(relay, clients) for _ in range(3)]
    await eventually(lambda: relay.runner.connections() == 3)
    assert await answer(relay, clients) == (429, "too_many_connections")
    assert await answer(relay, clients, "127.0.0.2") == (200, "")
    assert 'limiter_connections_refused_total{limit="address"} 1.0' in relay.app[METRICS].render().decode()
    kept.pop().close()

    async def is_served() -> bool:
        return await answer(relay, clients) == (200, "")

    await eventually(is_served)


async def test_connections_when_one_address_asks_for_all_then_it_gets_half(
    start_relay: StartRelay, gemini: Backend, clients: ExitStack
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url), exempt_networks=[], max_connections=8)
    for _ in range(20):
        await connect(relay, clients)
    await eventually(lambda: relay.runner.connections() == 4)
    assert await answer(relay, clients, "127.0.0.2") == (200, "")


@pytest.mark.parametrize(
    "settings",
    [
        {"exempt_networks": ["127.0.0.0/8"]},
        {"exempt_networks": [], "trusted_proxies": ["127.0.0.1"]},
        {"exempt_networks": [], "max_connections_per_address": 0},
        {},
    ],
    ids=["exempt", "proxy", "unlimited", "loopback"],
)
async def test_connections_when_their_address_stands_for_many_clients_then_only_the_overall_limit_applies(
    start_relay: StartRelay, gemini: Backend, clients: ExitStack, settings: dict[str, object]
) -> None:
    limits = {"max_connections_per_address": 2, "max_connections": 6, **settings}
    relay = await start_relay(client_of("gemini", gemini.url), **limits)
    for _ in range(5):
        await connect(relay, clients)
    await eventually(lambda: relay.runner.connections() == 5)
    assert await answer(relay, clients) == (200, "")
    await connect(relay, clients)
    assert await answer(relay, clients) == (503, "relay_busy")


async def test_connections_when_many_are_refused_then_they_take_no_more_files_than_are_set_apart(
    start_relay: StartRelay, gemini: Backend, clients: ExitStack
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url), max_connections=1)
    before = open_files()
    for _ in range(200):
        await connect(relay, clients)
    await eventually(lambda: 'limit="all"} 199.0' in relay.app[METRICS].render().decode())
    ours = open_files() - before - 200
    assert ours <= 1 + 32


async def test_files_when_there_are_none_left_then_connections_wait_and_are_served_later(
    start_relay: StartRelay, gemini: Backend, clients: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    relay = await start_relay(client_of("gemini", gemini.url))
    loop = asyncio.get_running_loop()
    client = clients.enter_context(socket.socket())
    client.setblocking(False)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        await loop.sock_connect(client, ("127.0.0.1", relay.port))
        await loop.sock_sendall(client, HEALTH)
        await eventually(lambda: "Too many open files" in caplog.text)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert (await asyncio.wait_for(loop.sock_recv(client, 65_536), 5)).startswith(b"HTTP/1.1 200 ")
    assert [record.__dict__["event"] for record in caplog.records] == ["accept_failed"]
