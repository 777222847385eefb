"""A refusal for lack of credits is repeated without a call to Redis: for a moment, and never wrongly."""

import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest
from redis.asyncio import Redis

from limiter import CreditLimiter, DecisionStatus, Reason, Tiers, connect
from limiter.credits.denial_cache import DenialCache
from limiter.credits.models import Balance, Decision
from tests.support.credits import Clock
from tests.support.redis_proxy import Proxy, proxy_of

KEEP_MS = 1000
TIERS = Tiers.from_mapping(
    {"core": {"lifetime": 3}, "trial": {"lifetime": 5}, "pro": {"monthly": 2, "gemini_cap": 1}, "big": {"monthly": 9}}
)


@pytest.fixture
async def proxy(redis: Redis, redis_url: str) -> AsyncIterator[Proxy]:
    assert await redis.dbsize() == 0
    async with proxy_of(redis_url) as proxy:
        yield proxy


@pytest.fixture
async def limiter(proxy: Proxy, clock: Clock, closing: AsyncExitStack) -> CreditLimiter:
    """A limiter that remembers refusals, behind a proxy that counts its calls. The server is empty."""
    client = await connect(proxy.url)
    closing.push_async_callback(client.aclose)
    return CreditLimiter(client, TIERS, clock=clock, deny_cache_ms=KEEP_MS)


def calls_to(proxy: Proxy) -> int:
    return sum(command[0] == b"EVALSHA" for command in proxy.commands)


async def reserve(limiter: CreditLimiter, *, tier: str = "core", cost: int = 1, hold_id: str | None = None) -> Decision:
    return await limiter.reserve("i", tier=tier, has_hardware=True, cost=cost, hold_id=hold_id)


async def use_up(limiter: CreditLimiter, *, tier: str = "core") -> None:
    """Use all credits, and be refused once."""
    quota = TIERS[tier].quota
    assert quota
    assert (await limiter.debit("i", tier=tier, has_hardware=True, cost=quota)).allowed
    refused = await reserve(limiter, tier=tier)
    assert (refused.reason, refused.from_memory) == (Reason.OUT_OF_CREDITS, False)


async def test_client_when_it_keeps_retrying_then_redis_is_called_once_in_the_time_that_a_refusal_is_cached(
    limiter: CreditLimiter, proxy: Proxy, clock: Clock
) -> None:
    await use_up(limiter)
    proxy.commands.clear()
    for step_ms, calls in ((0, 0), (KEEP_MS - 1, 0), (1, 1), (KEEP_MS - 1, 1), (1, 2)):
        clock.now_ms += step_ms
        for _ in range(20):
            assert (await reserve(limiter)).reason is Reason.OUT_OF_CREDITS
            assert (await limiter.debit("i", tier="core", has_hardware=True)).reason is Reason.OUT_OF_CREDITS
        assert calls_to(proxy) == calls


async def test_client_when_it_hammers_in_real_time_then_it_costs_a_call_a_second(
    proxy: Proxy, closing: AsyncExitStack
) -> None:
    client = await connect(proxy.url)
    closing.push_async_callback(client.aclose)
    limiter = CreditLimiter(client, TIERS, deny_cache_ms=200)
    await use_up(limiter)
    proxy.commands.clear()
    began_s = time.monotonic()
    requests = 0
    while (took_s := time.monotonic() - began_s) < 0.7:
        assert (await reserve(limiter)).reason is Reason.OUT_OF_CREDITS
        requests += 1
    assert 1 <= calls_to(proxy) <= took_s / 0.2 + 1
    assert requests > 2 * calls_to(proxy)


async def test_refusal_when_given_from_memory_then_it_is_what_redis_says(
    limiter: CreditLimiter, redis: Redis, clock: Clock
) -> None:
    for tier in ("core", "pro"):
        await use_up(limiter, tier=tier)
        clock.now_ms += 400
        remembered = await reserve(limiter, tier=tier, hold_id="h")
        assert remembered.from_memory
        fresh = await reserve(CreditLimiter(redis, TIERS, clock=clock), tier=tier, hold_id="h")
        assert remembered == fresh._replace(from_memory=True)


async def test_cost_when_it_is_within_what_remained_then_redis_is_called_and_above_it_is_not(
    limiter: CreditLimiter, proxy: Proxy
) -> None:
    await limiter.debit("i", tier="trial", has_hardware=True, cost=3)
    assert not (await reserve(limiter, tier="trial", cost=4)).allowed
    proxy.commands.clear()
    assert (await reserve(limiter, tier="trial", cost=3)).from_memory
    assert calls_to(proxy) == 0
    assert (await reserve(limiter, tier="trial", cost=2)).allowed


async def test_tier_when_it_is_another_one_then_redis_is_called(limiter: CreditLimiter) -> None:
    await use_up(limiter)
    assert (await reserve(limiter, tier="trial")).allowed
    await limiter.release("i", "h")


async def test_renewal_when_it_comes_then_nothing_is_refused_from_before_it(
    limiter: CreditLimiter, clock: Clock
) -> None:
    await limiter.debit("i", tier="big", has_hardware=True)
    await limiter.debit("i", tier="pro", has_hardware=True)
    refused = await reserve(limiter, tier="pro", cost=2)
    assert refused.balance.renews_ms
    clock.now_ms = refused.balance.renews_ms - 300
    assert not (await reserve(limiter, tier="pro", cost=2)).from_memory
    clock.now_ms += 299
    assert (await reserve(limiter, tier="pro", cost=2)).from_memory
    clock.now_ms += 1
    assert (await reserve(limiter, tier="pro", cost=2)).allowed


async def give_credits(limiter: CreditLimiter) -> None:
    row = await limiter.row("i")
    assert row
    await limiter.put_row(replace(row, lifetime_consumed=0, lifetime_gemini_consumed=0), mode="replace")


CHANGES: dict[str, Callable[[CreditLimiter], Awaitable[object]]] = {
    "commit": lambda limiter: limiter.commit("i", "held"),
    "release": lambda limiter: limiter.release("i", "held"),
    "reserve": lambda limiter: reserve(limiter, tier="pro"),
    "debit": lambda limiter: limiter.debit("i", tier="pro", has_hardware=True),
    "put_row": give_credits,
}


@pytest.mark.parametrize("change", CHANGES)
async def test_install_when_changed_through_this_node_then_redis_is_called_again(
    limiter: CreditLimiter, change: str
) -> None:
    await reserve(limiter, tier="big", hold_id="held")
    await use_up(limiter)
    assert (await reserve(limiter)).from_memory
    await CHANGES[change](limiter)
    again = await reserve(limiter)
    assert (again.from_memory, again.allowed) == (False, change == "put_row")


async def test_rows_when_changed_past_the_limiter_and_that_is_announced_then_redis_is_called_again(
    limiter: CreditLimiter,
) -> None:
    await use_up(limiter)
    limiter.session.announce_bulk_change()
    assert not (await reserve(limiter)).from_memory


async def test_hold_when_it_is_live_already_then_it_is_replayed_though_no_credits_are_left(
    limiter: CreditLimiter,
) -> None:
    assert (await reserve(limiter, hold_id="h")).allowed
    row = await limiter.row("i")
    assert row
    await limiter.put_row(replace(row, lifetime_consumed=3), mode="replace")
    assert (await reserve(limiter)).reason is Reason.OUT_OF_CREDITS
    assert (await reserve(limiter, hold_id="h")).status is DecisionStatus.REPLAY


async def test_other_refusals_when_given_then_they_are_not_remembered(limiter: CreditLimiter) -> None:
    assert (await reserve(limiter, cost=3, hold_id="h")).allowed
    for _ in range(2):
        refused = await reserve(limiter)
        assert (refused.reason, refused.from_memory) == (Reason.CREDITS_IN_FLIGHT, False)


async def test_memory_when_it_is_off_then_redis_is_always_called(
    proxy: Proxy, clock: Clock, closing: AsyncExitStack
) -> None:
    client = await connect(proxy.url)
    closing.push_async_callback(client.aclose)
    limiter = CreditLimiter(client, TIERS, clock=clock)
    await use_up(limiter)
    proxy.commands.clear()
    assert not (await reserve(limiter)).from_memory
    assert calls_to(proxy) == 1


@pytest.mark.parametrize("seed", range(5))
async def test_any_sequence_when_only_this_node_changes_the_row_then_no_refusal_is_wrong_and_none_is_missing(
    limiter: CreditLimiter, clock: Clock, seed: int
) -> None:
    rng = random.Random(seed)
    remembered = 0
    for step in range(80):
        tier, cost = rng.choice(["core", "trial", "pro", "big"]), rng.randint(1, 3)
        clock.now_ms += rng.choice([0, 0, 1, 300, 900, 40_000_000])
        balance = await limiter.balance("i", tier=tier)
        assert balance.remaining is not None
        decision = await reserve(limiter, tier=tier, cost=cost, hold_id=f"h{step}")
        assert (decision.reason is Reason.OUT_OF_CREDITS) == (cost > balance.remaining)
        remembered += decision.from_memory
        if decision.allowed and rng.random() < 0.5:
            await limiter.commit("i", decision.hold_id)
        elif decision.allowed:
            await limiter.release("i", decision.hold_id)
        if rng.random() < 0.05:
            await give_credits(limiter)
    assert remembered


def refusal(now_ms: int = 0) -> Decision:
    balance = Balance("core", "lifetime", 3, 0, None, None, 0, None, None, now_ms)
    return Decision(DecisionStatus.DENIED, Reason.OUT_OF_CREDITS, None, "h", balance)


@pytest.mark.parametrize("outcome", ["a change", "another answer", "no answer"])
def test_refusal_when_the_row_was_changed_since_the_call_to_redis_then_it_is_not_cached(outcome: str) -> None:
    denials = DenialCache(KEEP_MS, None)
    before = denials.snapshot()
    if outcome == "a change":
        denials.invalidate("key")
    else:
        denials.record(
            "key", before, refusal()._replace(status=DecisionStatus.ALLOWED) if outcome == "another answer" else None
        )
    denials.record("key", before, refusal())
    assert denials.lookup("key", "core", 1, "h") is None
    denials.record("key", denials.snapshot(), refusal())
    assert denials.lookup("key", "core", 1, "h")


def test_refusals_when_they_are_many_then_the_oldest_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("limiter.credits.denial_cache._MAX_REFUSALS", 3)
    denials = DenialCache(KEEP_MS, None)
    for number in (0, 1, 2, 0, 3):
        denials.record(f"key-{number}", denials.snapshot(), refusal())
    kept = [number for number in range(4) if denials.lookup(f"key-{number}", "core", 1, "h")]
    assert kept == [0, 2, 3]
