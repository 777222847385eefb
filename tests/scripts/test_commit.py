"""commit: turn a hold into a debit of what was really used."""

import pytest
from redis.asyncio import Redis

from limiter import CreditLimiter, Execution, LimiterUnavailable, Settlement, SettlementStatus
from limiter.credits.models import MAX_COUNT
from tests.support.credits import Clock, LimiterWith, fields_of

HOUR_MS = 60 * 60 * 1000


async def test_commit_when_a_hold_is_live_then_it_becomes_a_debit_and_the_row_is_active_now(
    redis: Redis, limiter: CreditLimiter, clock: Clock
) -> None:
    await limiter.reserve("a", tier="core", has_hardware=False, cost=2, hold_id="h1")
    clock.now_ms += 5000
    assert await limiter.commit("a", "h1") == Settlement(SettlementStatus.COMMITTED, "core", "gemini", 2)
    assert await fields_of(redis, "a") == {
        "tier_snapshot": "core",
        "lifetime_consumed": "2",
        "lifetime_gemini_consumed": "2",
        "monthly_consumed": "0",
        "monthly_gemini_consumed": "0",
        "last_renewal_at": "2026-05-11T23:02:57.123Z",
        "last_active_at": "2026-05-11T23:03:02.123Z",
        "anniversary_day": "11",
    }


async def test_commit_when_repeated_then_the_second_finds_no_hold_and_debits_nothing(
    redis: Redis, limiter: CreditLimiter, clock: Clock
) -> None:
    await limiter.reserve("a", tier="pro", has_hardware=False, hold_id="h1")
    await limiter.commit("a", "h1")
    before = await fields_of(redis, "a")
    clock.now_ms += 1
    assert await limiter.commit("a", "h1") == Settlement(SettlementStatus.GONE)
    assert await fields_of(redis, "a") == before


async def test_commit_when_the_hold_was_released_then_it_is_gone(limiter: CreditLimiter) -> None:
    await limiter.reserve("a", tier="pro", has_hardware=False, hold_id="h1")
    await limiter.release("a", "h1")
    assert (await limiter.commit("a", "h1")).status is SettlementStatus.GONE


async def test_commit_when_the_install_is_unknown_then_it_is_gone_and_creates_nothing(
    redis: Redis, limiter: CreditLimiter
) -> None:
    assert (await limiter.commit("a", "h1")).status is SettlementStatus.GONE
    assert await redis.dbsize() == 0


async def test_commit_when_the_request_fell_back_to_hardware_then_hardware_is_debited(
    redis: Redis, limiter: CreditLimiter
) -> None:
    await limiter.reserve("a", tier="pro", has_hardware=True, cost=3, hold_id="h1")
    assert await limiter.commit("a", "h1", backend="hardware") == Settlement(
        SettlementStatus.COMMITTED, "pro", "hardware", 3
    )
    fields = await fields_of(redis, "a")
    assert (fields["monthly_consumed"], fields["monthly_gemini_consumed"]) == ("3", "0")


async def test_commit_when_another_cost_is_given_then_that_is_debited_even_beyond_the_quota(
    limiter_with: LimiterWith,
) -> None:
    """What was delivered is debited; what remains is never reported below 0."""
    limiter = limiter_with(core={"lifetime": 5, "gemini_cap": 5})
    await limiter.reserve("a", tier="core", has_hardware=False, hold_id="h1")
    assert (await limiter.commit("a", "h1", cost=9)).cost == 9
    balance = await limiter.balance("a", tier="core")
    assert (balance.remaining, balance.gemini_remaining, balance.held) == (0, 0, 0)


async def test_commit_when_the_hold_has_just_expired_then_it_is_late_and_debited_all_the_same(
    redis: Redis, limiter: CreditLimiter, clock: Clock
) -> None:
    await limiter.reserve("a", tier="pro", has_hardware=False, hold_id="h1")
    clock.now_ms += limiter.hold_ms
    assert await limiter.commit("a", "h1") == Settlement(SettlementStatus.LATE, "pro", "gemini", 1)
    assert (await fields_of(redis, "a"))["monthly_consumed"] == "1"
    assert (await limiter.commit("a", "h1")).status is SettlementStatus.GONE


async def test_commit_when_the_grace_is_over_and_the_hold_was_dropped_then_it_is_gone(
    redis: Redis, limiter: CreditLimiter, clock: Clock
) -> None:
    await limiter.reserve("a", tier="pro", has_hardware=False, hold_id="h1")
    clock.now_ms += limiter.hold_ms + HOUR_MS
    await limiter.reserve("a", tier="pro", has_hardware=False, hold_id="h2")
    assert (await limiter.commit("a", "h1")).status is SettlementStatus.GONE
    assert (await fields_of(redis, "a"))["monthly_consumed"] == "0"


async def test_commit_when_the_period_ended_since_the_reserve_then_the_new_period_pays(
    redis: Redis, limiter: CreditLimiter, clock: Clock
) -> None:
    await limiter.debit("a", tier="pro", has_hardware=False, cost=7)
    clock.now_ms = 1_781_218_976_999  # a millisecond before 2026-06-11T23:02:57Z
    await limiter.reserve("a", tier="pro", has_hardware=False, hold_id="h1")
    clock.now_ms += 1
    await limiter.commit("a", "h1")
    fields = await fields_of(redis, "a")
    assert (fields["last_renewal_at"], fields["monthly_consumed"]) == ("2026-06-11T23:02:57.000Z", "1")


async def test_commit_when_a_core_row_first_pays_then_its_period_begins_now(
    redis: Redis, limiter: CreditLimiter, clock: Clock
) -> None:
    await limiter.debit("a", tier="core", has_hardware=False)
    clock.now_ms += 6 * 24 * HOUR_MS
    await limiter.reserve("a", tier="pro", has_hardware=False, hold_id="h1")
    assert (await fields_of(redis, "a"))["last_renewal_at"] == "2026-05-11T23:02:57.123Z", (
        "a hold does not change the tier"
    )
    clock.now_ms += 1000
    await limiter.commit("a", "h1")
    fields = await fields_of(redis, "a")
    assert fields["tier_snapshot"] == "pro"
    assert (fields["last_renewal_at"], fields["anniversary_day"]) == ("2026-05-17T23:02:58.123Z", "17")
    assert (fields["lifetime_consumed"], fields["monthly_consumed"]) == ("1", "1")


@pytest.mark.parametrize(("first", "then"), [("pro", "max"), ("max", "pro")])
async def test_commit_when_the_tier_moves_between_paid_ones_then_period_and_counters_stay(
    redis: Redis, limiter: CreditLimiter, clock: Clock, first: str, then: str
) -> None:
    await limiter.debit("a", tier=first, has_hardware=False, cost=3)
    clock.now_ms += 24 * HOUR_MS
    await limiter.reserve("a", tier=then, has_hardware=False, hold_id="h1")
    await limiter.commit("a", "h1")
    fields = await fields_of(redis, "a")
    assert (fields["tier_snapshot"], fields["monthly_consumed"]) == (then, "4")
    assert fields["last_renewal_at"] == "2026-05-11T23:02:57.123Z"


async def test_commit_when_the_tier_left_the_settings_meanwhile_then_it_is_debited_as_it_was_held(
    redis: Redis, limiter: CreditLimiter, limiter_with: LimiterWith
) -> None:
    await limiter.reserve("a", tier="pro", has_hardware=False, hold_id="h1")
    assert (await limiter_with().commit("a", "h1")).tier == "pro"
    assert (await fields_of(redis, "a"))["monthly_consumed"] == "1"


async def test_commit_when_other_holds_are_live_then_they_stay_held(limiter: CreditLimiter) -> None:
    for number, tier in enumerate(["core", "pro", "pro"]):
        await limiter.reserve("a", tier=tier, has_hardware=False, cost=number + 1, hold_id=f"h{number}")
    await limiter.commit("a", "h1")
    assert (await limiter.balance("a", tier="core")).held == 1
    assert (await limiter.balance("a", tier="pro")).held == 3


async def test_commit_when_a_counter_is_near_its_end_then_it_is_exact_and_stops_there(
    redis: Redis, limiter_with: LimiterWith
) -> None:
    """Lua prints 14 digits of a number by itself."""
    limiter = limiter_with(max={"monthly": None})
    await limiter.debit("a", tier="max", has_hardware=False)
    for start, end in [
        (99_999_999, 100_000_000),
        (99_999_999_999_999, 100_000_000_000_000),
        (MAX_COUNT - 2, MAX_COUNT - 1),
        (MAX_COUNT - 1, MAX_COUNT),
        (MAX_COUNT, MAX_COUNT),
    ]:
        fields = ["monthly_consumed", str(start), "monthly_gemini_consumed", str(start)]
        await redis.hset("credits:install:a", items=fields)
        await limiter.reserve("a", tier="max", has_hardware=False, hold_id="h1")
        await limiter.commit("a", "h1")
        after = await fields_of(redis, "a")
        assert (after["monthly_consumed"], after["monthly_gemini_consumed"]) == (str(end), str(end))


@pytest.mark.parametrize("backend", ["", "GEMINI", "telepathy"])
async def test_commit_when_the_backend_is_unknown_then_it_is_an_error(limiter: CreditLimiter, backend: str) -> None:
    with pytest.raises(ValueError, match="want 'gemini' or 'hardware'"):
        await limiter.commit("a", "h1", backend=backend)  # type: ignore[arg-type]  # what an untyped caller may send


async def test_commit_when_the_server_is_out_of_memory_then_it_is_taken_and_only_new_holds_are_not(
    redis: Redis, limiter: CreditLimiter
) -> None:
    """What was delivered is settled in any case."""
    impatient = CreditLimiter(redis, limiter.tiers, deadline_ms=1000)  # and yet time for an answer on a busy machine
    await limiter.reserve("a", tier="pro", has_hardware=False, hold_id="h1")
    await limiter.reserve("a", tier="pro", has_hardware=False, hold_id="h2")
    await redis.config_set("maxmemory", "1")
    try:
        with pytest.raises(LimiterUnavailable) as refused:
            await impatient.reserve("a", tier="pro", has_hardware=False)
        assert refused.value.execution is Execution.NOT_EXECUTED
        assert (await limiter.commit("a", "h1")).status is SettlementStatus.COMMITTED
        assert await limiter.release("a", "h2") is SettlementStatus.RELEASED
    finally:
        await redis.config_set("maxmemory", "0")
