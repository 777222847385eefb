# ruff: noqa: ASYNC240  the tests look at small files; nothing else waits for their loop
"""Persisters that are killed, paused and doubled: whatever happens, the file on disk is a good one."""

import asyncio
import fcntl
import itertools
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import pytest

from limiter import CreditLimiter, connect
from limiter.backup.importer import import_file
from limiter.backup.restore import newest_good
from limiter.credits.rows import scan_keys
from limiter.ledger.rotation import generations
from limiter.ledger.trailer import Trailer, read_trailer
from limiter.ledger.verify import verify
from tests.support.credits import TIERS
from tests.support.redis_servers import Server
from tests.support.wait import eventually

pytestmark = pytest.mark.slow

ROWS = 2000
KILLS = int(os.environ.get("LIMITER_TEST_KILLS", "15"))
# Loads everything once, and forks a persister for each line: a kill a second would else be mostly imports.
NURSERY = """
import asyncio, os, signal, sys
from pathlib import Path
from limiter import connect
from limiter.backup.persister import Persister
from limiter.credits.session import Session

async def persist(url, file, interval_s, lease_s):
    redis = await connect(url)
    persister = Persister(
        Session(redis), Path(file), interval_s=float(interval_s), lease_s=float(lease_s), keep=3
    )
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, persister.stop)
    await persister.run()
    await redis.aclose()

for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        asyncio.run(persist(*line.split()))
        os._exit(0)
    print(pid, flush=True)
"""


class Nursery:
    """Persister processes: each is started by a line, and ended by a signal to its id."""

    def __init__(self, url: str, path: Path) -> None:
        self._url, self._path = url, path
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", NURSERY],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.alive: set[int] = set()

    def start(self, *, interval_s: float, lease_s: float) -> int:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{self._url} {self._path} {interval_s} {lease_s}\n")
        self._process.stdin.flush()
        pid = int(self._process.stdout.readline())
        self.alive.add(pid)
        return pid

    def signal(self, pid: int, number: signal.Signals) -> None:
        os.kill(pid, number)
        if number is signal.SIGKILL:
            self.alive.discard(pid)

    def close(self) -> None:
        for pid in self.alive:
            os.kill(pid, signal.SIGCONT)
            os.kill(pid, signal.SIGKILL)
        self._process.communicate()


@pytest.fixture
async def core(own_server: Callable[..., Server], closing: AsyncExitStack) -> CreditLimiter:
    server = own_server("valkey", "--appendfsync", "no")
    redis = await connect(server.url)
    closing.push_async_callback(redis.aclose)
    core = CreditLimiter(redis, TIERS)
    for number in range(ROWS):
        await core.debit(f"i-{number}", tier="pro", has_hardware=True)
    return core


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "ledger").mkdir()
    return tmp_path / "ledger" / "credits.json"


@pytest.fixture
def nursery(core: CreditLimiter, path: Path) -> Iterator[Nursery]:
    port = core.session.redis.connection_pool.connection_kwargs["port"]
    nursery = Nursery(f"redis://127.0.0.1:{port}/0", path)
    yield nursery
    nursery.close()


@asynccontextmanager
async def load(core: CreditLimiter) -> AsyncIterator[None]:
    """Rows come, are debited, and go, until the block ends."""
    done = False

    async def spend() -> None:
        for number in itertools.count():
            await core.debit(f"i-{random.randrange(ROWS)}", tier="pro", has_hardware=True)
            await core.debit(f"new-{number}", tier="core", has_hardware=True)
            await core.session.redis.delete(core.session.keys.install(f"new-{number - 50}"))
            if done:  # redis-py can lose a cancellation, see `limiter.cancelling`
                return

    task = asyncio.create_task(spend())
    try:
        yield
    finally:
        done = True
        await task


def seal_of(path: Path) -> Trailer | None:
    try:
        return read_trailer(path)
    except OSError:
        return None


def age_of(path: Path) -> tuple[int, int]:
    trailer = read_trailer(path)
    assert trailer
    return trailer.age_key


def is_later(path: Path, epoch: int) -> bool:
    trailer = seal_of(path)
    return trailer is not None and trailer.epoch > epoch


def is_whole(temp: Path) -> bool:
    """Whether a temp file has its last line: the writer has nothing to do any more but to rename it."""
    return seal_of(temp) is not None


async def rows_of(core: CreditLimiter) -> dict[str, dict[str, object]]:
    names = [name.decode() async for some in scan_keys(core.session) for name in some]
    rows = [await core.row(core.session.keys.install_id(name)) for name in names]
    return {row.install_id: row.as_dict() for row in rows if row}


async def test_file_when_its_persister_is_killed_at_any_moment_then_it_is_a_good_one_and_can_be_restored(
    core: CreditLimiter, path: Path, nursery: Nursery
) -> None:
    """As often as LIMITER_TEST_KILLS."""
    pid, last = nursery.start(interval_s=0.01, lease_s=0.1), (0, 0)
    await eventually(path.exists)
    async with load(core):
        for _ in range(KILLS):
            await asyncio.sleep(random.uniform(0, 0.3))  # any moment: that is what is tested
            nursery.signal(pid, signal.SIGKILL)
            report = verify(path)
            assert report.is_good, report.faults
            assert report.trailer
            assert report.trailer.age_key >= last
            last = report.trailer.age_key
            pid = nursery.start(interval_s=0.01, lease_s=0.1)
            await eventually(partial(is_later, path, report.trailer.epoch))
    rows = await rows_of(core)
    nursery.signal(pid, signal.SIGTERM)
    await eventually(lambda: not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes())
    files = generations(path)
    assert len(files) == 3
    assert all(verify(each.path).is_good for each in files)
    newest = newest_good(path, on_faulty=lambda report: pytest.fail(str(report)))
    assert newest.path == path
    await core.session.redis.flushdb()
    await import_file(core.session, newest.path, mode="create")
    assert await rows_of(core) == rows


async def test_stale_writer_when_it_is_paused_between_scan_and_rename_and_woken_later_then_the_newer_file_stays(
    core: CreditLimiter, path: Path, nursery: Nursery
) -> None:
    """The lock of the folder stands between the two: while the test holds it, the writer is at exactly that point."""
    with path.with_name(".credits.json.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        stale = nursery.start(interval_s=60, lease_s=0.3)
        await eventually(lambda: any(is_whole(each) for each in path.parent.glob("*.tmp")))
        nursery.signal(stale, signal.SIGSTOP)
    await core.debit("i-0", tier="pro", has_hardware=True, cost=100)
    nursery.start(interval_s=60, lease_s=0.3)
    await eventually(path.exists)
    newer, stood = path.read_bytes(), path.stat()
    assert age_of(path) == (2, 1)
    nursery.signal(stale, signal.SIGCONT)
    await eventually(lambda: not any(is_whole(each) for each in path.parent.glob("*.tmp")))  # it dropped its own
    assert path.read_bytes() == newer
    assert path.stat().st_ino == stood.st_ino
    assert json.loads(newer)["rows"]["i-0"]["monthly_consumed"] == 101
    assert [each.path for each in generations(path)] == [path]


async def test_standby_when_the_writer_is_killed_then_it_takes_over_in_a_later_epoch(
    core: CreditLimiter, path: Path, nursery: Nursery
) -> None:
    first = nursery.start(interval_s=0.05, lease_s=0.5)
    await eventually(path.exists)
    second = nursery.start(interval_s=0.05, lease_s=0.5)
    await core.debit("a", tier="pro", has_hardware=True)
    await eventually(lambda: b'"a":' in path.read_bytes())
    assert age_of(path)[0] == 1
    nursery.signal(first, signal.SIGKILL)
    await core.debit("b", tier="pro", has_hardware=True)
    await eventually(lambda: b'"b":' in path.read_bytes())
    assert age_of(path)[0] == 2
    nursery.signal(second, signal.SIGTERM)
