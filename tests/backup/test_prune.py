"""Pruning: what was never debited, holds nothing and is old goes; nothing else does, whatever happens meanwhile."""

import asyncio
import json
from pathlib import Path

import pytest
from redis.asyncio import Redis

from limiter import CreditLimiter, LedgerFileError
from limiter.backup.dump import dump
from limiter.backup.prune import DAY_MS, PruneReport, prune_unused, pruned_since
from limiter.credits.keys import Keys
from tests.support.cli import limiter as run_limiter
from tests.support.credits import Clock, text_of

MONTH_MS = 30 * DAY_MS


async def create(limiter: CreditLimiter, *names: str) -> None:
    """Make rows as requests do that a backend refuses."""
    for name in names:
        decision = await limiter.reserve(name, tier="core", has_hardware=True)
        await limiter.release(name, decision.hold_id)


async def prune(limiter: CreditLimiter, *, dry_run: bool = False) -> PruneReport:
    return await prune_unused(limiter.session, unused_ms=MONTH_MS, dry_run=dry_run)


async def left(redis: Redis) -> set[str]:
    return {text_of(key).rpartition(":")[2] for key in await redis.keys("*:install:*")}


async def test_prune_when_rows_were_never_debited_and_are_old_then_they_go_and_others_stay(
    limiter: CreditLimiter, redis: Redis, clock: Clock
) -> None:
    await create(limiter, *(f"unused-{number}" for number in range(100)))
    await limiter.debit("lifetime", tier="core", has_hardware=True)
    await limiter.debit("hardware", tier="max", has_hardware=True, has_gemini=False)
    for name in ("monthly", "long ago", "other"):
        await limiter.debit(name.replace(" ", "-"), tier="pro", has_hardware=True)
    await create(limiter, "imported", "unknown")
    await redis.hset(Keys().install("imported"), "extra", '{"x":1}')
    await redis.hset(Keys().install("unknown"), "surprise", "1")
    clock.now_ms += 2 * MONTH_MS
    await create(limiter, "long-ago")  # which begins a new period: its counters are 0 again
    await limiter.reserve("held", tier="core", has_hardware=True)
    clock.now_ms += MONTH_MS - 1
    await create(limiter, "young")
    clock.now_ms += 1
    used = {"lifetime", "hardware", "monthly", "long-ago", "other", "imported", "unknown", "young"}
    assert await prune(limiter, dry_run=True) == PruneReport(109, 101)  # a hold of a month ago holds nothing
    assert await redis.dbsize() == 109
    assert await prune(limiter) == PruneReport(109, 101)
    assert await left(redis) == used
    assert await prune(limiter) == PruneReport(8, 0)


async def test_prune_when_a_hold_is_live_or_can_still_be_committed_then_its_row_stays(
    limiter: CreditLimiter, redis: Redis, clock: Clock
) -> None:
    await create(limiter, "a")
    clock.now_ms += 2 * MONTH_MS
    began_ms = clock.now_ms
    decision = await limiter.reserve("a", tier="core", has_hardware=True)
    # It began a period just now, and so does not look old: as if it had begun long ago.
    await redis.hset(Keys().install("a"), "last_renewal_at", "2026-05-11T23:02:57.123Z")
    for later_ms in (0, limiter.hold_ms, limiter.hold_ms + 3_599_999):
        clock.now_ms = began_ms + later_ms
        assert (await prune(limiter)).pruned == 0
    assert (await limiter.commit("a", decision.hold_id)).status == "LATE"
    assert (await prune(limiter)).pruned == 0


async def test_prune_when_first_debits_race_with_it_then_none_is_lost(
    limiter: CreditLimiter, redis: Redis, clock: Clock
) -> None:
    names = [f"i-{number}" for number in range(200)]
    await create(limiter, *names)
    clock.now_ms += 2 * MONTH_MS
    used = names[::2]

    async def use(name: str) -> None:
        decision = await limiter.reserve(name, tier="core", has_hardware=True)
        assert decision.allowed
        await asyncio.sleep(0)
        assert (await limiter.commit(name, decision.hold_id)).status == "COMMITTED"

    async def use_all() -> None:
        for start in range(0, len(used), 5):
            await asyncio.gather(*(use(name) for name in used[start : start + 5]))

    reports = await asyncio.gather(*(prune(limiter) for _ in range(3)), use_all())
    assert sum(report.pruned for report in reports[:3] if report) >= 100
    for name in used:
        row = await limiter.row(name)
        assert row is not None
        assert row.lifetime_consumed == 1
    assert await left(redis) == set(used)


async def test_dump_when_most_rows_were_pruned_then_the_last_file_is_a_generation_and_not_set_aside(
    limiter: CreditLimiter, redis: Redis, clock: Clock, tmp_path: Path
) -> None:
    path = tmp_path / "credits.json"
    await create(limiter, *(f"unused-{number}" for number in range(50)))
    await limiter.debit("a", tier="core", has_hardware=True)
    clock.now_ms += 2 * MONTH_MS
    before = await dump(limiter.session, path)
    clock.now_ms += 1000
    await prune(limiter)
    assert await pruned_since(limiter.session, before.time) == 50
    report = await dump(limiter.session, path)
    assert (report.rows, report.is_set_aside) == (1, False)
    # What was pruned before the last file explains nothing that is missing now.
    clock.now_ms += 1000
    await create(limiter, *(f"more-{number}" for number in range(20)))
    assert not (await dump(limiter.session, path)).is_set_aside
    for key in await redis.keys("*:install:more-*"):
        await redis.delete(key)
    clock.now_ms += 1000
    assert (await dump(limiter.session, path)).is_set_aside
    clock.now_ms += MONTH_MS
    assert await redis.pttl(Keys().pruned()) <= MONTH_MS


async def test_dump_when_all_rows_were_pruned_then_it_is_written_and_when_lost_it_is_refused(
    limiter: CreditLimiter, redis: Redis, clock: Clock, tmp_path: Path
) -> None:
    path = tmp_path / "credits.json"
    await create(limiter, "a", "b")
    clock.now_ms += 2 * MONTH_MS
    await dump(limiter.session, path)
    clock.now_ms += 1000
    assert (await prune(limiter)).pruned == 2
    report = await dump(limiter.session, path)
    assert (report.rows, report.is_set_aside) == (0, False)
    clock.now_ms += 1000
    await create(limiter, "a", "b")
    await dump(limiter.session, path)
    clock.now_ms += 1000
    for name in ("a", "b"):
        await redis.delete(Keys().install(name))
    with pytest.raises(LedgerFileError, match="Redis has none"):
        await dump(limiter.session, path)


@pytest.mark.slow
async def test_command_when_it_prunes_then_it_says_how_many(
    limiter: CreditLimiter, redis: Redis, redis_url: str, clock: Clock, tmp_path: Path
) -> None:
    clock.now_ms = 1_700_000_000_000  # for a command that has the server's time
    await create(limiter, "a", "b")
    await limiter.debit("c", tier="core", has_hardware=True)

    async def command(*words: str) -> tuple[int, str]:
        done = await asyncio.to_thread(run_limiter, "prune", *words, "--redis", redis_url, cwd=tmp_path)
        return done.returncode, done.stdout

    wanted = {"rows": 3, "pruned": 2, "unused_days": 30, "dry_run": True}
    code, text = await command("--unused-days", "30", "--dry-run", "--json")
    assert (code, json.loads(text)) == (0, wanted)
    assert await command("--unused-days", "30") == (0, "2 of 3 rows were deleted.\n")
    assert await left(redis) == {"c"}
    assert (await command())[0] == (await command("--unused-days", "0"))[0] == 2
