"""seat.lua and mint.lua: never more seats than there are, never more new installs than the limit lets through."""

import asyncio
import random
import time

import pytest
from redis.asyncio import Redis

from limiter import CreditLimiter
from limiter.credits.keys import Keys
from limiter.relay.metering.claims import Mint, MintStatus, Seat, SeatStatus, Stores
from tests.support.credits import Clock

SUBJECT = "alice@example.org"
SEATS_KEY = Keys().seats(SUBJECT)
HOUR_MS, DAY_S = 3_600_000, 86_400
SEATED, FULL = SeatStatus.SEATED, SeatStatus.FULL


@pytest.fixture
def stores(limiter: CreditLimiter) -> Stores:
    return Stores(limiter)


async def seat(stores: Stores, install_id: str, seats: int = 2, *, days: int = 31) -> SeatStatus:
    return await stores.seat(SUBJECT, install_id, seats=seats, expires_s=int(time.time()) + days * DAY_S)


async def seated(stores: Stores) -> list[str]:
    return sorted(seat.install_id for seat in await stores.seats(SUBJECT))


async def test_seats_when_all_are_taken_then_full_and_those_who_have_one_go_on(stores: Stores) -> None:
    assert [await seat(stores, name) for name in "abcabc"] == [SEATED, SEATED, FULL, SEATED, SEATED, FULL]
    assert await seated(stores) == ["a", "b"]


async def test_seats_when_listed_then_with_their_times_the_last_used_first(stores: Stores, clock: Clock) -> None:
    began_ms = clock.now_ms
    for name in "aba":
        await seat(stores, name)
        clock.now_ms += 1000
    assert await stores.seats(SUBJECT) == [
        Seat("a", began_ms, began_ms + 2000),
        Seat("b", began_ms + 1000, began_ms + 1000),
    ]
    assert await stores.seats("somebody else") == []


async def test_seat_when_freed_then_another_takes_it(stores: Stores) -> None:
    for name in "ab":
        await seat(stores, name)
    assert await stores.free(SUBJECT, "a")
    assert not await stores.free(SUBJECT, "a")
    assert await seat(stores, "c") is SEATED
    assert await seat(stores, "a") is FULL


async def test_seats_when_the_next_licence_has_fewer_then_those_who_came_first_keep_theirs(
    stores: Stores, clock: Clock
) -> None:
    for name in "cabd":
        await seat(stores, name, 4)
        clock.now_ms += 1
    assert [await seat(stores, name, 2) for name in "abcd"] == [SEATED, FULL, SEATED, FULL]
    assert [await seat(stores, name, 4) for name in "abcd"] == [SEATED] * 4


async def test_seats_when_there_are_fewer_and_all_came_at_once_then_exactly_so_many_stay(stores: Stores) -> None:
    for name in "dacb":
        await seat(stores, name, 4)
    assert [await seat(stores, name, 3) for name in "abcd"] == [SEATED, SEATED, SEATED, FULL]


async def test_seats_when_a_licence_is_renewed_then_they_live_a_month_longer_than_the_longest(
    stores: Stores, redis: Redis
) -> None:
    for days, lives in ((31, 61), (365, 395), (31, 395)):
        await seat(stores, "a", days=days)
        assert (lives - 1) * DAY_S < await redis.ttl(SEATS_KEY) <= lives * DAY_S


async def test_seats_when_a_licence_never_ends_then_they_have_a_ttl_all_the_same(stores: Stores, redis: Redis) -> None:
    assert await stores.seat(SUBJECT, "a", seats=10**30, expires_s=10**30) is SEATED
    assert await redis.ttl(SEATS_KEY) > 0


async def test_seats_when_fifty_installs_race_for_three_then_exactly_three(stores: Stores) -> None:
    answers = await asyncio.gather(*(seat(stores, f"install-{number}", 3) for number in range(50)))
    assert answers.count(SEATED) == 3
    assert len(await seated(stores)) == 3


async def mint(stores: Stores, limit: int, network: str | None = None) -> Mint:
    return await stores.mint(network, limit=limit, period_ms=HOUR_MS)


@pytest.mark.parametrize("limit", [1, 3, 7, 20, 5400, 10_000])
async def test_mint_when_a_whole_period_comes_at_once_then_exactly_the_limit(stores: Stores, limit: int) -> None:
    taken = min(limit, 40)
    for _ in range(taken):
        assert (await mint(stores, limit)).status is MintStatus.MINTED
    if taken < limit:  # the rest at once, as if it had been counted one by one
        each_us = HOUR_MS * 1000 // limit
        await stores._limiter.redis.incrby(Keys().mint(None), each_us * (limit - taken))
    assert (await mint(stores, limit)).status is MintStatus.LIMITED


async def test_mint_when_limited_then_the_next_comes_exactly_after_the_wait(stores: Stores, clock: Clock) -> None:
    for _ in range(3):
        await mint(stores, 3)
    limited = await mint(stores, 3)
    assert limited == Mint(MintStatus.LIMITED, HOUR_MS // 3)
    clock.now_ms += limited.wait_ms - 1
    assert await mint(stores, 3) == Mint(MintStatus.LIMITED, 1)
    clock.now_ms += 1
    assert await mint(stores, 3) == Mint(MintStatus.MINTED, 0)


async def test_mint_when_limited_then_nothing_is_counted(stores: Stores, redis: Redis) -> None:
    await mint(stores, 1)
    before = await redis.get(Keys().mint(None))
    for _ in range(5):
        assert (await mint(stores, 1)).status is MintStatus.LIMITED
    assert await redis.get(Keys().mint(None)) == before


async def test_mint_when_given_back_then_another_comes_and_the_last_leaves_no_key(stores: Stores, redis: Redis) -> None:
    for _ in range(2):
        await mint(stores, 2)
    assert (await stores.return_mint(None, limit=2, period_ms=HOUR_MS)).status is MintStatus.RETURNED
    assert (await mint(stores, 2)).status is MintStatus.MINTED
    assert (await mint(stores, 2)).status is MintStatus.LIMITED
    for _ in range(3):  # once more than was counted
        await stores.return_mint(None, limit=2, period_ms=HOUR_MS)
    assert await redis.keys("*") == []


async def test_mints_when_of_two_networks_then_they_do_not_touch_and_live_a_period_at_most(
    stores: Stores, redis: Redis
) -> None:
    for network in ("203.0.113.9", "2001:db8:0:100::/56"):
        assert (await mint(stores, 1, network)).status is MintStatus.MINTED
        assert 0 < await redis.pttl(Keys().mint(network)) <= HOUR_MS


async def test_mints_when_they_come_at_random_for_days_then_never_over_the_rate(stores: Stores, clock: Clock) -> None:
    """Within any hour at most the limit at once and the limit again as it comes back; over days, the rate."""
    chance, limit, minted = random.Random(3), 5, []
    began_ms = clock.now_ms
    for _ in range(600):
        clock.now_ms += int(chance.expovariate(1) * HOUR_MS / 10)
        if (await mint(stores, limit)).status is MintStatus.MINTED:
            minted.append(clock.now_ms)
    hours = (clock.now_ms - began_ms) / HOUR_MS
    assert hours > 24
    assert limit * hours * 0.8 < len(minted) <= limit * (hours + 1)
    for now_ms in minted:
        assert sum(now_ms - HOUR_MS < other_ms <= now_ms for other_ms in minted) <= 2 * limit


async def test_mints_when_fifty_race_for_three_then_exactly_three(stores: Stores) -> None:
    answers = await asyncio.gather(*(mint(stores, 3) for _ in range(50)))
    assert [answer.status for answer in answers].count(MintStatus.MINTED) == 3
