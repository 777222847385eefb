"""The budget of what is kept: it is never exceeded, and has room again once what was counted has expired."""

import asyncio

import pytest
from redis.asyncio import Redis

from limiter import CreditLimiter
from limiter.relay.metering.claims import Claims
from tests.support.credits import Clock

KEY = "credits:kept:a"
DAY_MS = 86_400_000


@pytest.fixture
def claims(limiter: CreditLimiter) -> Claims:
    return Claims(limiter.session)


async def count(claims: Claims, size_b: int, *, budget_b: int = 100, keep_ms: int = DAY_MS) -> bool:
    return await claims.count_kept(KEY, size_b, budget_b=budget_b, keep_ms=keep_ms)


async def test_budget_when_it_has_no_room_then_nothing_is_counted_and_less_still_fits(claims: Claims) -> None:
    assert await count(claims, 90)
    assert not await count(claims, 11)
    assert await count(claims, 10)
    assert not await count(claims, 1)
    assert not await count(claims, 1, budget_b=0)


async def test_budget_when_many_count_at_once_then_it_is_not_exceeded(claims: Claims) -> None:
    counted = await asyncio.gather(*(count(claims, 7) for _ in range(50)))
    assert sum(counted) == 14


async def test_budget_when_time_passes_then_bytes_count_until_they_have_expired_and_an_eighth_longer_at_most(
    claims: Claims, clock: Clock
) -> None:
    began_ms = clock.now_ms
    assert await count(claims, 100)
    clock.now_ms = began_ms + DAY_MS
    assert not await count(claims, 100), "these may still be kept"
    clock.now_ms = began_ms + DAY_MS + DAY_MS // 8
    assert await count(claims, 100)


async def test_budget_when_bytes_are_counted_all_the_time_then_it_is_used_in_full_and_has_few_fields(
    claims: Claims, redis: Redis, clock: Clock
) -> None:
    """One byte every 15 minutes, of which 96 are kept at a time."""
    for _ in range(400):
        assert await count(claims, 1, budget_b=96 + 12)
        clock.now_ms += DAY_MS // 96
        assert await redis.hlen(KEY) <= 10
    assert not await count(claims, 13, budget_b=96 + 12)


async def test_budget_when_times_differ_then_each_byte_counts_for_its_own(
    claims: Claims, redis: Redis, clock: Clock
) -> None:
    assert await count(claims, 60, keep_ms=60_000)
    assert await count(claims, 40)
    assert await redis.pttl(KEY) > 86_000_000
    clock.now_ms += 70_000
    assert await count(claims, 60, keep_ms=60_000)
    assert not await count(claims, 1)
    assert await redis.pttl(KEY) > 86_000_000, "the earlier expiry of a part is not that of the key"
