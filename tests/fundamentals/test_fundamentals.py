"""The library in ten tests, one for each thing that it does. docs/tutorial/library.md shows them."""

import json
from pathlib import Path

import pytest

from limiter import CreditLimiter, Row
from tests.support.cli import limiter as run
from tests.support.credits import LimiterWith


async def test_hold(limiter: CreditLimiter) -> None:
    async with limiter.hold("alice", tier="core", has_hardware=True) as hold:
        assert hold.allowed
        hold.charge(backend="hardware", cost=2)  # what was really used, if it is not what was planned

    with pytest.raises(OSError, match="the backend failed"):
        async with limiter.hold("alice", tier="core", has_hardware=True):
            raise OSError("the backend failed")  # any exception releases the hold

    assert (await limiter.balance("alice", tier="core")).remaining == 48


async def test_reserve(limiter: CreditLimiter) -> None:
    decision = await limiter.reserve("alice", tier="core", has_hardware=True, cost=2)
    assert decision.allowed
    assert decision.backend == "gemini"  # hardware once Gemini's cap of the tier is used

    balance = await limiter.balance("alice", tier="core")
    assert balance.remaining == 50  # nothing is debited yet,
    assert balance.held == 2  # but nobody else can spend these two


async def test_commit(limiter: CreditLimiter) -> None:
    decision = await limiter.reserve("alice", tier="core", has_hardware=True)
    settlement = await limiter.commit("alice", decision.hold_id, backend="hardware")
    assert settlement.status == "COMMITTED"

    repeated = await limiter.commit("alice", decision.hold_id)
    assert repeated.status == "GONE"  # a repeat debits nothing
    assert (await limiter.balance("alice", tier="core")).remaining == 49


async def test_release(limiter: CreditLimiter) -> None:
    decision = await limiter.reserve("alice", tier="core", has_hardware=True)
    assert await limiter.release("alice", decision.hold_id) == "RELEASED"

    balance = await limiter.balance("alice", tier="core")
    assert (balance.remaining, balance.held) == (50, 0)


async def test_debit(limiter: CreditLimiter) -> None:
    decision = await limiter.debit("alice", tier="pro", has_hardware=False, cost=3)
    assert decision.allowed
    assert decision.balance.remaining == 997  # of pro's 1,000 a month
    assert decision.balance.gemini_remaining == 397  # of its 400 on Gemini


async def test_balance(limiter: CreditLimiter) -> None:
    balance = await limiter.balance("nobody-yet", tier="pro")
    assert (balance.capped, balance.remaining, balance.held) == ("monthly", 1000, 0)
    assert balance.renews_at == "2026-06-11T23:02:57.000Z"  # the test's clock stands at 11 May

    assert await limiter.row("nobody-yet") is None  # reading a balance creates nothing


async def test_row(limiter: CreditLimiter) -> None:
    await limiter.debit("alice", tier="core", has_hardware=True)
    row = await limiter.row("alice")
    assert isinstance(row, Row)
    assert (row.tier_snapshot, row.lifetime_consumed, row.monthly_consumed) == ("core", 1, 0)
    assert (row.last_renewal_at, row.anniversary_day) == ("2026-05-11T23:02:57.123Z", 11)


async def test_refusal_that_lasts(limiter_with: LimiterWith) -> None:
    limiter = limiter_with(core={"lifetime": 2, "gemini_cap": 1})
    await limiter.debit("alice", tier="core", has_hardware=True)

    no_gemini_left = await limiter.reserve("alice", tier="core", has_hardware=False)
    assert (no_gemini_left.allowed, no_gemini_left.reason) == (False, "gemini_cap_exceeded_no_hardware")

    await limiter.debit("alice", tier="core", has_hardware=True)  # the second credit, on hardware
    nothing_left = await limiter.reserve("alice", tier="core", has_hardware=True)
    assert (nothing_left.allowed, nothing_left.reason) == (False, "out_of_credits")


async def test_refusal_that_passes(limiter_with: LimiterWith) -> None:
    limiter = limiter_with(core={"lifetime": 1}, pro={"monthly": 9, "max_in_flight": 1})
    first = await limiter.reserve("alice", tier="core", has_hardware=True)
    second = await limiter.reserve("alice", tier="core", has_hardware=True)
    assert second.reason == "credits_in_flight"  # the last credit is held, but not spent
    assert (await limiter.reserve("alice", tier="pro", has_hardware=True)).reason == "too_many_in_flight"

    await limiter.release("alice", first.hold_id)
    assert (await limiter.reserve("alice", tier="core", has_hardware=True)).allowed


async def test_import(limiter: CreditLimiter, redis_url: str, tmp_path: Path) -> None:
    row = {"tier_snapshot": "core", "lifetime_consumed": 7, "last_renewal_at": "2026-05-04T21:24:54.719Z"}
    (tmp_path / "credits.json").write_text(json.dumps({"rows": {"alice": row}}))

    done = run("import", "credits.json", "--redis", redis_url, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (await limiter.balance("alice", tier="core")).remaining == 43
