"""Answers that are kept for repeats never cost anybody a request: each install and all together have a budget."""

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack

import pytest
from redis.asyncio import Redis

from limiter import CreditLimiter, connect
from limiter.relay.handlers.context import RELAY
from limiter.relay.metering.kept_answers import KeptAnswers
from tests.support.openai_backend import Backend, running_backend
from tests.support.redis_servers import Server
from tests.support.relay import (
    CHAT,
    ONE_SERVER,
    Answer,
    RunningRelay,
    StartRelay,
    client_of,
    new_install,
    relays_on,
    tiers,
)
from tests.support.wait import eventually

_MIB = 1 << 20
BIG = f"huge:{1_040_000}"


def of(install_id: str, key: object = None) -> Mapping[str, str]:
    """The headers of an install's request, with an Idempotency-Key or as an OpenAI SDK sends it."""
    by = {"x-stainless-retry-count": "0"} if key is None else {"Idempotency-Key": str(key)}
    return {"X-Install-Id": install_id, **by}


async def recorded(relay: RunningRelay) -> dict[str, int]:
    """What became of the answers, by the metric."""
    await relay.settled()
    page = (await relay.send("GET", "/metrics")).body.decode()
    return {
        found[1]: int(float(found[2]))
        for found in re.finditer(r'limiter_recorded_answers_total{outcome="(\w+)"} (\S+)', page)
    }


@pytest.fixture(params=["valkey", "redis"])
async def small_redis(own_server: Callable[..., Server], request: pytest.FixtureRequest) -> AsyncIterator[Redis]:
    """A server with little memory, as an attacker would find one who has time."""
    redis = await connect(own_server(request.param, "--maxmemory", "64mb", "--maxmemory-policy", "noeviction").url)
    yield redis
    await redis.aclose()


@pytest.mark.parametrize("on_redis_down", ["deny", "hardware"])
async def test_attack_when_installs_have_large_answers_kept_then_the_honest_are_served_and_nobody_for_nothing(
    small_redis: Redis, on_redis_down: str
) -> None:
    """149 answers of 1 MB, from installs of one address, used to stop the service of all for a day."""
    async with AsyncExitStack() as stack:
        hardware = await stack.enter_async_context(running_backend())
        start = await stack.enter_async_context(relays_on(small_redis))
        relay = await start(
            client_of("hardware", hardware.url),
            on=CreditLimiter(small_redis, tiers(lifetime=60)),
            on_redis_down=on_redis_down,
            keep_mb=32,  # half of its memory, as 256 of 1024
        )
        attackers, honest = [new_install() for _ in range(6)], new_install()
        used_mb, kept_key = 0.0, "the honest one's"
        first = await relay.ask("plain", headers=of(honest, kept_key))

        async def attack(install_id: str) -> None:
            for number in range(30):
                answer = await relay.ask(BIG, headers=of(install_id, number))
                assert answer.status == 200, answer.body
                assert "X-Credits-Unmetered" not in answer.headers

        attacks = [asyncio.ensure_future(attack(install_id)) for install_id in attackers]
        honest_answers = []
        while not all(each.done() for each in attacks):
            answer = await relay.ask("plain", headers={"X-Install-Id": honest})
            honest_answers.append((answer.status, answer.headers.get("X-Credits-Unmetered")))
            info = await small_redis.info("memory")
            used_mb = max(used_mb, info["used_memory"] / _MIB)
            await asyncio.sleep(0.1)
        await asyncio.gather(*attacks)
        assert set(honest_answers[:59]) == {(200, None)}
        assert used_mb < 56, "the answers of 32 MB and what is on its way"
        # Rows and marks survive: each attacker has paid for what it got, and nothing is served a second time.
        for install_id in attackers:
            assert (await relay.spent(install_id))[0] == 30
            repeats = [await relay.ask(BIG, headers=of(install_id, number)) for number in (0, 29)]
            assert {repeat.status for repeat in repeats} <= {200, 409}
            assert repeats[-1].code == "idempotency_answer_not_kept"
        assert (await relay.ask("plain", headers=of(honest, kept_key))).body == first.body, "it was kept before"
        outcomes = await recorded(relay)
        assert outcomes["kept"] <= 33
        assert sum(outcomes.values()) == 6 * 30 + 1
        assert relay.app[RELAY].availability.state == "ok"


@pytest.fixture
async def relay(start_relay: StartRelay, hardware: Backend) -> RunningRelay:
    return await start_relay(client_of("hardware", hardware.url), tiers=tiers(lifetime=1000))


async def repeat_of(relay: RunningRelay, model: str, headers: Mapping[str, str]) -> Answer:
    await relay.settled()
    return await relay.ask(model, headers=headers)


@ONE_SERVER
async def test_install_when_its_budget_is_used_up_then_only_the_mark_is_kept_and_others_have_theirs(
    start_relay: StartRelay, hardware: Backend
) -> None:
    nodes = [
        await start_relay(client_of("hardware", hardware.url), tiers=tiers(lifetime=100), keep_mb_per_install=1)
        for _ in range(2)
    ]
    one, other = new_install(), new_install()
    model = f"huge:{400_000}"
    for number in range(4):
        assert (await nodes[number % 2].ask(model, headers=of(one, number))).status == 200
        await nodes[number % 2].settled()
    repeats = [await nodes[1].ask(model, headers=of(one, number)) for number in range(4)]
    assert [repeat.status for repeat in repeats] == [200, 200, 409, 409], "on all nodes together"
    assert {repeat.code for repeat in repeats[2:]} == {"idempotency_answer_not_kept"}
    await nodes[0].ask(model, headers=of(other, "k"))
    assert (await repeat_of(nodes[0], model, of(other, "k"))).status == 200
    assert await nodes[0].spent(one) == (4, 0)
    outcomes = [await recorded(node) for node in nodes]
    assert sum(each["kept"] for each in outcomes) == 3
    assert sum(each.get("install_budget", 0) for each in outcomes) == 2


@ONE_SERVER
async def test_retry_without_a_key_when_the_answer_is_large_then_only_the_mark_is_kept(relay: RunningRelay) -> None:
    for size, status in ((60_000, 200), (70_000, 409)):
        model = f"huge:{size}"
        assert (await relay.ask(model, headers=of(relay.install_id))).status == 200
        repeat = await repeat_of(relay, model, {**of(relay.install_id), "x-stainless-retry-count": "1"})
        assert repeat.status == status
    assert repeat.code == "idempotency_answer_not_kept"
    assert (await relay.spent())[0] == 2


@ONE_SERVER
async def test_retries_without_a_key_when_an_install_has_many_answers_kept_then_it_has_the_same_budget(
    start_relay: StartRelay, hardware: Backend
) -> None:
    relay = await start_relay(client_of("hardware", hardware.url), tiers=tiers(lifetime=100), keep_mb_per_install=1)
    for number in range(30):
        await relay.ask("huge:60000", headers=of(relay.install_id), user=str(number))
    outcomes = await recorded(relay)
    assert outcomes["install_budget"] >= 12
    assert outcomes["kept"] + outcomes["install_budget"] == 30


async def calls_of(redis: Redis, relay: RunningRelay) -> int:
    await relay.settled()
    stats = await redis.info("commandstats")
    return int(stats["cmdstat_evalsha"]["calls"])


@ONE_SERVER
@pytest.mark.parametrize(("headers", "calls"), [({}, 2), ({"x-stainless-retry-count": "0"}, 4)])
async def test_request_without_a_key_when_it_is_served_then_the_budgets_cost_it_no_call(
    relay: RunningRelay, redis: Redis, headers: Mapping[str, str], calls: int
) -> None:
    """Reserve and commit; with an SDK's count claim and record. A budget is asked once for a thousand small answers."""
    await relay.ask(headers=headers)
    before = await calls_of(redis, relay)
    for number in range(20):
        assert (await relay.ask(headers=headers, user=str(number))).status == 200
    assert await calls_of(redis, relay) - before == 20 * calls


@ONE_SERVER
async def test_portions_when_many_processes_count_then_the_budget_of_all_holds(relay: RunningRelay) -> None:
    claims = relay.app[RELAY].idempotency._claims
    processes = [KeptAnswers(claims, per_install_b=100 * _MIB, in_all_b=16 * _MIB) for _ in range(8)]

    async def fill(process: KeptAnswers) -> int:
        results = [await process.count("i", 50_000, 60_000, has_key=False) for _ in range(100)]
        assert set(results) <= {None, "budget"}
        return results.count(None) * 50_000

    kept_b = sum(await asyncio.gather(*(fill(process) for process in processes)))
    assert 14 * _MIB < kept_b <= 16 * _MIB


@ONE_SERVER
async def test_answer_when_redis_has_no_memory_for_it_then_the_mark_is_recorded_all_the_same(
    relay: RunningRelay, redis: Redis, hardware: Backend
) -> None:
    waiting = asyncio.ensure_future(relay.ask("wait", headers=of(relay.install_id, "k")))
    await hardware.arrived.wait()
    await redis.config_set("maxmemory", "1")
    try:
        hardware.go_on.set()
        assert (await waiting).status == 200
        assert await recorded(relay) == {"out_of_memory": 1}
    finally:
        await redis.config_set("maxmemory", "0")
    await eventually(lambda: relay.app[RELAY].availability.state != "away")
    repeat = await relay.ask("wait", headers=of(relay.install_id, "k"))
    assert (repeat.status, repeat.code) == (409, "idempotency_answer_not_kept")
    assert (await relay.spent())[0] == 1


# What repeats may cost: they are free, and the client may not read them


async def slow_reader(relay: RunningRelay, model: str, headers: Mapping[str, str]) -> socket.socket:
    """Send a request over a connection with little room, and read nothing."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hi"}]}).encode()
    lines = [f"{name}: {value}" for name, value in headers.items()]
    head = "\r\n".join([f"POST {CHAT} HTTP/1.1", "Host: relay", "Content-Type: application/json", *lines])
    reader = socket.socket()
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    reader.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(reader, ("127.0.0.1", relay.port))
    await loop.sock_sendall(reader, f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    return reader


@ONE_SERVER
async def test_attack_when_repeats_are_not_read_then_few_are_sent_and_their_memory_is_counted_until_the_client_leaves(
    start_relay: StartRelay, hardware: Backend
) -> None:
    """600 connections that read nothing used to take 635 MB for one credit."""
    big, answer_b = "huge:6000000", 6_000_000  # more than the system buffers for a connection
    relay = await start_relay(client_of("hardware", hardware.url), tiers=tiers(lifetime=9), answer_limit_kb=8192)
    headers = of(relay.install_id, "k")
    assert (await relay.ask(big, headers=headers)).status == 200
    await relay.settled()
    memory = relay.app[RELAY].memory
    readers = [await slow_reader(relay, big, headers) for _ in range(60)]
    try:
        await eventually(lambda: memory.held_b > 5 * answer_b, what="the replays")
        refused = await relay.ask(big, headers=headers)
        assert (refused.status, refused.code) == (429, "rate_limited")
        assert 1 <= int(refused.headers["Retry-After"]) <= 12
        assert memory.held_b < 5.1 * answer_b
    finally:
        for reader in readers:
            reader.close()
    await eventually(lambda: memory.held_b == 0, what="the release of their memory")
    assert (await relay.spent())[0] == 1


@ONE_SERVER
async def test_repeat_when_there_is_no_memory_to_hold_it_then_503_and_it_is_sent_later(
    start_relay: StartRelay, hardware: Backend
) -> None:
    relay = await start_relay(client_of("hardware", hardware.url), tiers=tiers(lifetime=9), bodies_in_memory_mb=4)
    headers = of(relay.install_id, "k")
    first = await relay.ask(BIG, headers=headers)
    await relay.settled()
    with relay.app[RELAY].memory.reservation() as others:
        others.add(4_000_000)
        refused = await relay.ask(BIG, headers=headers)
        assert (refused.status, refused.code) == (503, "relay_busy")
    again = await relay.ask(BIG, headers=headers)
    assert (again.status, again.body, again.headers["Idempotency-Replayed"]) == (200, first.body, "true")
