"""licence_seat.lua: never more seats than there are."""

import asyncio
import time

import pytest
from redis.asyncio import Redis

from limiter import CreditLimiter
from limiter.credits.keys import Keys
from limiter.licences.seats import Seat, Seats, SeatStatus
from tests.support.credits import Clock

SUBJECT = "alice@example.org"
SEATS_KEY = Keys().seats(SUBJECT)
DAY_S = 86_400
SEATED, FULL = SeatStatus.SEATED, SeatStatus.FULL


@pytest.fixture
def seats(limiter: CreditLimiter) -> Seats:
    return Seats(limiter.session)


async def seat(seats: Seats, install_id: str, number: int = 2, *, days: int = 31) -> SeatStatus:
    return await seats.take(SUBJECT, install_id, seats=number, expires_s=int(time.time()) + days * DAY_S)


async def seated(seats: Seats) -> list[str]:
    return sorted(seat.install_id for seat in await seats.list(SUBJECT))


async def test_seats_when_all_are_taken_then_full_and_installs_with_a_seat_keep_it(seats: Seats) -> None:
    assert [await seat(seats, name) for name in "abcabc"] == [SEATED, SEATED, FULL, SEATED, SEATED, FULL]
    assert await seated(seats) == ["a", "b"]


async def test_seats_when_listed_then_with_their_times_the_last_used_first(seats: Seats, clock: Clock) -> None:
    began_ms = clock.now_ms
    for name in "aba":
        await seat(seats, name)
        clock.now_ms += 1000
    assert await seats.list(SUBJECT) == [
        Seat("a", began_ms, began_ms + 2000),
        Seat("b", began_ms + 1000, began_ms + 1000),
    ]
    assert await seats.list("somebody else") == []


async def test_seat_when_freed_then_another_takes_it(seats: Seats) -> None:
    for name in "ab":
        await seat(seats, name)
    assert await seats.free(SUBJECT, "a")
    assert not await seats.free(SUBJECT, "a")
    assert await seat(seats, "c") is SEATED
    assert await seat(seats, "a") is FULL


async def test_seats_when_the_next_licence_has_fewer_then_the_first_installs_keep_theirs(
    seats: Seats, clock: Clock
) -> None:
    for name in "cabd":
        await seat(seats, name, 4)
        clock.now_ms += 1
    assert [await seat(seats, name, 2) for name in "abcd"] == [SEATED, FULL, SEATED, FULL]
    assert [await seat(seats, name, 4) for name in "abcd"] == [SEATED] * 4


async def test_seats_when_there_are_fewer_and_all_came_at_once_then_exactly_so_many_stay(seats: Seats) -> None:
    for name in "dacb":
        await seat(seats, name, 4)
    assert [await seat(seats, name, 3) for name in "abcd"] == [SEATED, SEATED, SEATED, FULL]


async def test_seats_when_a_licence_is_renewed_then_they_live_a_month_longer_than_the_longest(
    seats: Seats, redis: Redis
) -> None:
    for days, lives in ((31, 61), (365, 395), (31, 395)):
        await seat(seats, "a", days=days)
        assert (lives - 1) * DAY_S < await redis.ttl(SEATS_KEY) <= lives * DAY_S


async def test_seats_when_a_licence_never_ends_then_they_have_a_ttl_all_the_same(seats: Seats, redis: Redis) -> None:
    assert await seats.take(SUBJECT, "a", seats=10**30, expires_s=10**30) is SEATED
    assert await redis.ttl(SEATS_KEY) > 0


async def test_seats_when_fifty_installs_race_for_three_then_exactly_three(seats: Seats) -> None:
    answers = await asyncio.gather(*(seat(seats, f"install-{number}", 3) for number in range(50)))
    assert answers.count(SEATED) == 3
    assert len(await seated(seats)) == 3
