"""seat.lua: never more seats than there are."""

import asyncio
import time

import pytest
from redis.asyncio import Redis

from limiter import CreditLimiter
from limiter.credits.keys import Keys
from limiter.relay.metering.claims import Seat, SeatStatus, Stores
from tests.support.credits import Clock

SUBJECT = "alice@example.org"
SEATS_KEY = Keys().seats(SUBJECT)
DAY_S = 86_400
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
