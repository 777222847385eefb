"""One client takes all that it can get, of memory, places and connections; an honest one beside it is served."""

import asyncio
import json
import socket
from contextlib import AsyncExitStack, suppress

import pytest

from limiter.relay.handlers.context import RELAY
from tests.support.openai_backend import Backend
from tests.support.relay import CHAT, ONE_SERVER, RunningRelay, StartRelay, client_of, new_install
from tests.support.wait import eventually

pytestmark = ONE_SERVER
MIB = 1 << 20
ATTACKER, HONEST = "203.0.113.9", "198.51.100.7"
BEHIND_A_PROXY = {"trusted_proxies": ["127.0.0.1"], "exempt_networks": []}


def memory_of(relay: RunningRelay) -> int:
    return relay.app[RELAY].memory.held_b


async def send_part(relay: RunningRelay, stack: AsyncExitStack, install_id: str, address: str, size: int) -> None:
    """Send the beginning of a large body, and stand still."""
    _, writer = await asyncio.open_connection("127.0.0.1", relay.port)
    stack.callback(writer.close)
    lines = [f"POST {CHAT} HTTP/1.1", "Host: a", f"X-Install-Id: {install_id}", f"X-Forwarded-For: {address}"]
    lines += ["Content-Type: application/json", f"Content-Length: {size + 1}"]
    writer.write("\r\n".join([*lines, "", ""]).encode() + b'{"model":"plain","x":"' + b"x" * (size - 22))


@pytest.mark.parametrize("many", ["installs", "addresses"])
async def test_memory_when_bodies_that_stand_still_take_all_they_can_get_then_an_honest_one_is_served(
    start_relay: StartRelay, gemini: Backend, many: str
) -> None:
    relay = await start_relay(
        client_of("gemini", gemini.url), body_limit_mb=2, bodies_in_memory_mb=16, **BEHIND_A_PROXY
    )
    attacker = new_install()
    async with AsyncExitStack() as stack:
        for number in range(24):
            install_id = new_install() if many == "installs" else attacker
            address = ATTACKER if many == "installs" else f"203.0.113.{number}"
            await send_part(relay, stack, install_id, address, 2 * MIB - 1000)
        await eventually(lambda: memory_of(relay) > 4 * MIB, what="the attacker's share")
        for size in (10, 2 * MIB - 1000):
            answer = await relay.ask(headers={"X-Forwarded-For": HONEST}, input="x" * size)
            assert answer.status == 200
        assert memory_of(relay) < 11 * MIB
    await eventually(lambda: memory_of(relay) == 0)
    assert relay.app[RELAY].memory.share._held == {}
    assert await relay.spent() == (2, 2)


async def test_memory_when_a_share_is_used_up_then_small_requests_of_the_same_client_find_room(
    start_relay: StartRelay, gemini: Backend
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url), body_limit_mb=1, bodies_in_memory_mb=2)
    async with AsyncExitStack() as stack:
        await send_part(relay, stack, relay.install_id, HONEST, MIB - 1000)
        await eventually(lambda: memory_of(relay) == MIB - 1000)
        answer = await relay.ask(input="x" * (MIB - 1000))
        assert (answer.status, answer.code) == (503, "relay_busy")
        assert (await relay.ask(input="x" * 60_000)).status == 200
    page = (await relay.send("GET", "/metrics")).body.decode()
    assert 'limiter_shares_used_up_total{share="memory"}' in page


async def test_memory_when_replays_are_not_read_then_they_are_counted_and_others_are_served(
    start_relay: StartRelay, gemini: Backend
) -> None:
    relay = await start_relay(
        client_of("gemini", gemini.url),
        body_limit_mb=1,
        bodies_in_memory_mb=64,
        answer_limit_kb=16_384,
        keep_mb_per_install=64,
        **BEHIND_A_PROXY,
    )
    for key in range(3):  # each is replayed some times a minute
        first = await relay.ask("huge:8000000", headers={"Idempotency-Key": f"k{key}", "X-Forwarded-For": ATTACKER})
        assert (first.status, len(first.body) > 8_000_000) == (200, True)
    await relay.settled()
    body = json.dumps({"model": "huge:8000000", "messages": [{"role": "user", "content": "Hi"}]}).encode()
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nX-Install-Id: {relay.install_id}\r\n"
        f"X-Forwarded-For: {ATTACKER}\r\nContent-Length: {len(body)}\r\nIdempotency-Key: k"
    ).encode()
    clients = []
    for number in range(12):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", relay.port))
        await asyncio.get_running_loop().sock_sendall(client, head + b"%d\r\n\r\n" % (number % 3) + body)
        clients.append(client)
    try:
        await eventually(lambda: memory_of(relay) > 2 * 8_000_000, what="replays that wait for their clients")
        for _ in range(10):
            await asyncio.sleep(0.02)
            assert memory_of(relay) <= 34 * MIB
        honest = await relay.ask(
            "plain", headers={"X-Install-Id": new_install(), "X-Forwarded-For": HONEST}, x="x" * MIB
        )
        assert honest.status == 413
        honest = await relay.ask(
            "plain", headers={"X-Install-Id": new_install(), "X-Forwarded-For": HONEST}, x="x" * (MIB - 1000)
        )
        assert honest.status == 200
    finally:
        for client in clients:
            client.close()
    await eventually(lambda: memory_of(relay) == 0, what="the end of all replays")
    assert relay.app[RELAY].memory.share._held == {}


async def test_answer_when_it_is_large_then_it_arrives_whole_and_its_memory_is_free_again(
    start_relay: StartRelay, gemini: Backend
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url), body_limit_mb=1, bodies_in_memory_mb=4)
    for key in ("a", "a", "b"):
        answer = await relay.ask("huge:900000", headers={"Idempotency-Key": key})
        assert (answer.status, int(answer.headers["Content-Length"])) == (200, len(answer.body))
    await eventually(lambda: memory_of(relay) == 0)
    assert await relay.spent() == (2, 2)


async def test_places_when_one_install_takes_all_it_can_get_then_others_are_served(
    start_relay: StartRelay, gemini: Backend
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url), max_connections=40)
    running = [asyncio.create_task(relay.ask("wait")) for _ in range(20)]
    await eventually(lambda: len(gemini.seen) == 20)
    refused = await relay.ask()
    assert (refused.status, refused.code, refused.headers["Retry-After"]) == (503, "relay_busy", "1")
    for _ in range(5):
        assert (await relay.ask(headers={"X-Install-Id": new_install()})).status == 200
    gemini.go_on.set()
    assert {answer.status for answer in await asyncio.gather(*running)} == {200}
    assert relay.app[RELAY].places.taken == 0


async def test_connections_when_one_install_streams_on_all_that_it_can_get_then_another_one_is_served_at_once(
    start_relay: StartRelay, hardware: Backend
) -> None:
    relay = await start_relay(client_of("hardware", hardware.url, max_connections=4))
    async with AsyncExitStack() as stack:
        greedy = [stack.enter_async_context(relay.post("stream:1000:0.05")) for _ in range(6)]
        statuses = [answer.status for answer in await asyncio.gather(*greedy)]
        assert sorted(statuses) == [200, 200, 503, 503, 503, 503]
        for _ in range(3):
            answer = await relay.ask(headers={"X-Install-Id": new_install()})
            assert answer.status == 200
    with suppress(TimeoutError):
        await relay.settled()


async def test_connections_when_all_are_in_use_then_those_that_wait_have_their_turns_by_install(
    start_relay: StartRelay, hardware: Backend
) -> None:
    relay = await start_relay(client_of("hardware", hardware.url, max_connections=1))
    first = asyncio.create_task(relay.ask("wait"))
    await eventually(lambda: len(hardware.seen) == 1)
    greedy = [asyncio.create_task(relay.ask()) for _ in range(8)]
    transport = relay.app[RELAY].backends["hardware"]._transport
    await eventually(lambda: transport._slots is not None and sum(map(len, transport._slots._waiting.values())) == 8)
    honest = asyncio.create_task(relay.ask("honest", headers={"X-Install-Id": new_install()}))
    await eventually(lambda: transport._slots is not None and len(transport._slots._waiting) == 2)
    hardware.go_on.set()
    assert (await honest).status == 200
    await asyncio.gather(first, *greedy)
    assert [seen.model for seen in hardware.seen].index("honest") <= 2
