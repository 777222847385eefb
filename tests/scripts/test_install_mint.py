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
    return await new_installs.mint({network: limit}, period_ms=HOUR_MS)


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
    assert limited == Mint(MintStatus.LIMITED, HOUR_MS // 3, 1)
    clock.now_ms += limited.wait_ms - 1
    assert await mint(new_installs, 3) == Mint(MintStatus.LIMITED, 1, 1)
    clock.now_ms += 1
    assert await mint(new_installs, 3) == Mint(MintStatus.MINTED, 0, 0)


async def test_mint_when_limited_then_nothing_is_counted(new_installs: InstallRateLimit, redis: Redis) -> None:
    await mint(new_installs, 1)
    before = await redis.get(Keys().mint(None))
    for _ in range(5):
        assert (await mint(new_installs, 1)).status is MintStatus.LIMITED
    assert await redis.get(Keys().mint(None)) == before


async def test_mint_when_one_limit_refuses_then_none_counts_and_the_longest_wait_is_told(
    new_installs: InstallRateLimit, redis: Redis
) -> None:
    limits: dict[str | None, int] = {"203.0.113.9": 1, "203.0.113.0/24": 5, None: 1000}
    assert (await new_installs.mint(limits)).status is MintStatus.MINTED
    before = [await redis.get(Keys().mint(network)) for network in limits]
    assert await new_installs.mint(limits) == Mint(MintStatus.LIMITED, HOUR_MS, 1)
    assert [await redis.get(Keys().mint(network)) for network in limits] == before
    for number in range(4):
        assert (await new_installs.mint({f"203.0.113.{number}": 1, "203.0.113.0/24": 5})).status is MintStatus.MINTED
    assert await new_installs.mint({"203.0.113.8": 1, "203.0.113.0/24": 5}) == Mint(MintStatus.LIMITED, HOUR_MS // 5, 2)


async def minted(new_installs: InstallRateLimit, network: str, tries: int, *, overall: int) -> int:
    """How many of so many new installs of a network are let through; its own limit is out of reach.

    The clock stands still, the time to live of a key does not: with 400 an hour, a count is kept for nine seconds.
    """
    answers = [(await new_installs.mint({network: 400, None: overall})).status for _ in range(tries)]
    return answers.count(MintStatus.MINTED)


async def test_overall_when_few_networks_take_what_they_can_then_half_is_left_and_shared(
    new_installs: InstallRateLimit,
) -> None:
    assert await minted(new_installs, "2001:db8::/32", 300, overall=200) == 100
    assert await minted(new_installs, "2001:db9::/32", 300, overall=200) == 10  # a tenth of what is free
    for number in range(20):
        assert await minted(new_installs, f"2001:{number:x}::/32", 300, overall=200) >= 1
    assert await minted(new_installs, "198.51.100.0/24", 1, overall=200) == 1  # there is always some for a newcomer


async def test_overall_when_a_network_has_used_its_share_then_the_next_comes_exactly_after_the_wait(
    new_installs: InstallRateLimit, clock: Clock
) -> None:
    limits: dict[str | None, int] = {"2001:db8::/32": 1000, None: 40}
    while (limited := await new_installs.mint(limits)).status is MintStatus.MINTED:
        pass
    assert (limited.place, 0 < limited.wait_ms <= HOUR_MS // 40) == (2, True)
    clock.now_ms += limited.wait_ms - 1
    assert (await new_installs.mint(limits)).status is MintStatus.LIMITED
    clock.now_ms += 1
    assert (await new_installs.mint(limits)).status is MintStatus.MINTED


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
