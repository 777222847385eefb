"""put_row: store one row as it is given, for import, restore and admin."""

from dataclasses import replace

import pytest
from redis.asyncio import Redis

from limiter import CreditLimiter, PutStatus, Row, ScriptContractError, SettlementStatus
from limiter.credits.models import MAX_COUNT
from tests.support.credits import fields_of

ROW = Row(
    install_id="a",
    tier_snapshot="pro",
    lifetime_consumed=5,
    lifetime_gemini_consumed=2,
    last_renewal_at="2026-05-01T08:00:00.000Z",
    anniversary_day=31,
    monthly_consumed=30,
    monthly_gemini_consumed=20,
    last_active_at="2026-05-10T09:30:00.000Z",
    extra='{"note":"vip"}',
)


async def test_put_row_when_there_is_none_then_it_is_created_and_reads_back_equal(
    redis: Redis, limiter: CreditLimiter
) -> None:
    assert await limiter.put_row(ROW, mode="create") is PutStatus.CREATED
    assert await limiter.row("a") == ROW
    assert await fields_of(redis, "a") == {
        "tier_snapshot": "pro",
        "lifetime_consumed": "5",
        "lifetime_gemini_consumed": "2",
        "last_renewal_at": "2026-05-01T08:00:00.000Z",
        "anniversary_day": "31",
        "monthly_consumed": "30",
        "monthly_gemini_consumed": "20",
        "last_active_at": "2026-05-10T09:30:00.000Z",
        "extra": '{"note":"vip"}',
    }


@pytest.mark.parametrize("mode", ["create", "replace", "merge"])
async def test_put_row_when_the_row_reads_so_already_then_it_is_the_same(limiter: CreditLimiter, mode: str) -> None:
    await limiter.put_row(ROW, mode="create")
    assert await limiter.put_row(ROW, mode=mode) is PutStatus.SAME  # type: ignore[arg-type]  # one of the three


async def test_put_row_when_create_meets_another_row_then_that_is_left_alone(limiter: CreditLimiter) -> None:
    await limiter.put_row(ROW, mode="create")
    assert await limiter.put_row(replace(ROW, monthly_consumed=0), mode="create") is PutStatus.EXISTS
    assert await limiter.row("a") == ROW


async def test_put_row_when_it_replaces_then_nothing_of_the_old_row_stays_but_live_holds(
    redis: Redis, limiter: CreditLimiter
) -> None:
    await limiter.put_row(ROW, mode="create")
    await limiter.reserve("a", tier="pro", has_hardware=False, cost=3, hold_id="h1")
    new = Row("a", "core", 0, 0, "2026-05-11T00:00:00.000Z", 11, 0, 0, "2026-05-11T00:00:00.000Z")
    assert await limiter.put_row(new, mode="replace") is PutStatus.REPLACED
    assert await limiter.row("a") == new
    assert "extra" not in await fields_of(redis, "a")
    assert (await limiter.balance("a", tier="pro")).held == 3
    assert (await limiter.commit("a", "h1")).status is SettlementStatus.COMMITTED


async def test_put_row_when_it_merges_within_one_period_then_the_larger_counters_win_each(
    limiter: CreditLimiter,
) -> None:
    await limiter.put_row(ROW, mode="create")
    other = replace(
        ROW, lifetime_consumed=3, lifetime_gemini_consumed=3, monthly_consumed=31, monthly_gemini_consumed=7
    )
    assert await limiter.put_row(other, mode="merge") is PutStatus.MERGED
    merged = replace(ROW, lifetime_gemini_consumed=3, monthly_consumed=31)
    assert await limiter.row("a") == merged
    assert await limiter.put_row(replace(merged, monthly_consumed=30), mode="merge") is PutStatus.SAME
    assert await limiter.row("a") == merged


async def test_put_row_when_it_merges_a_later_period_then_that_wins_whole(limiter: CreditLimiter) -> None:
    await limiter.put_row(ROW, mode="create")
    later = replace(ROW, last_renewal_at="2026-06-01T08:00:00.000Z", anniversary_day=1, monthly_consumed=1)
    await limiter.put_row(later, mode="merge")
    assert await limiter.row("a") == later


async def test_put_row_when_it_merges_an_earlier_period_then_only_lifetime_counters_can_grow(
    limiter: CreditLimiter,
) -> None:
    await limiter.put_row(ROW, mode="create")
    earlier = replace(ROW, last_renewal_at="2026-04-01T08:00:00.000Z", lifetime_consumed=9, monthly_consumed=900)
    await limiter.put_row(earlier, mode="merge")
    assert await limiter.row("a") == replace(ROW, lifetime_consumed=9)


async def test_put_row_when_it_merges_an_inferred_anniversary_day_then_the_stored_one_stays(
    limiter: CreditLimiter,
) -> None:
    """A day inferred from a clamped date, such as the 28th, must not undo the 31st that the row knows."""
    await limiter.put_row(ROW, mode="create")
    await limiter.put_row(replace(ROW, anniversary_day=1, lifetime_consumed=6), mode="merge")
    assert await limiter.row("a") == replace(ROW, lifetime_consumed=6)


async def test_put_row_when_it_merges_then_the_tier_is_that_of_the_last_activity(limiter: CreditLimiter) -> None:
    await limiter.put_row(ROW, mode="create")
    stale = replace(ROW, tier_snapshot="core", last_active_at="2026-05-09T00:00:00.000Z")
    assert await limiter.put_row(stale, mode="merge") is PutStatus.SAME
    fresh = replace(ROW, tier_snapshot="max", last_active_at="2026-05-11T00:00:00.000Z")
    await limiter.put_row(fresh, mode="merge")
    assert await limiter.row("a") == fresh


async def test_put_row_when_it_merges_without_extra_members_then_the_stored_ones_stay(limiter: CreditLimiter) -> None:
    await limiter.put_row(ROW, mode="create")
    assert await limiter.put_row(replace(ROW, extra=""), mode="merge") is PutStatus.SAME
    await limiter.put_row(replace(ROW, extra='{"note":"new"}'), mode="merge")
    assert await limiter.row("a") == replace(ROW, extra='{"note":"new"}')


async def test_put_row_when_counters_are_as_large_as_can_be_then_they_are_kept_exactly(limiter: CreditLimiter) -> None:
    row = replace(ROW, lifetime_consumed=MAX_COUNT, monthly_consumed=MAX_COUNT - 1, monthly_gemini_consumed=10**15)
    await limiter.put_row(row, mode="create")
    await limiter.put_row(replace(row, lifetime_gemini_consumed=99_999_999_999_999), mode="merge")
    assert await limiter.row("a") == replace(row, lifetime_gemini_consumed=99_999_999_999_999)


@pytest.mark.parametrize(
    "wrong",
    [
        {"anniversary_day": 0},
        {"anniversary_day": 32},
        {"lifetime_consumed": -1},
        {"monthly_gemini_consumed": MAX_COUNT + 1},
        {"last_renewal_at": "2026-02-30T00:00:00.000Z"},
        {"last_active_at": "yesterday"},
        {"tier_snapshot": ""},
        {"tier_snapshot": "x" * 21},
    ],
)
async def test_put_row_when_a_value_could_not_be_read_back_then_it_is_refused_and_nothing_is_stored(
    redis: Redis, limiter: CreditLimiter, wrong: dict[str, str | int]
) -> None:
    with pytest.raises(ScriptContractError, match="BADARG put_row"):
        await limiter.put_row(replace(ROW, **wrong), mode="create")  # type: ignore[arg-type]  # wrong on purpose
    assert await redis.dbsize() == 0
