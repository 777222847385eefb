"""Many nodes at once on one install, and replies that get lost on the way: nothing is debited twice, nothing leaks."""

import asyncio
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import get_args

import pytest
from redis.asyncio import Redis

from limiter import CreditLimiter, DecisionStatus, Execution, LimiterUnavailable, SettlementStatus, connect
from limiter.redis.lua_source import compose
from tests.support.credits import TIERS, fields_of
from tests.support.paths import ROOT
from tests.support.redis_proxy import Loss, Proxy, proxy_of

NODES = 3


async def spent_by_nodes(
    redis_url: str, tier: str, limits: dict[str, int], *, has_hardware: bool, give_back: float = 0.0
) -> "list[Counter[str]]":
    """Let a few processes of 64 tasks each spend the install `raced` together; return what each of them spent."""
    words = (redis_url, "raced", tier, json.dumps(limits), str(int(has_hardware)), str(give_back))
    nodes = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.support.race_worker", *words),
            cwd=ROOT,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        for _ in range(NODES)
    ]
    for node in nodes:
        assert node.stdout
        assert await node.stdout.readline() == b"ready\n"
    outputs = await asyncio.gather(*(node.communicate(b"\n") for node in nodes))
    assert [node.returncode for node in nodes] == [0] * NODES
    spent = [Counter(json.loads(output)) for output, _ in outputs]
    assert not any(SettlementStatus.GONE in each for each in spent), "a commit was repeated, though no reply was lost"
    return spent


async def assert_row_tells(redis: Redis, counter: str, *, consumed: int, on_gemini: int) -> None:
    fields = await fields_of(redis, "raced")
    assert int(fields[f"{counter}_consumed"]) == consumed
    assert int(fields[f"{counter}_gemini_consumed"]) == on_gemini
    assert_no_hold(fields)


def assert_no_hold(fields: dict[str, str]) -> None:
    assert not [name for name in fields if name == "held" or name.startswith("hold:")], "a hold leaked"


async def test_core_credits_when_many_nodes_spend_them_at_once_then_each_is_spent_once(
    redis: Redis, redis_url: str
) -> None:
    nodes = await spent_by_nodes(redis_url, "core", {"lifetime": 600}, has_hardware=False)
    assert sum(nodes, Counter()) == {"gemini": 600}
    assert all(nodes), "they did not race: one of them spent nothing"
    await assert_row_tells(redis, "lifetime", consumed=600, on_gemini=600)


async def test_gemini_cap_when_many_nodes_race_for_it_then_exactly_the_cap_is_on_gemini_and_the_rest_on_hardware(
    redis: Redis, redis_url: str
) -> None:
    nodes = await spent_by_nodes(redis_url, "pro", {"monthly": 600, "gemini_cap": 250}, has_hardware=True)
    assert sum(nodes, Counter()) == {"gemini": 250, "hardware": 350}
    await assert_row_tells(redis, "monthly", consumed=600, on_gemini=250)


async def test_gemini_cap_when_many_nodes_race_for_it_without_hardware_then_nothing_is_spent_beyond_it(
    redis: Redis, redis_url: str
) -> None:
    nodes = await spent_by_nodes(redis_url, "core", {"lifetime": 600, "gemini_cap": 300}, has_hardware=False)
    assert sum(nodes, Counter()) == {"gemini": 300}
    await assert_row_tells(redis, "lifetime", consumed=300, on_gemini=300)


async def test_credits_when_many_nodes_also_release_some_then_all_are_spent_and_none_twice(
    redis: Redis, redis_url: str
) -> None:
    nodes = await spent_by_nodes(
        redis_url, "pro", {"monthly": 600, "gemini_cap": 250, "max_in_flight": 40}, has_hardware=True, give_back=0.4
    )
    spent = sum(nodes, Counter())
    assert spent.total() == 600
    assert spent["gemini"] <= 250
    await assert_row_tells(redis, "monthly", consumed=600, on_gemini=spent["gemini"])


@pytest.fixture
async def proxy(redis_url: str) -> AsyncIterator[Proxy]:
    async with proxy_of(redis_url) as proxy:
        yield proxy


@pytest.fixture
async def proxied(proxy: Proxy) -> AsyncIterator[CreditLimiter]:
    """A limiter behind the proxy, that waits 0.3 s for a reply and repeats for 20 s."""
    client = await connect(proxy.url, timeout_ms=300)
    yield CreditLimiter(client, TIERS, timeout_ms=300, deadline_ms=20_000)
    await client.aclose()


async def reserve_and_commit(limiter: CreditLimiter, install_id: str) -> None:
    decision = await limiter.reserve(install_id, tier="pro", has_hardware=False, cost=3)
    assert decision.status in {DecisionStatus.ALLOWED, DecisionStatus.REPLAY}
    settlement = await limiter.commit(install_id, decision.hold_id)
    assert settlement.status in {
        SettlementStatus.COMMITTED,
        SettlementStatus.GONE,
    }  # GONE: the lost reply was the commit's


async def reserve_and_release(limiter: CreditLimiter, install_id: str) -> None:
    decision = await limiter.reserve(install_id, tier="pro", has_hardware=False, cost=3)
    assert decision.allowed
    assert await limiter.release(install_id, decision.hold_id) in {SettlementStatus.RELEASED, SettlementStatus.GONE}


@pytest.mark.slow
@pytest.mark.parametrize("loss", get_args(Loss))
@pytest.mark.parametrize("request_", [reserve_and_commit, reserve_and_release])
async def test_reply_of_any_command_when_lost_then_the_caller_has_its_answer_and_it_is_counted_once(
    redis: Redis,
    proxy: Proxy,
    proxied: CreditLimiter,
    request_: Callable[[CreditLimiter, str], Awaitable[None]],
    loss: Loss,
) -> None:
    """The scripts are unknown to the server at the start, so that the replies to loading them get lost too."""
    number, lost = 0, True
    while lost:
        install_id = f"install-{number}"
        await redis.script_flush()
        proxy.lose_reply(number, loss)
        async with asyncio.timeout(20):
            await request_(proxied, install_id)
        lost = len(proxy.commands) > number
        fields = await fields_of(redis, install_id)
        assert fields["monthly_consumed"] == ("3" if request_ is reserve_and_commit else "0")
        assert_no_hold(fields)
        number += 1
    assert number >= 7, "reserve and its settlement are three commands each, where the script has to be loaded"


@pytest.mark.parametrize("loss", get_args(Loss))
async def test_debit_when_its_reply_is_lost_then_it_is_debited_once_and_the_error_says_that_the_outcome_is_unknown(
    redis: Redis, proxy: Proxy, proxied: CreditLimiter, loss: Loss
) -> None:
    await redis.script_load(compose("debit").text)
    proxy.lose_reply(0, loss)
    with pytest.raises(LimiterUnavailable) as unknown:
        await proxied.debit("raced", tier="pro", has_hardware=False)
    assert unknown.value.execution is Execution.UNKNOWN
    await assert_row_tells(redis, "monthly", consumed=1, on_gemini=1)
    assert [command[0] for command in proxy.commands].count(b"EVALSHA") == 1, "it was repeated"


@pytest.mark.parametrize("loss", get_args(Loss))
async def test_debit_when_the_reply_to_loading_its_script_is_lost_then_nothing_is_debited(
    redis: Redis, proxy: Proxy, proxied: CreditLimiter, loss: Loss
) -> None:
    await redis.script_flush()
    proxy.lose_reply(1, loss)
    with pytest.raises(LimiterUnavailable):
        await proxied.debit("raced", tier="pro", has_hardware=False)
    assert await fields_of(redis, "raced") == {}
