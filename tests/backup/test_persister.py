# ruff: noqa: ASYNC240  the tests look at small files; nothing else waits for their loop
import asyncio
import json
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from limiter import CreditLimiter, connect
from limiter.backup.importer import import_file
from limiter.backup.persister import Persister
from tests.support.credits import TIERS, Clock
from tests.support.redis_servers import Server
from tests.support.wait import eventually

OLD = {"rows": {"brought": {"last_renewal_at": "2026-05-04T21:24:54.719Z", "lifetime_consumed": 40}}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "credits.json"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def rows_of(path: Path) -> dict[str, Any]:
    rows: dict[str, Any] = json.loads(path.read_text())["rows"]
    return rows


async def test_persister_when_it_runs_then_it_dumps_again_and_once_more_on_stop(
    limiter: CreditLimiter, path: Path, clock: Clock
) -> None:
    await limiter.debit("a", tier="pro", has_hardware=True)
    async with Persister(limiter.session, path, interval_s=0.01) as persister:
        await eventually(path.exists)
        await limiter.debit("b", tier="pro", has_hardware=True)
        await eventually(lambda: len(rows_of(path)) == 2)
        clock.now_ms += 1000
        await eventually(lambda: persister.last_good_at == "2026-05-11T23:02:58.123Z")
        await limiter.debit("c", tier="pro", has_hardware=True)
    assert set(rows_of(path)) == {"a", "b", "c"}
    report = dict(persister.report())
    assert str(report.pop("writer")).count(":") == 2
    assert report == {
        "file": str(path),
        "role": "writer",
        "epoch": 1,
        "last_good_at": "2026-05-11T23:02:58.123Z",
        "error": None,
    }


async def test_persister_when_the_interval_is_long_then_stop_does_not_wait_for_it(
    limiter: CreditLimiter, path: Path
) -> None:
    persister = Persister(limiter.session, path, interval_s=3600)
    task = asyncio.create_task(persister.run())
    await eventually(path.exists)
    await limiter.debit("a", tier="pro", has_hardware=True)
    persister.stop()
    await asyncio.wait_for(task, 10)
    assert list(rows_of(path)) == ["a"]


async def test_persister_when_it_is_cancelled_then_it_ends_at_once(limiter: CreditLimiter, path: Path) -> None:
    persister = Persister(limiter.session, path, interval_s=0.001)
    for _ in range(20):
        task = asyncio.create_task(persister.run())
        await eventually(path.exists)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 10)
        path.unlink()


async def test_persister_when_its_folder_is_missing_then_it_makes_it_as_the_old_ledger_does(
    limiter: CreditLimiter, tmp_path: Path
) -> None:
    async with Persister(limiter.session, tmp_path / "data" / "deep" / "credits.json", interval_s=3600):
        pass
    assert rows_of(tmp_path / "data" / "deep" / "credits.json") == {}


@pytest.mark.slow
async def test_persister_when_redis_is_unavailable_then_it_says_so_keeps_the_file_and_goes_on_when_it_is_back(
    own_server: Callable[..., Server], path: Path, closing: AsyncExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    server = own_server()
    redis = await connect(server.url)
    closing.push_async_callback(redis.aclose)
    limiter = CreditLimiter(redis, TIERS)
    await limiter.debit("a", tier="pro", has_hardware=True)
    async with Persister(limiter.session, path, interval_s=0.01) as persister:
        await eventually(lambda: persister.last_good_at)
        server.kill()
        await eventually(lambda: persister.last_error)
        assert "Redis" in str(persister.last_error)
        assert persister.last_good_at
        assert list(rows_of(path)) == ["a"]
        assert caplog.record_tuples[0][:2] == ("limiter", logging.ERROR)
        server.start()
        await eventually(lambda: persister.last_error is None)
        await limiter.debit("b", tier="pro", has_hardware=True)
    assert set(rows_of(path)) == {"a", "b"}


async def test_persister_when_rows_are_broken_then_its_report_says_so_until_they_are_repaired(
    limiter: CreditLimiter, redis: Redis, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b"):
        await limiter.debit(name, tier="pro", has_hardware=True)
    await redis.hset("credits:install:b", "monthly_consumed", "x")
    async with Persister(limiter.session, path, interval_s=0.01) as persister:
        await eventually(lambda: persister.last_error)
        assert persister.last_error == f"1 rows are not in {path}: see {path}.broken.json"
        assert persister.last_good_at is None
        assert "credits:install:b field monthly_consumed is 'x'" in caplog.text
        await redis.hset("credits:install:b", "monthly_consumed", "1")
        await eventually(lambda: persister.last_good_at)
        assert persister.last_error is None


async def test_persister_when_a_file_was_brought_and_not_imported_then_it_stays_until_it_is(
    limiter: CreditLimiter, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.write_text(json.dumps(OLD))
    async with Persister(limiter.session, path, interval_s=0.01) as persister:
        await eventually(lambda: persister.last_error)
        assert json.loads(path.read_text()) == OLD
        assert "Import it first" in caplog.text
        await import_file(limiter.session, path, mode="create", dry_run=False)
        await eventually(lambda: persister.last_good_at)
    assert rows_of(path)["brought"]["lifetime_consumed"] == 40
    kept = path.with_name("credits.json.before-20260511T230257.123Z")
    assert json.loads(kept.read_text()) == OLD


async def test_persister_when_the_disk_cannot_be_written_then_it_survives(limiter: CreditLimiter, path: Path) -> None:
    path.mkdir()
    async with Persister(limiter.session, path, interval_s=0.01) as persister:
        await eventually(lambda: persister.last_error)
        assert "Is a directory" in str(persister.last_error)
        path.rmdir()
        await eventually(lambda: persister.last_good_at)
