"""Claim, record, drop: of all attempts one has the key, and only that one records its outcome."""

import pytest
from redis.asyncio import Redis

from limiter import CreditLimiter
from limiter.relay.metering.claims import Claimed, Claims, ClaimStatus
from tests.support.credits import Clock, fields_of, text_of

KEY = "credits:claim:a:k"
NOTHING = b""


@pytest.fixture
def claims(limiter: CreditLimiter) -> Claims:
    return Claims(limiter.session)


async def claim(
    claims: Claims, owner: str, fingerprint: str = "f", *, attempt: int | None = None, missed_ms: int | None = None
) -> Claimed:
    return await claims.claim(KEY, owner, fingerprint, claim_ms=60_000, attempt=attempt, missed_ms=missed_ms)


async def fields(redis: Redis) -> dict[str, str]:
    return {text_of(name): text_of(value) for name, value in (await redis.hgetall(KEY)).items()}


async def test_claim_when_the_key_is_free_then_it_is_held_for_its_time(
    claims: Claims, redis: Redis, clock: Clock
) -> None:
    assert await claim(claims, "one") == Claimed(ClaimStatus.CLAIMED, NOTHING)
    assert await fields(redis) == {
        "owner": "one",
        "fingerprint": "f",
        "begun_ms": str(clock.now_ms),
        "busy_until_ms": str(clock.now_ms + 60_000),
        "answer": "",
        "attempt": "",
        "taker": "",
        "replays_ms": "",
    }
    assert 50_000 < await redis.pttl(KEY) <= 60_000


async def test_claim_when_repeated_after_a_lost_reply_then_it_is_claimed_again(claims: Claims) -> None:
    await claim(claims, "one")
    assert (await claim(claims, "one")).status is ClaimStatus.CLAIMED


async def test_claim_when_another_runs_then_running_or_busy_and_nothing_changes(claims: Claims, redis: Redis) -> None:
    await claim(claims, "one")
    before = await fields(redis)
    assert (await claim(claims, "two")).status is ClaimStatus.RUNNING
    assert (await claim(claims, "two", "another request")).status is ClaimStatus.BUSY
    assert await fields(redis) == before


async def test_claim_when_an_answer_was_kept_then_it_is_given_byte_for_byte(claims: Claims) -> None:
    answer = bytes(range(256)) * 100
    await claim(claims, "one")
    assert await claims.keep(KEY, "one", "f", keep_ms=1000, answer=answer) is ClaimStatus.KEPT
    assert await claim(claims, "two") == Claimed(ClaimStatus.KEPT, answer)
    assert (await claim(claims, "two", "another request")).status is ClaimStatus.REUSED


async def test_claim_when_a_stream_began_then_running_and_when_its_node_died_spent(
    claims: Claims, redis: Redis, clock: Clock
) -> None:
    await claim(claims, "one")
    await claims.record(KEY, "one", "f", keep_ms=90_000, busy_ms=5000)
    assert 80_000 < await redis.pttl(KEY) <= 90_000
    assert (await claim(claims, "two")).status is ClaimStatus.RUNNING
    clock.now_ms += 5000
    assert (await claim(claims, "two")).status is ClaimStatus.SPENT


async def test_claim_when_it_is_a_first_attempt_then_the_one_before_can_neither_keep_nor_drop(
    claims: Claims, redis: Redis
) -> None:
    await claim(claims, "one")
    assert (await claim(claims, "two", attempt=0)).status is ClaimStatus.CLAIMED
    before = await fields(redis)
    assert await claims.keep(KEY, "one", "f", keep_ms=1000, answer=b"x") is ClaimStatus.LOST
    assert await claims.drop(KEY, "one") is ClaimStatus.GONE
    assert await fields(redis) == before
    assert before["owner"] == "two"


async def served(claims: Claims, owner: str, attempt: int) -> None:
    """Let an attempt be served, and leave its name as its answer."""
    assert (await claim(claims, owner, attempt=attempt)).status is ClaimStatus.CLAIMED
    assert await claims.keep(KEY, owner, "f", keep_ms=60_000, answer=owner.encode()) is ClaimStatus.KEPT


async def test_claim_when_attempts_are_counted_then_each_number_gets_the_answer_once(claims: Claims) -> None:
    """A0 is served and its answer lost, as is that of A1; then B1 arrives, whose first attempt was never seen."""
    await served(claims, "A0", 0)
    assert await claim(claims, "A1", attempt=1) == Claimed(ClaimStatus.KEPT, b"A0")
    assert await claim(claims, "A2", attempt=2) == Claimed(ClaimStatus.KEPT, b"A0")
    await served(claims, "B1", 1)
    await served(claims, "C1", 1)
    assert await claim(claims, "C2", attempt=2) == Claimed(ClaimStatus.KEPT, b"C1")
    await served(claims, "D2", 2)


async def test_claim_when_its_reply_was_lost_then_the_same_attempt_gets_the_answer_again(claims: Claims) -> None:
    await served(claims, "A0", 0)
    for _ in range(3):
        assert await claim(claims, "A1", attempt=1) == Claimed(ClaimStatus.KEPT, b"A0")


async def test_claim_when_the_attempt_before_runs_then_asking_does_not_use_the_answer_up(claims: Claims) -> None:
    await claim(claims, "A0", attempt=0)
    for _ in range(3):
        assert (await claim(claims, "A1", attempt=1)).status is ClaimStatus.RUNNING
    await claims.keep(KEY, "A0", "f", keep_ms=60_000, answer=b"A0")
    assert await claim(claims, "A1", attempt=1) == Claimed(ClaimStatus.KEPT, b"A0")


async def test_claim_when_the_first_attempt_was_missed_then_what_began_before_is_not_its_own(
    claims: Claims, clock: Clock
) -> None:
    await served(claims, "A0", 0)
    clock.now_ms += 500  # here B0 is refused
    clock.now_ms += 500
    assert (await claim(claims, "B1", attempt=1, missed_ms=500)).status is ClaimStatus.CLAIMED
    await claims.keep(KEY, "B1", "f", keep_ms=60_000, answer=b"B1")
    clock.now_ms += 500
    assert await claim(claims, "B2", attempt=2, missed_ms=1000) == Claimed(ClaimStatus.KEPT, b"B1")


async def test_claim_when_a_key_names_the_request_then_every_repeat_gets_the_answer(claims: Claims) -> None:
    await claim(claims, "one")
    await claims.keep(KEY, "one", "f", keep_ms=60_000, answer=b"x")
    for owner in ("two", "three", "four"):
        assert await claim(claims, owner) == Claimed(ClaimStatus.KEPT, b"x")


async def test_claim_when_the_answer_was_returned_five_times_in_a_minute_then_it_is_limited_to_one_in_twelve_seconds(
    claims: Claims, clock: Clock
) -> None:
    await claim(claims, "one")
    await claims.keep(KEY, "one", "f", keep_ms=600_000, answer=b"x")
    for number in range(5):
        clock.now_ms += 100
        assert (await claim(claims, f"repeat {number}")).status is ClaimStatus.KEPT
    for _ in range(2):
        assert await claim(claims, "one more") == Claimed(ClaimStatus.LIMITED, NOTHING, 11_600)
    assert (await claim(claims, "one more", "another request")).status is ClaimStatus.REUSED
    clock.now_ms += 11_600
    assert (await claim(claims, "one more")).status is ClaimStatus.KEPT
    assert (await claim(claims, "and another")).status is ClaimStatus.LIMITED
    clock.now_ms += 60_000
    assert [(await claim(claims, "later")).status for _ in range(6)] == [ClaimStatus.KEPT] * 5 + [ClaimStatus.LIMITED]


async def test_claim_when_attempts_are_counted_then_the_limit_takes_no_number_and_a_new_request_has_its_own(
    claims: Claims, clock: Clock
) -> None:
    await served(claims, "A0", 0)
    for number in range(1, 6):
        assert (await claim(claims, f"A{number}", attempt=number)).status is ClaimStatus.KEPT
    assert (await claim(claims, "A6", attempt=6)).status is ClaimStatus.LIMITED
    clock.now_ms += 12_000
    assert await claim(claims, "A6", attempt=6) == Claimed(ClaimStatus.KEPT, b"A0")
    await served(claims, "B0", 0)
    assert await claim(claims, "B1", attempt=1) == Claimed(ClaimStatus.KEPT, b"B0")


async def test_claim_when_only_the_mark_was_kept_then_asking_is_not_limited(claims: Claims) -> None:
    await claim(claims, "one")
    await claims.record(KEY, "one", "f", keep_ms=60_000)
    assert {(await claim(claims, "two")).status for _ in range(10)} == {ClaimStatus.SPENT}


async def test_record_when_the_claim_has_expired_then_it_is_stored_all_the_same(claims: Claims, redis: Redis) -> None:
    assert await claims.keep(KEY, "one", "f", keep_ms=1000, answer=b"x") is ClaimStatus.KEPT
    assert await claim(claims, "two") == Claimed(ClaimStatus.KEPT, b"x")
    assert 0 < await redis.pttl(KEY) <= 1000


async def test_keep_when_the_note_of_a_stream_comes_after_its_end_then_the_end_stands(claims: Claims) -> None:
    await claim(claims, "one")
    await claims.keep(KEY, "one", "f", keep_ms=1000, answer=b"x")
    await claims.record(KEY, "one", "f", keep_ms=90_000, busy_ms=60_000)
    assert await claims.drop(KEY, "one") is ClaimStatus.KEPT
    assert await claim(claims, "two") == Claimed(ClaimStatus.KEPT, b"x")


async def test_drop_when_repeated_then_it_leaves_the_next_claim_alone(claims: Claims, redis: Redis) -> None:
    await claim(claims, "one")
    assert await claims.drop(KEY, "one") is ClaimStatus.DROPPED
    await claim(claims, "two")
    assert await claims.drop(KEY, "one") is ClaimStatus.GONE
    assert (await fields(redis))["owner"] == "two"


async def test_claims_when_made_then_no_row_is_touched(claims: Claims, redis: Redis) -> None:
    await claim(claims, "one")
    await claims.record(KEY, "one", "f", keep_ms=1000)
    assert await redis.keys("*") == [KEY.encode()]
    assert await fields_of(redis, "a") == {}
