"""The deliberate differences from credits.js: the tests of those that are the core's, and a test for each in the docs.

The table is in docs/explanation/credits-and-periods.md.
"""

import asyncio

import pytest
from redis.asyncio import Redis

from limiter import CreditLimiter, UnknownTier
from tests.support.credits import Clock, LimiterWith, fields_of
from tests.support.paths import ROOT

DAY_MS = 24 * 60 * 60 * 1000
HERE = "credits/test_differences_from_credits_js.py"
# Each line of the table, by how it begins, with the test that holds it.
HELD_BY = {
    "plans now and debits later": f"{HERE}::test_requests_when_many_come_at_once_on_one_credit_then_one_passes",
    "each return from core to pro": f"{HERE}::test_tier_when_dropped_to_core_and_back_then_the_month_is_not_new",
    "an unknown tier": f"{HERE}::test_tier_when_unknown_then_it_is_an_error_and_no_request_passes",
    "an unreadable `credits.json`": (
        "backup/test_import.py::test_import_when_the_file_is_unreadable_then_it_refuses_says_where_and_changes_nothing"
    ),
    "infers a missing `anniversary_day`": (
        f"{HERE}::test_row_when_it_has_no_anniversary_day_then_the_first_decision_stores_it_for_good"
    ),
    "reading a balance": (
        f"{HERE}::test_balance_when_the_install_is_unknown_then_it_is_a_new_ones_and_no_row_comes_of_it"
    ),
    "temporary file, rename": (
        "ledger/test_writer.py::test_write_when_it_publishes_then_file_and_folder_are_synced_around_the_rename"
    ),
}


def test_table_when_read_then_each_line_has_its_test() -> None:
    page = (ROOT / "docs/explanation/credits-and-periods.md").read_text(encoding="utf-8")
    lines = page.split("\n| credits.js |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    assert [beginning for line in lines for beginning in HELD_BY if line.startswith(f"| {beginning}")] == [*HELD_BY]
    assert len(lines) == len(HELD_BY)
    for held_by in HELD_BY.values():
        path, _, name = held_by.partition("::")
        assert f"def {name}(" in (ROOT / "tests" / path).read_text(encoding="utf-8"), held_by


async def test_requests_when_many_come_at_once_on_one_credit_then_one_passes(limiter_with: LimiterWith) -> None:
    """The old ledger plans now and debits later: all would pass."""
    limiter = limiter_with(core={"lifetime": 1})
    decisions = await asyncio.gather(*(limiter.reserve("a", tier="core", has_hardware=False) for _ in range(50)))
    assert sum(decision.allowed for decision in decisions) == 1


async def test_tier_when_dropped_to_core_and_back_then_the_month_is_not_new(
    redis: Redis, limiter_with: LimiterWith, clock: Clock
) -> None:
    """The old ledger resets the monthly counter each time: a core credit would buy a new month."""
    limiter = limiter_with(pro={"monthly": 3})
    await limiter.debit("a", tier="pro", has_hardware=False, cost=2)
    for tier in ("core", "pro", "core"):
        clock.now_ms += DAY_MS
        assert (await limiter.debit("a", tier=tier, has_hardware=False)).allowed
        assert (await fields_of(redis, "a"))["last_renewal_at"] == "2026-05-11T23:02:57.123Z"
    assert not (await limiter.debit("a", tier="pro", has_hardware=False)).allowed


async def test_tier_when_back_from_core_with_nothing_used_this_period_then_the_period_has_a_new_anchor(
    redis: Redis, limiter: CreditLimiter, clock: Clock
) -> None:
    """An install that pays again after a pause renews on the day of paying, as the first time."""
    await limiter.debit("a", tier="pro", has_hardware=False)
    clock.now_ms += 40 * DAY_MS
    await limiter.debit("a", tier="core", has_hardware=False)
    clock.now_ms += DAY_MS
    await limiter.debit("a", tier="pro", has_hardware=False)
    fields = await fields_of(redis, "a")
    assert (fields["last_renewal_at"], fields["anniversary_day"]) == ("2026-06-21T23:02:57.123Z", "21")
    assert fields["monthly_consumed"] == "1"


@pytest.mark.parametrize("tier", ["platinum", "CORE", ""])
async def test_tier_when_unknown_then_it_is_an_error_and_no_request_passes(
    redis: Redis, limiter: CreditLimiter, tier: str
) -> None:
    """The old ledger plans it as core and debits it as paid: endless credits."""
    for refused in (
        limiter.reserve("a", tier=tier, has_hardware=True),
        limiter.debit("a", tier=tier, has_hardware=True),
        limiter.balance("a", tier=tier),
    ):
        with pytest.raises(UnknownTier):
            await refused
    assert await redis.dbsize() == 0


async def test_row_when_it_has_no_anniversary_day_then_the_first_decision_stores_it_for_good(
    redis: Redis, limiter: CreditLimiter, clock: Clock
) -> None:
    """The old ledger infers it at each roll-over: the 31st becomes the 28th, and stays so."""
    clock.now_ms = 1_769_857_200_000  # 2026-01-31T11:00:00Z
    await limiter.debit("a", tier="pro", has_hardware=False)
    await redis.hdel("credits:install:a", "anniversary_day")
    await limiter.reserve("a", tier="pro", has_hardware=False)
    assert (await fields_of(redis, "a"))["anniversary_day"] == "31"
    clock.now_ms += 28 * DAY_MS
    await limiter.debit("a", tier="pro", has_hardware=False)
    assert (await fields_of(redis, "a"))["last_renewal_at"] == "2026-02-28T11:00:00.000Z"
    assert (await limiter.balance("a", tier="pro")).renews_at == "2026-03-31T11:00:00.000Z"


async def test_balance_when_the_install_is_unknown_then_it_is_a_new_ones_and_no_row_comes_of_it(
    redis: Redis, limiter: CreditLimiter
) -> None:
    """The old ledger creates the row."""
    assert (await limiter.balance("a", tier="core")).remaining == 50
    assert await limiter.row("a") is None
    assert await redis.dbsize() == 0
