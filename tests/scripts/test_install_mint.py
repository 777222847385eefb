"""install_mint.lua: never more new installs than the limit lets through."""

import asyncio
import random

import pytest
from redis.asyncio import Redis

from limiter import CreditLimiter
from limiter.credits.keys import Keys
from limiter.relay.metering.install_rate_limit import InstallRateLimit, Mint, MintStatus
from tests.support.credits import Clock

HOUR_MS = 3_600_000


@pytest.fixture
def new_installs(limiter: CreditLimiter) -> InstallRateLimit:
    return InstallRateLimit(limiter.session)


async def mint(new_installs: InstallRateLimit, limit: int, network: str | None = None) -> Mint:
    return await new_installs.mint(network, limit=limit, period_ms=HOUR_MS)


@pytest.mark.parametrize("limit", [1, 3, 7, 20, 5400, 10_000])
async def test_mint_when_a_whole_period_comes_at_once_then_exactly_the_limit(
    new_installs: InstallRateLimit, limit: int
) -> None:
    taken = min(limit, 40)
    for _ in range(taken):
        assert (await mint(new_installs, limit)).status is MintStatus.MINTED
    if taken < limit:  # the rest at once, as if it had been counted one by one
        each_us = HOUR_MS * 1000 // limit
        await new_installs._session.redis.incrby(Keys().mint(None), each_us * (limit - taken))
    assert (await mint(new_installs, limit)).status is MintStatus.LIMITED


async def test_mint_when_limited_then_the_next_comes_exactly_after_the_wait(
    new_installs: InstallRateLimit, clock: Clock
) -> None:
    for _ in range(3):
        await mint(new_installs, 3)
    limited = await mint(new_installs, 3)
    assert limited == Mint(MintStatus.LIMITED, HOUR_MS // 3)
    clock.now_ms += limited.wait_ms - 1
    assert await mint(new_installs, 3) == Mint(MintStatus.LIMITED, 1)
    clock.now_ms += 1
    assert await mint(new_installs, 3) == Mint(MintStatus.MINTED, 0)


async def test_mint_when_limited_then_nothing_is_counted(new_installs: InstallRateLimit, redis: Redis) -> None:
    await mint(new_installs, 1)
    before = await redis.get(Keys().mint(None))
    for _ in range(5):
        assert (await mint(new_installs, 1)).status is MintStatus.LIMITED
    assert await redis.get(Keys().mint(None)) == before


async def test_mint_when_given_back_then_another_comes_and_the_last_leaves_no_key(
    new_installs: InstallRateLimit, redis: Redis
) -> None:
    for _ in range(2):
        await mint(new_installs, 2)
    assert (await new_installs.return_mint(None, limit=2, period_ms=HOUR_MS)).status is MintStatus.RETURNED
    assert (await mint(new_installs, 2)).status is MintStatus.MINTED
    assert (await mint(new_installs, 2)).status is MintStatus.LIMITED
    for _ in range(3):  # once more than was counted
        await new_installs.return_mint(None, limit=2, period_ms=HOUR_MS)
    assert await redis.keys("*") == []


async def test_mints_when_of_two_networks_then_they_do_not_touch_and_live_a_period_at_most(
    new_installs: InstallRateLimit, redis: Redis
) -> None:
    for network in ("203.0.113.9", "2001:db8:0:100::/56"):
        assert (await mint(new_installs, 1, network)).status is MintStatus.MINTED
        assert 0 < await redis.pttl(Keys().mint(network)) <= HOUR_MS


async def test_mints_when_they_come_at_random_for_days_then_never_over_the_rate(
    new_installs: InstallRateLimit, clock: Clock
) -> None:
    """Within any hour at most the limit at once and the limit again as it comes back; over days, the rate."""
    chance, limit, minted = random.Random(3), 5, []
    began_ms = clock.now_ms
    for _ in range(600):
        clock.now_ms += int(chance.expovariate(1) * HOUR_MS / 10)
        if (await mint(new_installs, limit)).status is MintStatus.MINTED:
            minted.append(clock.now_ms)
    hours = (clock.now_ms - began_ms) / HOUR_MS
    assert hours > 24
    assert limit * hours * 0.8 < len(minted) <= limit * (hours + 1)
    for now_ms in minted:
        assert sum(now_ms - HOUR_MS < other_ms <= now_ms for other_ms in minted) <= 2 * limit


async def test_mints_when_fifty_race_for_three_then_exactly_three(new_installs: InstallRateLimit) -> None:
    answers = await asyncio.gather(*(mint(new_installs, 3) for _ in range(50)))
    assert [answer.status for answer in answers].count(MintStatus.MINTED) == 3
