"""What the old ledger really answered, played against the scripts and the reference: renewals and whole ledgers.

`--vectors DIR` plays other files of the same form. Every entry of a file is played, none is picked out.
"""

from collections.abc import Awaitable, Callable, Iterator

import pytest
from redis.asyncio import Redis

from limiter import Balance, CreditLimiter, Decision, Row, Tiers
from limiter._util.timestamps import ms_from_iso
from tests.support.credits import Clock
from tests.support.reference_model import Account, ReferenceLimiter, iso, moment, next_renewal, parse
from tests.support.vectors import Entry, Vectors, as_ours


def renewals(vectors: Vectors) -> Iterator[tuple[Row, int]]:
    """Return a row that began at each `from`, with the anniversary day of its anchor, and its renewal in epoch ms."""
    for number, entry in enumerate(vectors["renewals"]):
        began = entry["from"]
        day = entry["anchor"] or int(began[8:10])
        yield Row(f"renewal-{number}", "pro", 0, 0, began, day, 3, 2, began), ms_from_iso(entry["next"])


async def test_renewal_when_read_from_the_balance_then_it_is_the_old_ledgers(
    redis: Redis, limiter: CreditLimiter, clock: Clock, vectors: Vectors
) -> None:
    played = 0
    for row, renews_ms in renewals(vectors):
        await limiter.put_row(row, mode="create")
        clock.now_ms = renews_ms - 1
        balance = await limiter.balance(row.install_id, tier="pro")
        assert (balance.renews_ms, balance.began_at, balance.remaining) == (renews_ms, row.last_renewal_at, 997)
        played += 1
    assert played == len(vectors["renewals"]) == await redis.dbsize()


async def test_roll_over_when_the_renewal_is_a_millisecond_ahead_then_it_waits_for_it(
    limiter: CreditLimiter, clock: Clock, vectors: Vectors
) -> None:
    for row, renews_ms in renewals(vectors):
        await limiter.put_row(row, mode="create")
        clock.now_ms = renews_ms - 1
        await _reserve_and_release(limiter, row.install_id)
        assert await limiter.row(row.install_id) == row
        clock.now_ms = renews_ms
        await _reserve_and_release(limiter, row.install_id)
        rolled = await limiter.row(row.install_id)
        assert rolled
        assert ms_from_iso(rolled.last_renewal_at) == renews_ms
        assert (rolled.monthly_consumed, rolled.monthly_gemini_consumed) == (0, 0)
        assert rolled.anniversary_day == row.anniversary_day


async def _reserve_and_release(limiter: CreditLimiter, install_id: str) -> None:
    decision = await limiter.reserve(install_id, tier="pro", has_hardware=False)
    await limiter.release(install_id, decision.hold_id)


def test_renewal_when_stepped_by_the_reference_then_it_is_the_old_ledgers(vectors: Vectors) -> None:
    for row, renews_ms in renewals(vectors):
        assert next_renewal(parse(row.last_renewal_at), row.anniversary_day) == moment(renews_ms)


def tiers_of(quota: Entry) -> Tiers:
    names = {"geminiCapLifetime": "gemini_cap", "geminiCapMonthly": "gemini_cap"}
    return Tiers.from_mapping(
        {tier: {names.get(name, name): value for name, value in limits.items()} for tier, limits in quota.items()}
    )


def assert_step(step: Entry, decision: Decision, balance: Balance, row: Entry) -> None:
    plan = {"allowed": decision.allowed, "backend": decision.backend, "reason": decision.reason}
    assert plan == step["plan"]
    left = {"remaining": balance.remaining, "capped": balance.capped, "gemini_remaining": balance.gemini_remaining}
    assert left == step["balance"]
    assert row == as_ours(step["row"])


async def stored(limiter: CreditLimiter, install_id: str) -> Entry:
    row = await limiter.row(install_id)
    assert row
    return row.as_dict()


async def reserve_and_settle(limiter: CreditLimiter, step: Entry) -> Decision:
    """Play a step as the relay does: reserve, then commit or release by the outcome of the backend call."""
    install_id: str = step["install_id"]
    decision = await limiter.reserve(install_id, tier=step["tier"], has_hardware=step["has_hardware"])
    if decision.allowed and step["outcome"] == "success":
        await limiter.commit(install_id, decision.hold_id)
    elif decision.allowed:
        await limiter.release(install_id, decision.hold_id)
    return decision


async def debit_or_give_back(limiter: CreditLimiter, step: Entry) -> Decision:
    """Play a step that succeeds in one call; one that fails still has to be reserved and released."""
    if step["outcome"] != "success":
        return await reserve_and_settle(limiter, step)
    return await limiter.debit(step["install_id"], tier=step["tier"], has_hardware=step["has_hardware"])


@pytest.mark.parametrize("play", [reserve_and_settle, debit_or_give_back])
async def test_ledger_when_played_step_by_step_then_each_plan_balance_and_row_is_the_old_ledgers(
    redis: Redis, vectors: Vectors, play: Callable[[CreditLimiter, Entry], Awaitable[Decision]]
) -> None:
    played = 0
    for number, entry in enumerate(vectors["ledgers"]):
        clock = Clock(ms_from_iso(entry["start"]))
        limiter = CreditLimiter(redis, tiers_of(entry["quota"]), clock=clock, prefix=f"ledger-{number}")
        for loaded in entry["loaded"].values():
            await limiter.put_row(Row(**as_ours(loaded)), mode="create")
        for step in entry["steps"]:
            clock.now_ms = ms_from_iso(step["at"])
            decision = await play(limiter, step)
            balance = await limiter.balance(step["install_id"], tier=step["tier"])
            assert_step(step, decision, balance, await stored(limiter, step["install_id"]))
            played += 1
        for install_id, final in entry["final"].items():
            assert await stored(limiter, install_id) == as_ours(final)
    assert played == sum(len(entry["steps"]) for entry in vectors["ledgers"]) > 0


def test_ledger_when_played_through_the_reference_then_each_plan_balance_and_row_is_the_old_ledgers(
    vectors: Vectors,
) -> None:
    for entry in vectors["ledgers"]:
        reference = ReferenceLimiter(tiers_of(entry["quota"]))
        for loaded in entry["loaded"].values():
            reference.put_row(Row(**as_ours(loaded)), mode="create")
        for step in entry["steps"]:
            reference.now_ms = ms_from_iso(step["at"])
            install_id, tier = step["install_id"], step["tier"]
            decision = reference.reserve(install_id, tier=tier, has_hardware=step["has_hardware"], hold_id="h")
            settle = reference.commit if step["outcome"] == "success" else reference.release
            settle(install_id, "h")
            balance = reference.balance(install_id, tier=tier)
            assert_step(step, decision, balance, _as_json(install_id, reference.rows[install_id]))
        for install_id, final in entry["final"].items():
            assert _as_json(install_id, reference.rows[install_id]) == as_ours(final)


def _as_json(install_id: str, account: Account) -> Entry:
    counts = {name: int(text) for name, text in account.fields().items() if name.endswith("_consumed")}
    return counts | {
        "install_id": install_id,
        "tier_snapshot": account.tier_snapshot,
        "last_renewal_at": iso(account.began),
        "last_active_at": iso(account.last_active),
        "anniversary_day": account.anniversary_day,
    }
