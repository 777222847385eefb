"""balance: what the presented tier has left, as if the row were rolled over now. It writes nothing."""

import pytest
from redis.asyncio import Redis

from limiter import Balance, CreditLimiter, UnknownTier
from limiter.redis.lua_source import compose
from tests.support.credits import Clock, LimiterWith, fields_of


async def test_balance_when_the_tier_is_a_lifetime_one_then_it_has_no_renewal(
    limiter: CreditLimiter, clock: Clock
) -> None:
    await limiter.debit("a", tier="core", has_hardware=False, cost=4)
    assert await limiter.balance("a", tier="core") == Balance(
        tier="core",
        capped="lifetime",
        quota=50,
        remaining=46,
        gemini_cap=20,
        gemini_remaining=16,
        held=0,
        began_at=None,
        renews_ms=None,
        now_ms=clock.now_ms,
    )


async def test_balance_when_the_tier_is_a_monthly_one_then_it_has_its_renewal(
    limiter: CreditLimiter, clock: Clock
) -> None:
    await limiter.debit("a", tier="pro", has_hardware=False)
    clock.now_ms = 1_781_218_976_001  # 0.999 s before the renewal
    balance = await limiter.balance("a", tier="pro")
    assert (balance.renews_at, balance.renews_in_s) == ("2026-06-11T23:02:57.000Z", 1)


async def test_balance_when_the_tier_is_unlimited_then_only_the_cap_has_a_number(limiter: CreditLimiter) -> None:
    await limiter.debit("a", tier="max", has_hardware=False, cost=5)
    balance = await limiter.balance("a", tier="max")
    assert (balance.capped, balance.quota, balance.remaining, balance.gemini_remaining) == (
        "monthly",
        None,
        None,
        1995,
    )


async def test_balance_when_there_is_no_cap_then_none_is_left_of_it(limiter_with: LimiterWith) -> None:
    balance = await limiter_with(pro={"monthly": 5}).balance("a", tier="pro")
    assert (balance.remaining, balance.gemini_cap, balance.gemini_remaining) == (5, None, None)


async def test_balance_when_another_tier_is_presented_than_last_time_then_its_own_counters_count(
    limiter: CreditLimiter,
) -> None:
    await limiter.debit("a", tier="core", has_hardware=False, cost=4)
    await limiter.debit("a", tier="pro", has_hardware=False, cost=7)
    assert (await limiter.balance("a", tier="core")).remaining == 46
    assert (await limiter.balance("a", tier="pro")).remaining == 993


async def test_balance_when_the_period_is_over_then_it_has_the_new_one_and_stores_nothing(
    redis: Redis, limiter: CreditLimiter, clock: Clock
) -> None:
    await limiter.debit("a", tier="pro", has_hardware=False, cost=7)
    before = await fields_of(redis, "a")
    clock.now_ms = 1_781_218_977_000
    balance = await limiter.balance("a", tier="pro")
    assert (balance.remaining, balance.began_at) == (1000, "2026-06-11T23:02:57.000Z")
    assert await fields_of(redis, "a") == before


async def test_balance_when_holds_are_live_then_held_is_what_they_cover_of_this_tiers_counter(
    limiter: CreditLimiter, clock: Clock
) -> None:
    await limiter.reserve("a", tier="pro", has_hardware=False, cost=2)
    clock.now_ms += 1
    await limiter.reserve("a", tier="max", has_hardware=False, cost=3)
    await limiter.reserve("a", tier="core", has_hardware=False, cost=4)
    assert (await limiter.balance("a", tier="pro")).held == 5
    assert (await limiter.balance("a", tier="core")).held == 4
    clock.now_ms += limiter.hold_ms - 1
    assert (await limiter.balance("a", tier="pro")).held == 3


async def test_balance_when_more_was_consumed_than_the_quota_now_allows_then_nothing_is_left(
    limiter: CreditLimiter, limiter_with: LimiterWith
) -> None:
    await limiter.debit("a", tier="core", has_hardware=False, cost=9)
    balance = await limiter_with(core={"lifetime": 5, "gemini_cap": 0}).balance("a", tier="core")
    assert (balance.remaining, balance.gemini_remaining) == (0, 0)


async def test_balance_when_there_is_no_row_then_the_script_says_so(redis: Redis, limiter: CreditLimiter) -> None:
    """Callers in Python need only the numbers; a reader of the raw reply also sees of which tier they are."""
    script, key = compose("balance").text, limiter.session.keys.install("a")
    assert (await redis.eval(script, 1, key, "monthly", "9", "", ""))[:3] == [b"UNKNOWN_INSTALL", b"", b""]
    await limiter.debit("a", tier="core", has_hardware=False)
    assert (await redis.eval(script, 1, key, "monthly", "9", "", ""))[:3] == [b"KNOWN", b"", b""]


async def test_balance_when_the_tier_is_unknown_then_it_is_an_error(limiter: CreditLimiter) -> None:
    with pytest.raises(UnknownTier):
        await limiter.balance("a", tier="Pro")


async def test_balance_when_the_server_is_read_only_then_it_answers_all_the_same(
    redis: Redis, limiter: CreditLimiter
) -> None:
    """The script declares that it writes nothing, so that it may run where a debit may not."""
    await redis.config_set("min-replicas-to-write", "1")
    try:
        assert (await limiter.balance("a", tier="core")).remaining == 50
    finally:
        await redis.config_set("min-replicas-to-write", "0")
