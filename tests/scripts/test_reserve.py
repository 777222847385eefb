"""reserve: plan a request and hold its credits. Read from top to bottom, it explains holds."""

import asyncio

import pytest
from redis.asyncio import Redis

from limiter import CreditLimiter, DecisionStatus, HeldCredits, Reason, SettlementStatus, UnknownTier
from tests.support.credits import PATIENCE_MS, Clock, LimiterWith, fields_of

HOUR_MS = 60 * 60 * 1000


async def test_reserve_when_an_install_is_new_then_its_row_is_a_core_row_of_now_whatever_tier_it_presents(
    redis: Redis, limiter: CreditLimiter
) -> None:
    decision = await limiter.reserve("new", tier="pro", has_hardware=False, cost=2, hold_id="h1")
    assert (decision.status, decision.backend, decision.reason, decision.hold_id) == (
        DecisionStatus.ALLOWED,
        "gemini",
        None,
        "h1",
    )
    assert await fields_of(redis, "new") == {
        "tier_snapshot": "core",
        "lifetime_consumed": "0",
        "lifetime_gemini_consumed": "0",
        "monthly_consumed": "0",
        "monthly_gemini_consumed": "0",
        "last_renewal_at": "2026-05-11T23:02:57.123Z",
        "last_active_at": "2026-05-11T23:02:57.123Z",
        "anniversary_day": "11",
        "hold:h1": "gemini pro monthly 2 1778541177123",
        "held": "1 0 0 0 2 2 1778541177123",
    }


async def test_reserve_when_allowed_then_the_balance_has_what_remains_and_what_is_held(
    limiter: CreditLimiter,
) -> None:
    await limiter.reserve("a", tier="pro", has_hardware=False, cost=2)
    balance = (await limiter.reserve("a", tier="pro", has_hardware=False, cost=3)).balance
    assert (balance.capped, balance.quota, balance.remaining, balance.held) == ("monthly", 1000, 1000, 5)
    assert (balance.gemini_cap, balance.gemini_remaining) == (400, 400)
    assert (balance.began_at, balance.renews_at) == ("2026-05-11T23:02:57.123Z", "2026-06-11T23:02:57.000Z")
    assert balance.period_s == 2_678_400
    assert balance.renews_in_s == 2_678_400


async def test_reserve_when_no_hold_id_is_given_then_each_request_has_its_own(limiter: CreditLimiter) -> None:
    first = await limiter.reserve("a", tier="pro", has_hardware=False)
    second = await limiter.reserve("a", tier="pro", has_hardware=False)
    assert first.hold_id != second.hold_id
    assert second.balance.held == 2


async def test_reserve_when_repeated_with_its_hold_id_then_it_is_a_replay_that_holds_nothing_more(
    redis: Redis, limiter: CreditLimiter
) -> None:
    await limiter.reserve("a", tier="pro", has_hardware=True, cost=5, hold_id="h1")
    before = await fields_of(redis, "a")
    again = await limiter.reserve("a", tier="pro", has_hardware=True, cost=5, hold_id="h1")
    assert (again.status, again.allowed, again.backend, again.balance.held) == (
        DecisionStatus.REPLAY,
        True,
        "gemini",
        5,
    )
    assert await fields_of(redis, "a") == before


async def test_reserve_when_repeated_after_the_quota_is_gone_then_it_is_still_the_same_answer(
    limiter_with: LimiterWith,
) -> None:
    await limiter_with(pro={"monthly": 1}).reserve("a", tier="pro", has_hardware=False, hold_id="h1")
    again = await limiter_with(pro={"monthly": 0}).reserve("a", tier="pro", has_hardware=False, hold_id="h1")
    assert again.status is DecisionStatus.REPLAY


async def test_reserve_when_the_quota_is_spent_then_it_is_denied_for_good_and_writes_nothing(
    redis: Redis, limiter_with: LimiterWith
) -> None:
    limiter = limiter_with(core={"lifetime": 3})
    await limiter.debit("a", tier="core", has_hardware=True, cost=3)
    before = await fields_of(redis, "a")
    decision = await limiter.reserve("a", tier="core", has_hardware=True)
    assert (decision.status, decision.reason, decision.backend) == (DecisionStatus.DENIED, Reason.OUT_OF_CREDITS, None)
    assert await fields_of(redis, "a") == before


async def test_reserve_when_it_costs_more_than_is_left_then_it_is_denied_and_a_cheaper_one_is_not(
    limiter_with: LimiterWith,
) -> None:
    limiter = limiter_with(core={"lifetime": 3})
    assert (await limiter.reserve("a", tier="core", has_hardware=True, cost=4)).reason is Reason.OUT_OF_CREDITS
    assert (await limiter.reserve("a", tier="core", has_hardware=True, cost=3)).allowed


async def test_reserve_when_live_holds_cover_what_is_left_then_it_is_denied_for_now(limiter_with: LimiterWith) -> None:
    limiter = limiter_with(core={"lifetime": 3})
    await limiter.reserve("a", tier="core", has_hardware=True, cost=2, hold_id="h1")
    denied = await limiter.reserve("a", tier="core", has_hardware=True, cost=2)
    assert (denied.reason, denied.balance.remaining, denied.balance.held) == (Reason.CREDITS_IN_FLIGHT, 3, 2)
    await limiter.release("a", "h1")
    assert (await limiter.reserve("a", tier="core", has_hardware=True, cost=2)).allowed


async def test_reserve_when_the_gemini_cap_is_spent_then_hardware_serves_or_the_request_is_denied(
    limiter_with: LimiterWith,
) -> None:
    limiter = limiter_with(pro={"monthly": 10, "gemini_cap": 2})
    await limiter.debit("a", tier="pro", has_hardware=True, cost=2)
    denied = await limiter.reserve("a", tier="pro", has_hardware=False)
    assert (denied.reason, denied.balance.gemini_remaining) == (Reason.GEMINI_CAP, 0)
    assert (await limiter.reserve("a", tier="pro", has_hardware=True)).backend == "hardware"


async def test_reserve_when_holds_cover_the_gemini_cap_then_it_waits_unless_there_is_hardware(
    limiter_with: LimiterWith,
) -> None:
    limiter = limiter_with(pro={"monthly": 10, "gemini_cap": 2})
    await limiter.reserve("a", tier="pro", has_hardware=True, cost=2)
    assert (await limiter.reserve("a", tier="pro", has_hardware=False)).reason is Reason.CREDITS_IN_FLIGHT
    assert (await limiter.reserve("a", tier="pro", has_hardware=True)).backend == "hardware"


async def test_reserve_when_a_request_does_not_fit_under_the_rest_of_the_cap_then_it_goes_to_hardware_whole(
    limiter_with: LimiterWith,
) -> None:
    limiter = limiter_with(pro={"monthly": 10, "gemini_cap": 2})
    assert (await limiter.reserve("a", tier="pro", has_hardware=True, cost=3)).backend == "hardware"
    assert (await limiter.reserve("a", tier="pro", has_hardware=True, cost=2)).backend == "gemini"


async def test_reserve_when_both_the_quota_and_the_cap_are_spent_then_the_quota_is_the_reason(
    limiter_with: LimiterWith,
) -> None:
    limiter = limiter_with(core={"lifetime": 1, "gemini_cap": 1})
    await limiter.debit("a", tier="core", has_hardware=False)
    assert (await limiter.reserve("a", tier="core", has_hardware=False)).reason is Reason.OUT_OF_CREDITS


async def test_reserve_when_as_many_are_in_flight_as_the_tier_allows_then_it_waits_for_one_to_settle(
    limiter_with: LimiterWith,
) -> None:
    limiter = limiter_with(pro={"monthly": 1000, "max_in_flight": 2})
    first, _ = [await limiter.reserve("a", tier="pro", has_hardware=False) for _ in range(2)]
    assert (await limiter.reserve("a", tier="pro", has_hardware=False)).reason is Reason.TOO_MANY_IN_FLIGHT
    await limiter.commit("a", first.hold_id)
    assert (await limiter.reserve("a", tier="pro", has_hardware=False)).allowed


async def test_reserve_when_the_one_in_flight_has_expired_then_it_does_not_wait_for_it(
    redis: Redis, limiter_with: LimiterWith, clock: Clock
) -> None:
    limiter = limiter_with(pro={"monthly": 1000, "max_in_flight": 1})
    await limiter.reserve("a", tier="pro", has_hardware=False, hold_id="h1")
    clock.now_ms += limiter.hold_ms
    assert (await limiter.reserve("a", tier="pro", has_hardware=False)).allowed
    assert (await fields_of(redis, "a"))["held"].startswith("1 1 0 0 1 1 ")


async def test_reserve_when_others_hold_under_another_tier_then_they_count_as_in_flight_but_not_against_its_quota(
    limiter_with: LimiterWith,
) -> None:
    limiter = limiter_with(core={"lifetime": 5, "max_in_flight": 2}, pro={"monthly": 5})
    await limiter.reserve("a", tier="pro", has_hardware=False, cost=5)
    assert (await limiter.reserve("a", tier="core", has_hardware=False, cost=5)).allowed
    assert (await limiter.reserve("a", tier="core", has_hardware=False)).reason is Reason.TOO_MANY_IN_FLIGHT


async def test_reserve_when_the_tier_is_unlimited_then_only_its_cap_counts(limiter: CreditLimiter) -> None:
    decision = await limiter.reserve("a", tier="max", has_hardware=False, cost=1999)
    assert (decision.balance.quota, decision.balance.remaining, decision.balance.gemini_remaining) == (None, None, 2000)
    assert (await limiter.reserve("a", tier="max", has_hardware=True, cost=1_000_000)).backend == "hardware"


async def test_reserve_when_the_install_is_unknown_and_may_not_be_created_then_it_says_so_and_creates_nothing(
    redis: Redis, limiter: CreditLimiter
) -> None:
    decision = await limiter.reserve("a", tier="core", has_hardware=False, may_create=False)
    assert (decision.status, decision.allowed, decision.balance.remaining) == (
        DecisionStatus.UNKNOWN_INSTALL,
        False,
        50,
    )
    assert await redis.dbsize() == 0


async def test_reserve_when_denied_then_a_new_row_is_stored_all_the_same(
    redis: Redis, limiter_with: LimiterWith
) -> None:
    assert not (await limiter_with(core={"lifetime": 0}).reserve("a", tier="core", has_hardware=False)).allowed
    assert (await fields_of(redis, "a"))["anniversary_day"] == "11"


async def test_hold_when_its_time_is_over_then_its_credits_are_free_again(
    redis: Redis, limiter_with: LimiterWith, clock: Clock
) -> None:
    limiter = limiter_with(core={"lifetime": 1})
    await limiter.reserve("a", tier="core", has_hardware=False, hold_id="h1")
    clock.now_ms += limiter.hold_ms - 1
    assert (await limiter.reserve("a", tier="core", has_hardware=False)).reason is Reason.CREDITS_IN_FLIGHT
    clock.now_ms += 1
    assert (await limiter.reserve("a", tier="core", has_hardware=False, hold_id="h2")).allowed
    assert "hold:h1" in await fields_of(redis, "a"), "it stays readable for the grace time"


async def test_hold_when_it_expires_before_the_one_that_expired_is_dropped_then_its_credits_are_free_in_time(
    limiter: CreditLimiter, clock: Clock
) -> None:
    for hold_id in ("h1", "h2"):
        await limiter.reserve("a", tier="pro", has_hardware=False, hold_id=hold_id)
        clock.now_ms += limiter.hold_ms
    assert (await limiter.balance("a", tier="pro")).held == 0


async def test_hold_when_its_time_and_the_grace_are_over_then_the_next_hold_drops_it(
    redis: Redis, limiter: CreditLimiter, clock: Clock
) -> None:
    await limiter.reserve("a", tier="core", has_hardware=False, hold_id="h1")
    clock.now_ms += limiter.hold_ms + HOUR_MS - 1
    await limiter.reserve("a", tier="core", has_hardware=False, hold_id="h2")
    assert "hold:h1" in await fields_of(redis, "a")
    clock.now_ms += 1
    await limiter.reserve("a", tier="core", has_hardware=False, hold_id="h3")
    fields = await fields_of(redis, "a")
    assert "hold:h1" not in fields
    assert "hold:h2" in fields


async def test_hold_when_expired_and_reserved_again_by_its_id_then_it_is_planned_again_and_live(
    limiter: CreditLimiter, clock: Clock
) -> None:
    await limiter.reserve("a", tier="core", has_hardware=False, cost=2, hold_id="h1")
    clock.now_ms += limiter.hold_ms
    again = await limiter.reserve("a", tier="pro", has_hardware=False, cost=3, hold_id="h1")
    assert (again.status, again.balance.held) == (DecisionStatus.ALLOWED, 3)
    row = await limiter.row("a")
    assert row
    expires_ms = clock.now_ms + limiter.hold_ms
    assert row.holds == (HeldCredits("h1", "gemini", "pro", "monthly", 3, expires_ms),)


async def test_holds_when_thousands_died_with_their_node_then_the_row_still_works_and_sheds_them(
    redis: Redis, limiter: CreditLimiter, clock: Clock
) -> None:
    """They are more than one HDEL of a script can name, so that each call drops a part of them."""
    await limiter.debit("a", tier="max", has_hardware=False)
    dead = [(f"hold:dead-{i}", f"gemini max monthly 1 {clock.now_ms + 1}") for i in range(9000)]
    sums = ("held", f"9000 0 0 0 9000 9000 {clock.now_ms + 1}")
    await redis.hset("credits:install:a", items=[word for field in (*dead, sums) for word in field])
    clock.now_ms += 3 * HOUR_MS
    assert (await limiter.commit("a", "dead-0")).status is SettlementStatus.LATE
    assert await limiter.release("a", "dead-1") in {SettlementStatus.RELEASED, SettlementStatus.GONE}
    for i in range(9):
        assert (await limiter.reserve("a", tier="max", has_hardware=False, hold_id=f"h{i}")).balance.held == i + 1
    assert not [name for name in await fields_of(redis, "a") if name.startswith("hold:dead")]


async def test_reserve_when_the_tier_is_unknown_then_it_is_an_error_and_no_row_comes_of_it(
    redis: Redis, limiter: CreditLimiter
) -> None:
    with pytest.raises(UnknownTier, match=r"'platinum'.*core, pro, max"):
        await limiter.reserve("a", tier="platinum", has_hardware=False)
    assert await redis.dbsize() == 0


@pytest.mark.parametrize("cost", [0, -1, 1_000_001])
async def test_reserve_when_the_cost_is_out_of_bounds_then_it_is_an_error(limiter: CreditLimiter, cost: int) -> None:
    with pytest.raises(ValueError, match="want an integer from 1 to 1000000"):
        await limiter.reserve("a", tier="core", has_hardware=False, cost=cost)


@pytest.mark.parametrize("hold_id", ["x" * 49, "a b", "ü", "a\n"])
async def test_reserve_when_the_hold_id_cannot_be_a_field_then_it_is_an_error(
    limiter: CreditLimiter, hold_id: str
) -> None:
    with pytest.raises(ValueError, match="hold id"):
        await limiter.reserve("a", tier="core", has_hardware=False, hold_id=hold_id)


async def test_decision_when_no_clock_is_given_then_the_servers_time_counts(
    redis: Redis, limiter: CreditLimiter
) -> None:
    async def server_ms() -> int:
        seconds, microseconds = await redis.time()
        return seconds * 1000 + microseconds // 1000

    by_server = CreditLimiter(redis, limiter.tiers, timeout_ms=PATIENCE_MS, deadline_ms=PATIENCE_MS)
    for _ in range(8):  # so that a wrong part of a second would show
        before_ms = await server_ms()
        now_ms = (await by_server.balance("a", tier="pro")).now_ms
        assert before_ms <= now_ms <= await server_ms()


async def test_reserve_when_many_tasks_want_the_last_credits_then_exactly_those_are_promised(
    limiter_with: LimiterWith,
) -> None:
    limiter = limiter_with(core={"lifetime": 7})
    answers = await asyncio.gather(*(limiter.reserve("a", tier="core", has_hardware=False) for _ in range(64)))
    assert sum(answer.allowed for answer in answers) == 7
    assert {answer.reason for answer in answers} == {None, Reason.CREDITS_IN_FLIGHT}


async def test_row_when_worked_hard_with_the_longest_names_then_it_is_still_a_listpack(
    redis: Redis, limiter_with: LimiterWith
) -> None:
    """Every value must stay within 64 bytes, or Redis turns the hash into a table of several times the size."""
    longest = "T" * 20
    limits: dict[str, int | None] = {"monthly": None}
    limiter = limiter_with(**{longest: limits})
    for i in range(40):
        hold_id = f"{i:048d}"
        await limiter.reserve("a", tier=longest, has_hardware=True, cost=1_000_000, hold_id=hold_id)
        if i % 2:
            await limiter.commit("a", hold_id)
    assert await redis.object("encoding", "credits:install:a") == b"listpack"


# Backends that cannot serve the request


async def test_reserve_when_gemini_cannot_serve_then_hardware_is_planned_and_the_cap_holds_nothing(
    redis: Redis, limiter: CreditLimiter
) -> None:
    decision = await limiter.reserve("a", tier="pro", has_hardware=True, has_gemini=False, cost=2, hold_id="h1")
    assert (decision.allowed, decision.backend) == (True, "hardware")
    assert (await fields_of(redis, "a"))["held"] == "1 0 0 0 2 0 1778541177123"
    await limiter.commit("a", "h1")
    balance = await limiter.balance("a", tier="pro")
    assert (balance.remaining, balance.gemini_remaining) == (998, 400)


async def test_reserve_when_gemini_cannot_serve_then_a_used_up_cap_is_no_reason_and_a_used_up_quota_is(
    limiter_with: LimiterWith,
) -> None:
    limiter = limiter_with(core={"lifetime": 2, "gemini_cap": 0, "max_in_flight": 1})
    assert (await limiter.reserve("a", tier="core", has_hardware=False)).reason is Reason.GEMINI_CAP
    held = await limiter.reserve("a", tier="core", has_hardware=True, has_gemini=False)
    assert held.backend == "hardware"
    refused = await limiter.reserve("a", tier="core", has_hardware=True, has_gemini=False)
    assert refused.reason is Reason.TOO_MANY_IN_FLIGHT
    await limiter.commit("a", held.hold_id)
    refused = await limiter.reserve("a", tier="core", has_hardware=True, has_gemini=False, cost=2)
    assert refused.reason is Reason.OUT_OF_CREDITS


async def test_reserve_when_repeated_by_a_caller_without_gemini_then_the_replay_says_what_is_held(
    limiter: CreditLimiter,
) -> None:
    await limiter.reserve("a", tier="pro", has_hardware=True, hold_id="h1")
    again = await limiter.reserve("a", tier="pro", has_hardware=True, has_gemini=False, hold_id="h1")
    assert (again.status, again.backend) == (DecisionStatus.REPLAY, "gemini")


async def test_hold_when_gemini_cannot_serve_then_it_is_debited_as_hardware(limiter: CreditLimiter) -> None:
    async with limiter.hold("a", tier="pro", has_hardware=True, has_gemini=False) as hold:
        assert hold.backend == "hardware"
    balance = await limiter.balance("a", tier="pro")
    assert (balance.remaining, balance.gemini_remaining) == (999, 400)


async def test_reserve_when_no_backend_could_serve_then_it_is_a_value_error_and_no_row_is_made(
    redis: Redis, limiter: CreditLimiter
) -> None:
    with pytest.raises(ValueError, match="no backend could serve"):
        await limiter.reserve("a", tier="pro", has_hardware=False, has_gemini=False)
    with pytest.raises(ValueError, match="no backend could serve"):
        await limiter.debit("a", tier="pro", has_hardware=False, has_gemini=False)
    assert not await fields_of(redis, "a")
