# ruff: noqa: ASYNC240, S607  small files; and mount is quick, and where the system has it
"""A persister on disks that fail: the old file stays, the error is reported, and the dump is retried later."""

import contextlib
import errno
import os
import shutil
import stat
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from redis.asyncio import Redis

from limiter import CreditLimiter
from limiter.backup.persister import Persister
from limiter.ledger.verify import verify
from tests.support.redis_matrix import ELSEWHERE
from tests.support.wait import eventually

# What a disk does has nothing to do with the server: one of them will do.
pytestmark = pytest.mark.parametrize("redis_url", ["elsewhere" if ELSEWHERE in os.environ else "valkey"], indirect=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "limiter-test", str(folder)]
    if os.getuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a file system can only be mounted by root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(path: Path) -> None:
    """Write until there is no room for another byte."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass


@asynccontextmanager
async def dumped(limiter: CreditLimiter, path: Path) -> AsyncIterator[Persister]:
    """Return a persister that has written one row."""
    limiter.session.clock = None
    await limiter.debit("first", tier="pro", has_hardware=True)
    async with Persister(limiter.session, path, interval_s=0.02, lease_s=30) as persister:
        await eventually(lambda: persister.last_good_at)
        yield persister


async def fails_and_recovers(
    limiter: CreditLimiter, persister: Persister, path: Path, cause: str, repair: Callable[[], object]
) -> None:
    """Change a row, wait for the error, then repair the disk and wait for the next good dump."""
    await limiter.debit("second", tier="pro", has_hardware=True)
    await eventually(lambda: persister.last_error)
    assert cause in str(persister.report()["error"])
    good_at = persister.last_good_at
    assert good_at
    repair()
    await eventually(lambda: persister.last_error is None and str(persister.last_good_at) > good_at)
    await eventually(lambda: b'"second":' in path.read_bytes())
    assert verify(path).is_good
    assert not list(path.parent.glob("*.tmp"))


async def test_persister_when_the_disk_is_full_then_the_old_file_stays_until_there_is_room(
    limiter: CreditLimiter, disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = disk / "credits.json"
    async with dumped(limiter, path) as persister:
        before = path.read_bytes()
        fill(disk / "other")

        def repair() -> None:
            assert path.read_bytes() == before
            (disk / "other").unlink()

        await fails_and_recovers(limiter, persister, path, "No space left on device; nothing was replaced", repair)
    assert "The file was not written" in caplog.text


async def test_persister_when_the_disk_turns_read_only_then_the_old_file_stays_until_it_can_be_written(
    limiter: CreditLimiter, disk: Path
) -> None:
    path = disk / "credits.json"
    async with dumped(limiter, path) as persister:
        before = path.read_bytes()
        remount = ["mount", "-o", "remount,ro", str(disk)]
        await eventually(lambda: subprocess.run(remount, check=False, capture_output=True).returncode == 0)

        def repair() -> None:
            assert path.read_bytes() == before
            subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)

        await fails_and_recovers(limiter, persister, path, "Read-only file system", repair)


async def test_persister_when_its_folder_vanishes_then_it_is_not_created_again_and_its_return_is_noticed(
    limiter: CreditLimiter, tmp_path: Path
) -> None:
    """It may be a disk that is not mounted: what is written under its mount point is hidden once it is mounted."""
    path = tmp_path / "data" / "credits.json"
    async with dumped(limiter, path) as persister:
        path.parent.rename(tmp_path / "moved")

        def repair() -> None:
            assert not path.parent.exists()
            (tmp_path / "moved").rename(path.parent)

        await fails_and_recovers(limiter, persister, path, "No such file or directory", repair)


async def test_persister_when_a_file_cannot_be_brought_to_disk_then_the_old_one_stays(
    limiter: CreditLimiter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but a broken disk fails an fsync: here the call itself says so."""
    path = tmp_path / "credits.json"
    async with dumped(limiter, path) as persister:
        before, sync = path.read_bytes(), os.fsync

        def failing(descriptor: int) -> None:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            sync(descriptor)

        monkeypatch.setattr(os, "fsync", failing)

        def repair() -> None:
            assert path.read_bytes() == before
            monkeypatch.setattr(os, "fsync", sync)

        await fails_and_recovers(limiter, persister, path, "Input/output error; nothing was replaced", repair)


async def test_persister_when_its_file_is_replaced_during_the_scan_then_the_other_one_is_set_aside_and_not_lost(
    limiter: CreditLimiter, redis: Redis, tmp_path: Path
) -> None:
    path = tmp_path / "credits.json"
    async with dumped(limiter, path) as persister:
        shutil.copy(path, tmp_path / "theirs")
        (tmp_path / "theirs").write_text('{"rows": {"theirs": {}}}')
        (tmp_path / "theirs").replace(path)
        await limiter.debit("second", tier="pro", has_hardware=True)
        await eventually(lambda: path.read_bytes().startswith(b'{"rows": {\n') and persister.last_error is None)
    kept = list(tmp_path.glob("credits.json.before-*"))
    assert [each.read_text() for each in kept] == ['{"rows": {"theirs": {}}}']
    assert await redis.exists("credits:install:theirs") == 0


async def test_persisters_when_two_run_then_one_writes_and_the_other_stands_by_and_takes_over_at_once_on_its_end(
    limiter: CreditLimiter, tmp_path: Path
) -> None:
    path = tmp_path / "credits.json"
    async with dumped(limiter, path) as first, Persister(limiter.session, path, interval_s=0.02, lease_s=0.3) as second:
        await eventually(lambda: second.role == "standby")
        report = second.report()
        assert (report["writer"], report["epoch"], report["error"]) == (first.report()["writer"], 1, None)
        await eventually(lambda: second.last_good_at)  # the fleet's: a standby shows it, too
        first.stop()
        await eventually(lambda: second.role == "writer")
        assert second.report()["epoch"] == 2
        await limiter.debit("second", tier="pro", has_hardware=True)
        await eventually(lambda: b'"second":' in path.read_bytes())
