"""The scripts from before the field `flow` beside those of today, as while relays are replaced one by one."""

import asyncio
import random
import uuid
from collections import Counter
from pathlib import Path

import pytest
from redis.asyncio import Redis

from limiter import CreditLimiter, DecisionStatus, SettlementStatus, Tiers
from limiter.credits.models import Leave
from tests.support.credits import PATIENCE_MS, fields_of

OLD = {path.stem: path.read_text() for path in (Path(__file__).parent / "before_flow").glob("*.lua")}
TIERS = Tiers.from_mapping(
    {
        "core": {
            "lifetime": 1_000_000,
            "gemini_cap": 500_000,
            "max_in_flight": 12,
            "rate_per_min": 600,
            "burst": 100,
            "free_leaves": 3,
        }
    }
)
INSTALLS = ("a", "b", "c")
ROUNDS = 150


async def old_node(redis: Redis, spent: "Counter[str]", seed: int) -> None:
    """Reserve and settle as a relay of the version before."""
    chance = random.Random(seed)
    core = ("core", "lifetime", 1_000_000, 500_000, 12, 1, 1, 1, 600_000, 1)
    for _ in range(ROUNDS):
        install, hold_id = chance.choice(INSTALLS), uuid.uuid4().hex
        key = f"credits:install:{install}"
        status, *_ = await redis.eval(OLD["reserve"], 1, key, hold_id, *core)
        if status != b"ALLOWED":
            continue
        await asyncio.sleep(chance.random() / 200)
        if chance.random() < 0.3:
            (status,) = await redis.eval(OLD["release"], 1, key, hold_id, "")
            assert status == b"RELEASED"
        else:
            status, *_ = await redis.eval(OLD["commit"], 1, key, hold_id, "", "", "core")
            assert status == b"COMMITTED"
            spent[install] += 1


async def new_node(limiter: CreditLimiter, spent: "Counter[str]", seen: "Counter[str]", seed: int) -> None:
    """Reserve, and settle as whole answers, streams, refusals and leaves do."""
    chance = random.Random(seed)
    for _ in range(ROUNDS):
        install = chance.choice(INSTALLS)
        decision = await limiter.reserve(install, tier="core", has_hardware=True)
        seen[decision.reason or decision.status] += 1
        if decision.status is not DecisionStatus.ALLOWED:
            continue
        await asyncio.sleep(chance.random() / 200)
        how, hold_id = chance.random(), decision.hold_id
        if how < 0.2:
            await limiter.release(install, hold_id)
        elif how < 0.4:
            leave = Leave("gemini", chance.choice(["r1", "r2", None]), is_retry=True)
            settled = await limiter.leave(install, hold_id, tier="core", leave=leave)
            spent[install] += settled.cost
            seen[f"leave {settled.status}"] += 1
        elif how < 0.7:
            assert (await limiter.commit(install, hold_id, stream_ms=90_000)).status is SettlementStatus.COMMITTED
            spent[install] += 1
            assert (await limiter.commit(install, hold_id, stream_ms=90_000)).status is SettlementStatus.GONE
            await asyncio.sleep(chance.random() / 100)
            seen[await limiter.renew_stream(install, hold_id, stream_ms=90_000)] += 1
            seen[await limiter.end_stream(install, hold_id)] += 1
        else:
            await limiter.commit(install, hold_id)
            spent[install] += 1


async def test_old_scripts_when_they_run_beside_the_new_ones_then_no_row_breaks_and_nothing_is_lost(
    redis: Redis,
) -> None:
    limiter = CreditLimiter(redis, TIERS, timeout_ms=PATIENCE_MS, deadline_ms=PATIENCE_MS)
    spent: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    nodes = [old_node(redis, spent, seed) for seed in range(6)]
    nodes += [new_node(limiter, spent, seen, seed) for seed in range(6, 12)]
    await asyncio.gather(*nodes)
    assert seen["RENEWED"] == seen["ENDED"] > 0
    assert seen["leave COMMITTED"] > 0
    assert seen["rate_limited"] > 0
    for install in INSTALLS:
        row = await limiter.row(install)
        assert row is not None
        assert row.lifetime_consumed == spent[install]
        assert (row.holds, row.streams) == ((), ())
        fields = await fields_of(redis, install)
        assert "held" not in fields
        decision = await limiter.reserve(install, tier="core", has_hardware=True)
        assert decision.status in (DecisionStatus.ALLOWED, DecisionStatus.DENIED)
        await limiter.release(install, decision.hold_id)


async def test_mark_when_an_old_commit_or_row_is_met_then_each_version_reads_what_it_knows(redis: Redis) -> None:
    limiter = CreditLimiter(redis, TIERS, timeout_ms=PATIENCE_MS, deadline_ms=PATIENCE_MS)
    key = "credits:install:a"
    first = await limiter.reserve("a", tier="core", has_hardware=True)
    await limiter.commit("a", first.hold_id, stream_ms=90_000)
    core = ("core", "lifetime", 1_000_000, 500_000, 1, 1, 1, 1, 600_000, 1)
    status, *_ = await redis.eval(OLD["reserve"], 1, key, "old", *core)  # it does not count the stream
    assert status == b"ALLOWED"
    assert (await limiter.commit("a", "old")).status is SettlementStatus.COMMITTED
    second = await limiter.reserve("a", tier="core", has_hardware=True)
    status, *_ = await redis.eval(OLD["commit"], 1, key, second.hold_id, "", "", "core")
    assert status == b"COMMITTED"
    row = await limiter.row("a")
    assert row is not None
    assert [mark.name for mark in row.streams] == [first.hold_id]
    assert row.lifetime_consumed == 3


@pytest.mark.parametrize("flow", ["x", "", "1 2 3", "1780000000000 x 0 0"])
async def test_flow_when_it_was_edited_into_something_unreadable_then_it_is_refused_by_its_name(
    redis: Redis, flow: str
) -> None:
    limiter = CreditLimiter(redis, TIERS)
    await limiter.debit("a", tier="core", has_hardware=True)
    await redis.hset("credits:install:a", "flow", flow)
    with pytest.raises(Exception, match="field flow is"):
        await limiter.reserve("a", tier="core", has_hardware=True)
    with pytest.raises(Exception, match="field flow is"):
        await limiter.row("a")
