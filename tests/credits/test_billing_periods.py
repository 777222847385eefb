"""Billing periods: the anniversary day in months of every length, over any time asleep, to the millisecond."""

from datetime import UTC, datetime, timedelta

import pytest
from redis.asyncio import Redis

from limiter import CreditLimiter, Row
from limiter._util.timestamps import iso_from_ms, ms_from_iso
from limiter.redis.lua_source import compose
from tests.support.credits import Clock, fields_of
from tests.support.paths import LUA
from tests.support.reference_model import epoch_ms, iso, next_renewal


async def stored_on(limiter: CreditLimiter, clock: Clock, began: str, day: int, now: str) -> tuple[str, int, int]:
    """Let a row of the period `began`, with 5 credits used, be decided on at `now`; return its period, day and use."""
    row = Row("a", "pro", 0, 0, began, day, 5, 5, began)
    await limiter.put_row(row, mode="replace")
    clock.now_ms = ms_from_iso(now)
    decision = await limiter.reserve("a", tier="pro", has_hardware=False)
    await limiter.release("a", decision.hold_id)
    after = await limiter.row("a")
    assert after
    return after.last_renewal_at, after.anniversary_day, after.monthly_consumed


@pytest.mark.parametrize(
    ("began", "now", "period"),
    [
        ("2026-01-31T10:00:00.500Z", "2026-02-28T09:59:59.999Z", "2026-01-31T10:00:00.500Z"),
        ("2026-01-31T10:00:00.500Z", "2026-02-28T10:00:00.000Z", "2026-02-28T10:00:00.000Z"),
        ("2024-01-31T10:00:00.500Z", "2024-02-29T10:00:00.000Z", "2024-02-29T10:00:00.000Z"),
        ("2026-02-28T10:00:00.000Z", "2026-03-30T23:00:00.000Z", "2026-02-28T10:00:00.000Z"),
        ("2026-02-28T10:00:00.000Z", "2026-03-31T10:00:00.000Z", "2026-03-31T10:00:00.000Z"),
        ("2026-03-31T10:00:00.000Z", "2026-04-30T10:00:00.000Z", "2026-04-30T10:00:00.000Z"),
        ("2026-12-31T10:00:00.000Z", "2027-01-31T10:00:00.000Z", "2027-01-31T10:00:00.000Z"),
    ],
)
async def test_anniversary_31_when_months_are_short_then_it_clamps_and_comes_back(
    limiter: CreditLimiter, clock: Clock, began: str, now: str, period: str
) -> None:
    consumed = 5 if period == began else 0
    assert await stored_on(limiter, clock, began, 31, now) == (period, 31, consumed)


async def test_row_when_it_slept_for_thirty_years_then_one_step_finds_the_running_period(
    limiter: CreditLimiter, clock: Clock
) -> None:
    period = await stored_on(limiter, clock, "1996-02-29T12:00:00.999Z", 29, "2026-03-01T00:00:00.000Z")
    assert period == ("2026-02-28T12:00:00.000Z", 29, 0)


async def test_period_when_it_begins_in_the_future_then_it_stays_until_its_renewal(
    limiter: CreditLimiter, clock: Clock
) -> None:
    """A clock was wrong once, or a credits.json was edited; the old ledger waits too."""
    period = await stored_on(limiter, clock, "2030-01-17T00:00:00.000Z", 17, "2026-05-11T00:00:00.000Z")
    assert period == ("2030-01-17T00:00:00.000Z", 17, 5)
    assert (await limiter.balance("a", tier="pro")).renews_at == "2030-02-17T00:00:00.000Z"


async def test_anniversary_day_when_missing_then_it_is_inferred_once_and_survives_short_months(
    redis: Redis, limiter: CreditLimiter, clock: Clock
) -> None:
    await redis.hset(
        "credits:install:a",
        items=["last_renewal_at", "2026-01-31T10:00:00.000Z", "tier_snapshot", "pro", "monthly_consumed", "9"],
    )
    for now, period in [
        ("2026-02-28T12:00:00.000Z", "2026-02-28T10:00:00.000Z"),
        ("2026-03-31T12:00:00.000Z", "2026-03-31T10:00:00.000Z"),
    ]:
        clock.now_ms = ms_from_iso(now)
        await limiter.debit("a", tier="pro", has_hardware=False)
        fields = await fields_of(redis, "a")
        assert (fields["last_renewal_at"], fields["anniversary_day"]) == (period, "31")


@pytest.mark.slow
async def test_calendar_when_computed_for_every_day_of_two_centuries_then_it_agrees_with_pythons(redis: Redis) -> None:
    """Through the scripts' own calendar, over leap years, century years and 2000, on several anniversary days."""

    def include(name: str) -> str:
        return (LUA / "include" / f"{name}.lua").read_text()

    probe = (
        "#!lua\n" + include("calendar") + "local answer = {}\n"
        "for i, ms in ipairs(ARGV) do\n"
        "  local now_ms = tonumber(ms)\n" + include("now_iso") + "  local month, of_month, ms_of_day = civil(now_iso)\n"
        "  local next_ms, next_day = renewal_ms(month + 1, 28 + i % 4, ms_of_day)\n"
        "  answer[i] = string.format('%s %.0f %d %d', now_iso, next_ms, next_day, of_month)\n"
        "end\n"
        "return answer"
    )
    start = datetime(1940, 1, 1, 13, 5, 9, 123000, tzinfo=UTC)
    days = [start + timedelta(days=number) for number in range(200 * 365 + 49)]
    for first in range(0, len(days), 5000):
        batch = days[first : first + 5000]
        answers = await redis.eval(probe, 0, *(str(epoch_ms(day)) for day in batch))
        for number, (day, answer) in enumerate(zip(batch, answers, strict=True), start=1):
            renewal = next_renewal(day, 28 + number % 4)
            assert answer.decode() == f"{iso(day)} {epoch_ms(renewal)} {renewal.day} {day.day}"


@pytest.mark.slow
async def test_renewal_when_computed_for_every_day_of_a_century_then_it_agrees_with_pythons(
    redis: Redis, limiter: CreditLimiter
) -> None:
    """Through the short way that include/row.lua has for the days that every month has, and the long one for others."""
    moments = [
        datetime(1999, 12, 27, 23, 59, 58, 999000, tzinfo=UTC) + timedelta(days=n) for n in range(102 * 365 + 30)
    ]
    script = compose("balance")
    await redis.script_load(script.text)
    for first in range(0, len(moments), 2000):
        pipeline = redis.pipeline(transaction=False)
        for number, began in enumerate(moments[first : first + 2000]):
            fields = ["last_renewal_at", iso(began), "anniversary_day", str(1 + number % 31)]
            for counter in ("lifetime", "monthly"):
                fields += [f"{counter}_consumed", "0", f"{counter}_gemini_consumed", "0"]
            pipeline.hset(limiter.session.keys.install("a"), items=fields)
            pipeline.evalsha(script.sha, 1, limiter.session.keys.install("a"), "monthly", "9", "", str(epoch_ms(began)))
        answers = (await pipeline.execute())[1::2]
        for number, (began, answer) in enumerate(zip(moments[first : first + 2000], answers, strict=True)):
            assert answer[6:8] == [epoch_ms(next_renewal(began, 1 + number % 31)), iso(began).encode()]


@pytest.mark.parametrize(
    "text",
    ["1970-01-01T00:00:00.000Z", "0999-12-31T23:59:59.999Z", "2024-02-29T12:30:00.007Z", "9999-12-31T00:00:00.000Z"],
)
def test_time_when_read_and_printed_then_it_is_the_same_text(text: str) -> None:
    assert iso_from_ms(ms_from_iso(text)) == text


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("2026-05-11T23:02:57Z", "2026-05-11T23:02:57.000Z"),
        ("2026-05-11T23:02:57.123456Z", "2026-05-11T23:02:57.123Z"),
        ("2026-05-12T01:02:57.123+02:00", "2026-05-11T23:02:57.123Z"),
        ("2026-05-11", "2026-05-11T00:00:00.000Z"),
    ],
)
def test_time_when_written_in_another_form_then_it_is_read_as_the_same_moment(text: str, canonical: str) -> None:
    assert iso_from_ms(ms_from_iso(text)) == canonical
