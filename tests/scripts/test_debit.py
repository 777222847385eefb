"""debit: plan and debit in one step, for callers with nothing to wait for."""

import pytest
from redis.asyncio import Redis

from limiter import CreditLimiter, DecisionStatus, Reason
from tests.support.credits import Clock, LimiterWith, fields_of


async def test_debit_when_allowed_then_the_credits_are_gone_at_once_and_nothing_is_held(
    redis: Redis, limiter: CreditLimiter
) -> None:
    decision = await limiter.debit("a", tier="pro", has_hardware=False, cost=3)
    assert (decision.status, decision.allowed, decision.backend) == (DecisionStatus.COMMITTED, True, "gemini")
    assert (decision.balance.remaining, decision.balance.gemini_remaining, decision.balance.held) == (997, 397, 0)
    assert await fields_of(redis, "a") == {
        "tier_snapshot": "pro",
        "lifetime_consumed": "0",
        "lifetime_gemini_consumed": "0",
        "monthly_consumed": "3",
        "monthly_gemini_consumed": "3",
        "last_renewal_at": "2026-05-11T23:02:57.123Z",
        "last_active_at": "2026-05-11T23:02:57.123Z",
        "anniversary_day": "11",
    }


async def test_debit_when_repeated_then_it_debits_again(limiter: CreditLimiter) -> None:
    for _ in range(2):
        decision = await limiter.debit("a", tier="core", has_hardware=False)
    assert decision.balance.remaining == 48


async def test_debit_when_the_quota_is_spent_then_it_is_denied_and_writes_nothing(
    redis: Redis, limiter_with: LimiterWith, clock: Clock
) -> None:
    limiter = limiter_with(core={"lifetime": 2})
    await limiter.debit("a", tier="core", has_hardware=False, cost=2)
    before = await fields_of(redis, "a")
    clock.now_ms += 1
    denied = await limiter.debit("a", tier="core", has_hardware=True)
    assert (denied.status, denied.reason, denied.balance.remaining) == (DecisionStatus.DENIED, Reason.OUT_OF_CREDITS, 0)
    assert await fields_of(redis, "a") == before


async def test_debit_when_holds_cover_what_is_left_then_it_is_denied_for_now(limiter_with: LimiterWith) -> None:
    limiter = limiter_with(core={"lifetime": 2})
    await limiter.reserve("a", tier="core", has_hardware=False, cost=2, hold_id="h1")
    assert (await limiter.debit("a", tier="core", has_hardware=False)).reason is Reason.CREDITS_IN_FLIGHT
    await limiter.release("a", "h1")
    assert (await limiter.debit("a", tier="core", has_hardware=False)).allowed


async def test_debit_when_the_gemini_cap_is_spent_then_hardware_serves_or_the_request_is_denied(
    limiter_with: LimiterWith,
) -> None:
    limiter = limiter_with(pro={"monthly": 5, "gemini_cap": 1})
    assert (await limiter.debit("a", tier="pro", has_hardware=True)).backend == "gemini"
    assert (await limiter.debit("a", tier="pro", has_hardware=False)).reason is Reason.GEMINI_CAP
    hardware = await limiter.debit("a", tier="pro", has_hardware=True)
    assert (hardware.backend, hardware.balance.remaining, hardware.balance.gemini_remaining) == ("hardware", 3, 0)


async def test_debit_when_as_many_are_in_flight_as_the_tier_allows_then_it_passes_for_it_flies_not(
    limiter_with: LimiterWith,
) -> None:
    limiter = limiter_with(pro={"monthly": 5, "max_in_flight": 1})
    await limiter.reserve("a", tier="pro", has_hardware=False)
    assert (await limiter.debit("a", tier="pro", has_hardware=False)).allowed


async def test_debit_when_the_install_is_unknown_and_may_not_be_created_then_it_says_so_and_creates_nothing(
    redis: Redis, limiter: CreditLimiter
) -> None:
    decision = await limiter.debit("a", tier="pro", has_hardware=False, may_create=False)
    assert decision.status is DecisionStatus.UNKNOWN_INSTALL
    assert not decision.allowed
    assert await redis.dbsize() == 0


async def test_debit_when_a_core_row_first_pays_then_its_answer_has_the_new_period(
    limiter: CreditLimiter, clock: Clock
) -> None:
    await limiter.debit("a", tier="core", has_hardware=False)
    clock.now_ms += 6 * 24 * 60 * 60 * 1000
    balance = (await limiter.debit("a", tier="pro", has_hardware=False)).balance
    assert (balance.began_at, balance.renews_at) == ("2026-05-17T23:02:57.123Z", "2026-06-17T23:02:57.000Z")


async def test_debit_when_a_core_row_had_gemini_credits_of_this_month_then_its_period_goes_on(
    redis: Redis, limiter: CreditLimiter, clock: Clock
) -> None:
    """No script writes such a row, but people edit them: each of the two counters says that the month was used."""
    await limiter.debit("a", tier="core", has_hardware=False)
    await redis.hset("credits:install:a", "monthly_gemini_consumed", "2")
    clock.now_ms += 24 * 60 * 60 * 1000
    await limiter.debit("a", tier="pro", has_hardware=False)
    fields = await fields_of(redis, "a")
    assert (fields["last_renewal_at"], fields["monthly_gemini_consumed"]) == ("2026-05-11T23:02:57.123Z", "3")


@pytest.mark.parametrize("snapshot", ["cor", "ore", "c.re", "co-re", "pro,core", "%l"])
async def test_debit_when_the_last_tier_is_only_like_a_lifetime_one_then_its_period_goes_on(
    redis: Redis, limiter: CreditLimiter, clock: Clock, snapshot: str
) -> None:
    await limiter.debit("a", tier="core", has_hardware=False)
    await redis.hset("credits:install:a", "tier_snapshot", snapshot)
    clock.now_ms += 24 * 60 * 60 * 1000
    await limiter.debit("a", tier="pro", has_hardware=False)
    assert (await fields_of(redis, "a"))["last_renewal_at"] == "2026-05-11T23:02:57.123Z"


async def test_debit_when_the_tier_drops_to_core_then_what_was_left_of_the_lifetime_quota_is_spent(
    limiter_with: LimiterWith,
) -> None:
    limiter = limiter_with(core={"lifetime": 3}, pro={"monthly": 5})
    await limiter.debit("a", tier="core", has_hardware=False, cost=2)
    await limiter.debit("a", tier="pro", has_hardware=False, cost=4)
    assert (await limiter.debit("a", tier="core", has_hardware=False)).balance.remaining == 0
    assert (await limiter.debit("a", tier="core", has_hardware=False)).reason is Reason.OUT_OF_CREDITS


async def test_debit_when_the_quota_is_edited_then_it_applies_from_the_next_decision_and_touches_no_row(
    redis: Redis, limiter_with: LimiterWith
) -> None:
    await limiter_with(pro={"monthly": 5}).debit("a", tier="pro", has_hardware=False, cost=4)
    before = await fields_of(redis, "a")
    assert not (await limiter_with(pro={"monthly": 3}).debit("a", tier="pro", has_hardware=False)).allowed
    assert await fields_of(redis, "a") == before
    assert (await limiter_with(pro={"monthly": 9}).debit("a", tier="pro", has_hardware=False)).balance.remaining == 4


async def test_debit_when_the_install_id_is_a_uuid_then_its_case_does_not_make_another_row(
    redis: Redis, limiter: CreditLimiter
) -> None:
    for install_id in ("6F9619FF-8B86-D011-B42D-00C04FC964FF", "6f9619ff-8b86-d011-b42d-00c04fc964ff"):
        await limiter.debit(install_id, tier="core", has_hardware=False)
    assert await redis.keys() == [b"credits:install:6f9619ff-8b86-d011-b42d-00c04fc964ff"]


async def test_debit_when_gemini_cannot_serve_then_hardware_is_debited_and_the_cap_is_not_touched(
    limiter_with: LimiterWith,
) -> None:
    limiter = limiter_with(pro={"monthly": 3, "gemini_cap": 1})
    decision = await limiter.debit("a", tier="pro", has_hardware=True, has_gemini=False, cost=2)
    assert (decision.backend, decision.balance.remaining, decision.balance.gemini_remaining) == ("hardware", 1, 1)
    refused = await limiter.debit("a", tier="pro", has_hardware=True, has_gemini=False, cost=2)
    assert refused.reason is Reason.OUT_OF_CREDITS
    assert (await limiter.debit("a", tier="pro", has_hardware=True)).backend == "gemini"
