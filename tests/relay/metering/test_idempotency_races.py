"""Attempts that meet: races of two nodes, owners that die half-way, and the retries that an SDK makes by itself."""

import asyncio
import random
import uuid

import aiohttp
import openai
import pytest
from redis.asyncio import Redis

from limiter.credits.keys import Keys
from tests.relay.metering.test_idempotency import (
    CHUNKS,
    Backend,
    Nodes,
    backend,
    claims_of,
    no_claim_left,
    node_on,
    nodes,
)
from tests.support.credits import text_of
from tests.support.relay import ONE_SERVER
from tests.support.wait import eventually

__all__ = ["backend", "nodes"]  # fixtures
pytestmark = ONE_SERVER
FIRST, RETRY = {"x_stainless_retry_count": "0"}, {"x_stainless_retry_count": "1"}


async def test_keys_when_two_nodes_race_then_one_call_and_one_debit_each(nodes: Nodes, backend: Backend) -> None:
    keys = [f"key-{number}" for number in range(50)]
    attempts = [(node, key) for key in keys for node in (*nodes, *nodes)]
    answers = await asyncio.gather(*(node.ask("stream", key) for node, key in attempts))
    for (_, key), answer in zip(attempts, answers, strict=True):
        assert answer.status == 200 or answer.code == "idempotency_in_progress", (key, answer)
        assert answer.status != 200 or answer.body == b"".join(CHUNKS)
    served = [
        key for (_, key), answer in zip(attempts, answers, strict=True) if answer.status == 200 and not answer.replayed
    ]
    assert sorted(served) == sorted(keys)
    assert backend.calls == 50
    for key in keys:
        assert (await nodes[1].ask("stream", key)).replayed
    assert backend.calls == 50
    assert await nodes[0].spent() == 50


async def test_clients_when_they_leave_at_random_then_what_is_debited_is_never_served_again(
    nodes: Nodes, redis: Redis
) -> None:
    """Each key is sent until it is settled, by clients that leave at any moment: one debit a key, no claim left."""
    chance, few = random.Random(7), asyncio.Semaphore(4)

    async def persist(key: str) -> str:
        for attempt in range(100):
            asking = asyncio.ensure_future(chance.choice(nodes).ask("stream" if key.startswith("s") else "plain", key))
            done, _ = await asyncio.wait({asking}, timeout=chance.uniform(0, 0.01 + attempt / 1000))
            if not done:
                asking.cancel()
                continue
            answer = asking.result()
            if answer.status < 300:
                return "replayed" if answer.replayed else "served"
            if answer.code in (
                "idempotency_answer_not_kept",
                "rate_limited",
            ):  # it is settled; that is its sixth replay
                return answer.code
            assert answer.code == "idempotency_in_progress"
        return "nothing"

    async def persist_among_few(key: str) -> str:
        async with few:
            return await persist(key)

    keys = [f"{kind}-{number}" for number in range(20) for kind in "sp"]
    ends = await asyncio.gather(*map(persist_among_few, keys))
    assert "nothing" not in ends
    assert len(set(ends)) > 1, "no client left at a moment that matters"

    async def all_at_rest() -> bool:
        return not [
            key for key in await claims_of(redis) if text_of(await redis.hget(key, "busy_until_ms") or "0") != "0"
        ]

    await eventually(all_at_rest)
    assert len(await claims_of(redis)) == len(keys)
    assert await nodes[0].spent() == len(keys)


async def test_owner_when_cancelled_again_and_again_then_the_key_is_never_stuck(
    nodes: Nodes, redis: Redis, backend: Backend
) -> None:
    for number in range(20):
        backend.arrived.clear()
        asking = asyncio.ensure_future(nodes[number % 2].ask("wait"))
        await backend.arrived.wait()
        asking.cancel()
        await no_claim_left(redis)
    assert await nodes[0].spent() == 0
    backend.go_on.set()
    assert (await nodes[0].ask("wait")).status == 201
    assert await nodes[0].spent() == 1


async def test_retry_when_an_sdk_lost_the_answer_then_it_is_replayed_without_a_second_debit(
    nodes: Nodes, backend: Backend
) -> None:
    with pytest.raises(aiohttp.ClientError):
        await nodes[0].ask("cut", None, **FIRST)
    retried = await nodes[1].ask("cut", None, **RETRY)
    assert retried.replayed
    assert backend.calls == 1
    assert await nodes[0].spent() == 1


async def test_retry_when_the_real_sdk_makes_it_then_its_user_notices_nothing(nodes: Nodes, backend: Backend) -> None:
    async with openai.AsyncOpenAI(
        base_url=f"{nodes[0].url}/v1",
        api_key="x",
        default_headers={"X-Install-Id": nodes[0].install_id},
        max_retries=2,
    ) as client:
        raw = await client.completions.with_raw_response.create(model="cut", prompt="Hi")
    assert b'"call": 1' in raw.content
    assert backend.calls == 1
    assert await nodes[0].spent() == 1


async def test_first_attempts_when_they_are_the_same_then_they_are_two_requests(nodes: Nodes, backend: Backend) -> None:
    first = await nodes[0].ask("plain", None, **FIRST)
    second = await nodes[0].ask("plain", None, **FIRST)
    assert not second.replayed
    assert second.body != first.body
    assert (await nodes[0].ask("plain", None, **RETRY)).body == second.body
    assert backend.calls == 2
    assert await nodes[0].spent() == 2


async def test_retry_when_the_first_attempt_failed_then_it_is_served(nodes: Nodes, redis: Redis) -> None:
    assert (await nodes[0].ask("fail", None, **FIRST)).status == 502
    await no_claim_left(redis)
    assert (await nodes[0].ask("plain", None, **RETRY)).status == 201
    assert await nodes[0].spent() == 1


async def test_retry_when_the_first_attempt_still_runs_then_409_that_the_sdk_repeats(
    nodes: Nodes, backend: Backend
) -> None:
    first = asyncio.ensure_future(nodes[0].ask("wait", None, **FIRST))
    await backend.arrived.wait()
    busy = await nodes[1].ask("wait", None, **RETRY)
    assert (busy.code, busy.headers["Retry-After"]) == ("idempotency_in_progress", "1")
    backend.go_on.set()
    assert (await nodes[1].ask("wait", None, **RETRY)).body == (await first).body
    assert backend.calls == 1


@pytest.mark.parametrize("count", ["", "-1", "1.5", "x", "\u0661", "0x1"])
async def test_retry_count_when_it_is_not_a_number_then_there_is_no_record(
    nodes: Nodes, redis: Redis, backend: Backend, count: str
) -> None:
    for _ in range(2):
        assert (await nodes[0].ask("plain", None, x_stainless_retry_count=count)).status == 201
    assert backend.calls == 2
    assert await claims_of(redis) == []


async def test_retry_when_the_window_is_over_or_off_then_it_is_a_new_request(
    redis: Redis, redis_url: str, backend: Backend
) -> None:
    install_id = str(uuid.uuid4())
    async with node_on(redis_url, backend, install_id=install_id, retry_window_s=1) as node:
        await node.ask("plain", None, **FIRST)
        (key,) = await claims_of(redis)
        assert key.startswith(f"credits:retry:{install_id}:")

        async def kept() -> bool:
            return bool(await redis.hget(key, "answer"))

        await eventually(kept)
        assert 0 < await redis.pttl(key) <= 1000
        await no_claim_left(redis)
        assert not (await node.ask("plain", None, **RETRY)).replayed
    async with node_on(redis_url, backend, install_id=install_id, retry_window_s=0) as node:
        await redis.flushdb()
        await node.ask("plain", None, **FIRST)
        assert not (await node.ask("plain", None, **RETRY)).replayed
        assert await claims_of(redis) == []


async def test_key_when_an_sdk_counts_too_then_the_key_decides(nodes: Nodes, redis: Redis, backend: Backend) -> None:
    first = await nodes[0].ask("plain", "k", **FIRST)
    assert (await nodes[0].ask("plain", "k", **FIRST)).body == first.body
    assert await claims_of(redis) == [Keys().claim(nodes[0].install_id, "k")]
    assert backend.calls == 1
