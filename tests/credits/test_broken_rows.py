"""Rows that were broken by hand: the error names key and field, nothing changes, other installs do not notice."""

from collections.abc import Awaitable, Callable

import pytest
from redis.asyncio import Redis

from limiter import BrokenRow, CreditLimiter, PutStatus, SettlementStatus
from limiter.credits.rows import read_fields, row_or_error, scan_keys
from tests.support.credits import Clock, LimiterWith, fields_of

KEY = "credits:install:a"
INTEGER = r"an integer from 0 to 2\^53 - 1"
DAY = "an integer from 1 to 31"
TIME = "a time like 2026-05-11T23:02:57.123Z"

OPERATIONS: dict[str, Callable[[CreditLimiter], Awaitable[object]]] = {
    "reserve": lambda limiter: limiter.reserve("a", tier="pro", has_hardware=False),
    "commit": lambda limiter: limiter.commit("a", "h1"),
    "debit": lambda limiter: limiter.debit("a", tier="pro", has_hardware=False),
    "balance": lambda limiter: limiter.balance("a", tier="pro"),
    "row": lambda limiter: limiter.row("a"),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("lifetime_consumed", "many", INTEGER),
        ("lifetime_gemini_consumed", "-1", INTEGER),
        ("monthly_consumed", "1.5", INTEGER),
        ("monthly_consumed", "", INTEGER),
        ("lifetime_consumed", "", INTEGER),
        ("lifetime_gemini_consumed", "", INTEGER),
        ("monthly_gemini_consumed", "", INTEGER),
        ("monthly_gemini_consumed", "9007199254740992", INTEGER),
        ("monthly_gemini_consumed", "0x10", INTEGER),
        ("monthly_gemini_consumed", "9" * 5000, INTEGER),
        ("monthly_gemini_consumed", b"\xff\r\n\x00", INTEGER),
        ("anniversary_day", "0", DAY),
        ("anniversary_day", "32", DAY),
        ("anniversary_day", "1e1", DAY),
        ("anniversary_day", "31.0", DAY),
        ("anniversary_day", "first", DAY),
        ("last_renewal_at", "", TIME),
        ("last_renewal_at", "yesterday", TIME),
        ("last_renewal_at", "2026-02-30T00:00:00.000Z", TIME),
        ("last_renewal_at", "2026-05-11T23:02:57Z", TIME),
        # In periods that are not over, which take the short way of include/row.lua.
        ("last_renewal_at", "2026-04-31T23:30:00.000Z", TIME),
        ("last_renewal_at", "2026-05-00T12:00:00.000Z", TIME),
        ("last_renewal_at", "2026-13-11T12:00:00.000Z", TIME),
        ("last_renewal_at", "2026-05-11T24:00:00.000Z", TIME),
        ("last_renewal_at", "2026-05-11T12:60:00.000Z", TIME),
        ("last_renewal_at", "2026-05-11T12:00:60.000Z", TIME),
        ("last_renewal_at", "2027-02-29T12:00:00.000Z", TIME),
        ("last_renewal_at", "2026005-05-11T12:00:00.000Z", TIME),
        ("last_renewal_at", "02026-05-11T12:00:00.00Z", TIME),
    ],
)
async def test_field_when_it_cannot_be_read_then_each_operation_names_it_and_changes_nothing(
    redis: Redis, limiter: CreditLimiter, operation: str, field: str, value: str | bytes, wanted: str
) -> None:
    await limiter.reserve("a", tier="pro", has_hardware=False, hold_id="h1")
    await redis.hset(KEY, field, value)
    before = await redis.hgetall(KEY)
    with pytest.raises(BrokenRow, match=f"^{KEY} field {field} is '.*', want {wanted}$") as broken:
        await OPERATIONS[operation](limiter)
    assert len(str(broken.value)) < 250, "a message, not a dump"
    assert await redis.hgetall(KEY) == before


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_key_when_it_is_not_a_hash_then_each_operation_says_what_to_do(
    redis: Redis, limiter: CreditLimiter, operation: str
) -> None:
    await redis.set(KEY, "hello")
    with pytest.raises(BrokenRow, match=f"^{KEY} is not a hash: delete or rename this key$"):
        await OPERATIONS[operation](limiter)
    assert await redis.get(KEY) == b"hello"


async def test_row_when_its_period_is_missing_then_it_is_broken_and_no_new_install(
    redis: Redis, limiter: CreditLimiter
) -> None:
    await redis.hset(KEY, "note", "mine")
    with pytest.raises(BrokenRow, match=f"{KEY} field last_renewal_at is '', want {TIME}"):
        await limiter.reserve("a", tier="core", has_hardware=False)
    assert await fields_of(redis, "a") == {"note": "mine"}


async def test_counters_when_they_are_missing_then_they_count_as_0(redis: Redis, limiter: CreditLimiter) -> None:
    await redis.hset(KEY, mapping={"last_renewal_at": "2026-05-01T00:00:00.000Z", "anniversary_day": "1"})
    assert (await limiter.debit("a", tier="pro", has_hardware=False)).balance.remaining == 999
    fields = await fields_of(redis, "a")
    assert (fields["monthly_consumed"], fields["monthly_gemini_consumed"]) == ("1", "1")
    assert fields["last_renewal_at"] == "2026-05-11T23:02:57.123Z", (
        "a row without a tier was a core row: it is promoted"
    )
    assert (await limiter.balance("a", tier="core")).remaining == 50


async def test_other_installs_when_one_row_is_broken_then_they_are_served_and_listed(
    redis: Redis, limiter: CreditLimiter
) -> None:
    for install_id in ("a", "b", "c"):
        await limiter.debit(install_id, tier="core", has_hardware=False)
    await redis.hset(KEY, "lifetime_consumed", "many")
    await redis.set("credits:install:c", "no row")
    assert (await limiter.debit("b", tier="core", has_hardware=False)).allowed
    names = [name async for some in scan_keys(limiter.session) for name in some]
    answers = await read_fields(limiter.session.channel, names)
    found = [row_or_error(limiter.session.keys, name, fields) for name, fields in zip(names, answers, strict=True)]
    assert sorted(str(row) if isinstance(row, BrokenRow) else row.install_id for row in found) == [
        "b",
        f"{KEY} field lifetime_consumed is 'many', want an integer from 0 to 2^53 - 1",
        "credits:install:c is not a hash: delete or rename this key",
    ]


async def test_row_when_mended_by_a_replacement_then_it_works_again(redis: Redis, limiter: CreditLimiter) -> None:
    await limiter.debit("a", tier="core", has_hardware=False)
    good = await limiter.row("a")
    assert good
    await redis.hset(KEY, mapping={"lifetime_consumed": "many", "anniversary_day": "never"})
    with pytest.raises(BrokenRow):
        await limiter.put_row(good, mode="merge")
    assert await limiter.put_row(good, mode="replace") is PutStatus.REPLACED
    assert await limiter.row("a") == good


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "gemini pro monthly 1",
        "gemini pro monthly one 1778541177123",
        "gemini pro weekly 1 1778541177123",
        "telepathy pro monthly 1 1778541177123",
    ],
)
@pytest.mark.parametrize("operation", ["commit", "release", "reserve again", "reserve another", "balance", "row"])
async def test_hold_when_its_text_is_broken_then_each_operation_that_needs_it_fails_and_nothing_changes(
    redis: Redis, limiter: CreditLimiter, operation: str, text: str
) -> None:
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "commit": lambda: limiter.commit("a", "h1"),
        "release": lambda: limiter.release("a", "h1"),
        "reserve again": lambda: limiter.reserve("a", tier="pro", has_hardware=False, hold_id="h1"),
        "reserve another": lambda: limiter.reserve("a", tier="pro", has_hardware=False, hold_id="h2"),
        "balance": lambda: limiter.balance("a", tier="pro"),
        "row": lambda: limiter.row("a"),
    }
    await limiter.reserve("a", tier="pro", has_hardware=False, hold_id="h1")
    await redis.hset(KEY, mapping={"hold:h1": text, "held": ""})  # or those who need the sums alone would not read it
    before = await fields_of(redis, "a")
    with pytest.raises(BrokenRow, match=f"^{KEY} field hold:h1 is '{text}', want text like 'gemini pro monthly 1 "):
        await calls[operation]()
    assert await fields_of(redis, "a") == before


@pytest.mark.parametrize("text", ["", "x", "1 2 3", "-1 0 0 0 0 0 1778541177123", "1 0 0 0 9 9 nan"])
async def test_held_when_its_text_is_broken_then_the_holds_are_counted_again(
    redis: Redis, limiter_with: LimiterWith, text: str
) -> None:
    limiter = limiter_with(pro={"monthly": 5})
    await limiter.reserve("a", tier="pro", has_hardware=False, cost=3, hold_id="h1")
    await redis.hset(KEY, "held", text)
    assert (await limiter.balance("a", tier="pro")).held == 3
    assert not (await limiter.reserve("a", tier="pro", has_hardware=False, cost=3)).allowed
    assert (await limiter.reserve("a", tier="pro", has_hardware=False, cost=2, hold_id="h2")).allowed
    assert (await fields_of(redis, "a"))["held"].startswith("2 0 0 0 5 5 ")


async def test_held_when_deleted_by_hand_then_the_next_settlement_counts_the_holds_again(
    redis: Redis, limiter: CreditLimiter
) -> None:
    for number in (1, 2, 3):
        await limiter.reserve("a", tier="pro", has_hardware=False, cost=number, hold_id=f"h{number}")
    await limiter.reserve("a", tier="pro", has_hardware=True, cost=500, hold_id="on-hardware")
    await redis.hdel(KEY, "held")
    await limiter.commit("a", "h2")
    assert (await fields_of(redis, "a"))["held"].startswith("3 0 0 0 504 4 ")
    await redis.hdel(KEY, "held")
    await limiter.release("a", "h1")
    assert (await fields_of(redis, "a"))["held"].startswith("2 0 0 0 503 3 ")


async def test_clock_when_it_steps_back_then_no_sum_goes_wrong_for_long(
    redis: Redis, limiter: CreditLimiter, clock: Clock
) -> None:
    """A failover to a server whose clock is behind makes an expired hold live again."""
    await limiter.reserve("a", tier="pro", has_hardware=False, cost=2, hold_id="h1")
    clock.now_ms += limiter.hold_ms
    await limiter.reserve("a", tier="pro", has_hardware=False, cost=3, hold_id="h2")
    clock.now_ms -= 5000
    assert (await limiter.commit("a", "h1")).status is SettlementStatus.COMMITTED
    assert (await limiter.balance("a", tier="pro")).held == 3
    assert (await limiter.commit("a", "h2")).status is SettlementStatus.COMMITTED
    fields = await fields_of(redis, "a")
    assert (fields["monthly_consumed"], "held" in fields) == ("5", False)
