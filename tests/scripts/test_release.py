"""release: end a hold without a debit."""

import pytest
from redis.asyncio import Redis

from limiter import CreditLimiter, SettlementStatus
from tests.support.credits import Clock, LimiterWith, fields_of

HOUR_MS = 60 * 60 * 1000


async def test_release_when_a_hold_is_live_then_the_row_is_as_before_it(redis: Redis, limiter: CreditLimiter) -> None:
    await limiter.debit("a", tier="pro", has_hardware=False)
    before = await fields_of(redis, "a")
    await limiter.reserve("a", tier="core", has_hardware=False, cost=4, hold_id="h1")
    assert await limiter.release("a", "h1") is SettlementStatus.RELEASED
    assert await fields_of(redis, "a") == before


async def test_release_when_repeated_then_it_is_gone_and_nothing_changes(redis: Redis, limiter: CreditLimiter) -> None:
    await limiter.reserve("a", tier="pro", has_hardware=False, hold_id="h1")
    await limiter.reserve("a", tier="pro", has_hardware=False, hold_id="h2")
    await limiter.release("a", "h1")
    before = await fields_of(redis, "a")
    assert await limiter.release("a", "h1") is SettlementStatus.GONE
    assert await fields_of(redis, "a") == before


async def test_release_when_committed_before_then_it_is_gone_and_the_debit_stands(
    redis: Redis, limiter: CreditLimiter
) -> None:
    await limiter.reserve("a", tier="pro", has_hardware=False, hold_id="h1")
    await limiter.commit("a", "h1")
    assert await limiter.release("a", "h1") is SettlementStatus.GONE
    assert (await fields_of(redis, "a"))["monthly_consumed"] == "1"


async def test_release_when_the_install_is_unknown_then_it_is_gone_and_creates_nothing(
    redis: Redis, limiter: CreditLimiter
) -> None:
    assert await limiter.release("a", "h1") is SettlementStatus.GONE
    assert await redis.dbsize() == 0


async def test_release_when_the_hold_had_expired_then_it_is_released_and_frees_nothing_twice(
    limiter_with: LimiterWith, clock: Clock
) -> None:
    limiter = limiter_with(core={"lifetime": 2})
    await limiter.reserve("a", tier="core", has_hardware=False, hold_id="h1")
    clock.now_ms += limiter.hold_ms
    await limiter.reserve("a", tier="core", has_hardware=False, hold_id="h2")
    assert await limiter.release("a", "h1") is SettlementStatus.RELEASED
    assert (await limiter.balance("a", tier="core")).held == 1


async def test_release_when_others_died_long_ago_then_it_drops_them_too(
    redis: Redis, limiter: CreditLimiter, clock: Clock
) -> None:
    await limiter.reserve("a", tier="pro", has_hardware=False, hold_id="dead")
    clock.now_ms += limiter.hold_ms + HOUR_MS
    await limiter.reserve("a", tier="pro", has_hardware=False, hold_id="h1")
    await limiter.release("a", "h1")
    assert not [name for name in await fields_of(redis, "a") if name.startswith("h")]


@pytest.mark.parametrize("settle", ["commit", "release"])
async def test_hold_when_settled_late_after_another_died_then_the_dead_one_goes_with_it(
    redis: Redis, limiter: CreditLimiter, clock: Clock, settle: str
) -> None:
    await limiter.reserve("a", tier="pro", has_hardware=False, hold_id="dead")
    clock.now_ms += 5000
    await limiter.reserve("a", tier="pro", has_hardware=False, hold_id="h1")
    clock.now_ms += limiter.hold_ms + HOUR_MS - 5000
    await (limiter.commit if settle == "commit" else limiter.release)("a", "h1")
    assert not [name for name in await fields_of(redis, "a") if name.startswith("h")]


async def test_release_when_a_period_ended_meanwhile_then_the_row_is_left_to_the_next_decision(
    redis: Redis, limiter: CreditLimiter, clock: Clock
) -> None:
    await limiter.debit("a", tier="pro", has_hardware=False)
    before = await fields_of(redis, "a")
    await limiter.reserve("a", tier="pro", has_hardware=False, hold_id="h1")
    clock.now_ms += 40 * 24 * HOUR_MS
    await limiter.release("a", "h1")
    assert await fields_of(redis, "a") == before
