# ruff: noqa: ASYNC240  the tests look at small files; nothing else waits for their loop
"""`limiter restore`, as a person or a script runs it."""

import asyncio
import json
import os
import pty
import signal
import subprocess
from pathlib import Path

import pytest
from redis.asyncio import Redis

from limiter import CreditLimiter
from limiter.backup.dump import dump
from limiter.backup.lease import Lease
from limiter.backup.persister import Persister
from tests.support.cli import LIMITER, environment, limiter
from tests.support.credits import Clock
from tests.support.redis_matrix import ELSEWHERE

Ran = subprocess.CompletedProcess[str]
# Each command is a process of its own, and what it does to rows is tested on both servers elsewhere: one will do.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.parametrize("redis_url", ["elsewhere" if ELSEWHERE in os.environ else "valkey"], indirect=True),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "credits.json"


@pytest.fixture
def core(limiter: CreditLimiter) -> CreditLimiter:
    """The limiter, under a name that the command's helper has not."""
    return limiter


async def restore(redis_url: str, path: Path, *arguments: str) -> Ran:
    shown = {"PERSISTER__FILE": str(path), "REDIS__URL": redis_url, "PERSISTER__LEASE_S": "1"}
    settings = {f"LIMITER_{name}": value for name, value in shown.items()}
    return await asyncio.to_thread(limiter, "restore", *arguments, cwd=path.parent, settings=settings)


async def consumed(core: CreditLimiter) -> dict[str, int]:
    found = {}
    for name in ("a", "b", "c"):
        row = await core.row(name)
        if row is not None:
            found[name] = row.monthly_consumed
    return found


async def two_dumps(core: CreditLimiter, path: Path, clock: Clock) -> None:
    await core.debit("a", tier="pro", has_hardware=True, cost=3)
    await dump(core.session, path)
    clock.now_ms += 1000
    await core.debit("b", tier="pro", has_hardware=True, cost=4)
    await dump(core.session, path)


async def test_restore_when_redis_is_empty_then_the_rows_of_the_latest_dump_are_there_and_it_says_what_is_lost(
    core: CreditLimiter, redis: Redis, redis_url: str, path: Path, clock: Clock
) -> None:
    await two_dumps(core, path, clock)
    await core.reserve("a", tier="pro", has_hardware=True, cost=9)
    before = path.read_bytes()
    await redis.flushdb()
    ran = await restore(redis_url, path, "--yes", "--json")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["new"] == 2
    assert "2 rows of 2026-05-11T23:02:58.123Z" in ran.stderr
    assert "Debits since then are lost" in ran.stderr
    assert await consumed(core) == {"a": 3, "b": 4}
    assert (await core.balance("a", tier="pro")).held == 0
    assert (await dump(core.session, path)).unchanged
    assert path.read_bytes() == before


async def test_restore_when_the_latest_files_are_spoilt_then_the_latest_good_one_is_taken(
    core: CreditLimiter, redis: Redis, redis_url: str, path: Path, clock: Clock
) -> None:
    await two_dumps(core, path, clock)
    content = bytearray(path.read_bytes())
    content[80] ^= 4
    path.write_bytes(content)
    await redis.flushdb()
    ran = await restore(redis_url, path, "--yes")
    assert ran.returncode == 0, ran.stderr
    assert f"{path} is skipped: the checksum is not that of the file" in ran.stderr
    assert "credits.json.20260511T230257.123Z: 1 rows" in ran.stderr
    assert await consumed(core) == {"a": 3}


async def test_restore_when_no_file_is_good_then_it_says_so_and_changes_nothing(
    core: CreditLimiter, redis_url: str, path: Path
) -> None:
    path.write_text('{"rows": {\n')
    ran = await restore(redis_url, path, "--yes")
    assert ran.returncode == 1
    assert f"there is no good file at {path}" in ran.stderr
    named = await restore(redis_url, path, "--yes", str(path))
    assert named.returncode == 1
    assert "was not restored" in named.stderr
    assert await consumed(core) == {}


async def test_restore_when_redis_has_other_rows_then_it_refuses_unless_replace_or_merge_is_given(
    core: CreditLimiter, redis: Redis, redis_url: str, path: Path, clock: Clock
) -> None:
    await two_dumps(core, path, clock)
    await redis.flushdb()
    await core.debit("a", tier="pro", has_hardware=True, cost=1)
    refused = await restore(redis_url, path, "--yes")
    assert refused.returncode == 1
    assert "nothing was changed" in refused.stderr
    assert await consumed(core) == {"a": 1}
    assert (await restore(redis_url, path, "--yes", "--merge")).returncode == 0
    assert await consumed(core) == {"a": 1, "b": 4}  # the stored period of "a" began later: it wins whole
    await core.debit("a", tier="pro", has_hardware=True, cost=1)
    assert (await restore(redis_url, path, "--yes", "--replace")).returncode == 0
    assert await consumed(core) == {"a": 3, "b": 4}


async def test_restore_when_the_file_is_missing_then_it_says_that_before_it_needs_a_terminal(
    redis_url: str, redis: Redis, path: Path
) -> None:
    await redis.ping()
    ran = await restore(redis_url, path, "nofile")
    assert ran.returncode == 1
    assert "nofile cannot be read: No such file or directory" in ran.stderr


async def test_restore_when_there_is_no_terminal_then_it_needs_yes(
    core: CreditLimiter, redis_url: str, path: Path
) -> None:
    await dump(core.session, path)
    ran = await restore(redis_url, path)
    assert ran.returncode == 2
    assert "add --yes" in ran.stderr


@pytest.mark.parametrize(("answer", "rows"), [("n\n", {}), ("\n", {}), ("y\n", {"a": 3, "b": 4})])
async def test_restore_when_it_asks_then_it_does_what_is_answered(
    core: CreditLimiter, redis: Redis, redis_url: str, path: Path, clock: Clock, answer: str, rows: dict[str, int]
) -> None:
    await two_dumps(core, path, clock)
    await redis.flushdb()
    ours, theirs = pty.openpty()
    process = subprocess.Popen(  # noqa: ASYNC220  its end is awaited in a thread
        [LIMITER, "restore", "--redis", redis_url],
        cwd=path.parent,
        env=environment({"LIMITER_PERSISTER__FILE": str(path)}),
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    os.close(theirs)
    os.write(ours, answer.encode())
    _, shown = await asyncio.to_thread(process.communicate, timeout=60)
    os.close(ours)
    assert b"Restore it?" in shown
    assert process.returncode == (0 if rows else 1)
    assert await consumed(core) == rows


async def test_restore_when_ctrl_c_comes_while_it_asks_then_it_ends_and_changes_nothing(
    core: CreditLimiter, redis: Redis, redis_url: str, path: Path, clock: Clock
) -> None:
    await two_dumps(core, path, clock)
    await redis.flushdb()
    process = subprocess.Popen(  # noqa: ASYNC220  its end is awaited in a thread
        [LIMITER, "restore", "--redis", redis_url],
        cwd=path.parent,
        env=environment({"LIMITER_PERSISTER__FILE": str(path)}),
        stdin=(terminal := pty.openpty())[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stderr
    shown = b""
    while b"Restore it?" not in shown:
        shown += await asyncio.to_thread(os.read, process.stderr.fileno(), 1000)
    process.send_signal(signal.SIGINT)
    await asyncio.to_thread(process.communicate, timeout=20)
    for end in terminal:
        os.close(end)
    assert process.returncode in (1, 130)
    assert await consumed(core) == {}


async def test_restore_when_a_persister_is_running_then_it_refuses_and_says_to_stop_it(
    core: CreditLimiter, redis: Redis, redis_url: str, path: Path, clock: Clock
) -> None:
    await two_dumps(core, path, clock)
    await redis.flushdb()
    core.session.clock = None
    async with Persister(core.session, path.with_name("other.json"), interval_s=3600, lease_s=1):
        ran = await restore(redis_url, path, "--yes")
    assert ran.returncode == 1
    assert "a persister is at work" in ran.stderr
    assert await consumed(core) == {}


async def test_restore_when_a_persister_was_killed_then_it_waits_for_its_lease_to_expire(
    core: CreditLimiter, redis: Redis, redis_url: str, path: Path, clock: Clock
) -> None:
    await two_dumps(core, path, clock)
    await redis.flushdb()
    core.session.clock = None
    await Lease(core.session, lease_s=1, owner="killed").take()
    ran = await restore(redis_url, path, "--yes")
    assert ran.returncode == 0, ran.stderr
    assert await consumed(core) == {"a": 3, "b": 4}


async def test_persister_when_it_starts_after_a_restore_then_it_knows_the_file_as_its_own(
    core: CreditLimiter, redis: Redis, redis_url: str, path: Path, clock: Clock
) -> None:
    await two_dumps(core, path, clock)
    await redis.flushdb()
    assert (await restore(redis_url, path, "--yes")).returncode == 0
    core.session.clock = None
    await core.debit("c", tier="pro", has_hardware=True)
    async with Persister(core.session, path, interval_s=3600):
        pass
    assert not [each for each in path.parent.iterdir() if ".before-" in each.name]
    assert set(json.loads(path.read_text())["rows"]) == {"a", "b", "c"}
