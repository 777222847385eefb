"""Writing a file: all of it or nothing, whatever happens on the way."""

import asyncio
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from decimal import Decimal
from pathlib import Path

import pytest

from limiter import LedgerFileError, Row
from limiter.ledger.trailer import Trailer, check_trailer, read_trailer
from limiter.ledger.writer import LedgerWriter
from tests.support.ledger_files import NOW, NOW_MS, PERIOD, files, read, row, write_ledger


async def test_write_when_rows_are_given_then_the_file_is_the_described_one(tmp_path: Path) -> None:
    path = tmp_path / "credits.json"
    written = await write_ledger(path, (row(name) for name in ("a", "b", "c")), now_ms=NOW_MS, epoch=7, sequence=41)
    lines = path.read_bytes().splitlines(keepends=True)
    assert lines[0] == b'{"rows": {\n'
    assert lines[1] == (
        b'"a":{"install_id":"a","tier_snapshot":"core","lifetime_consumed":0,"lifetime_gemini_consumed":0,'
        b'"last_renewal_at":"2026-05-04T21:24:54.719Z","anniversary_day":4,"monthly_consumed":0,'
        b'"monthly_gemini_consumed":0,"last_active_at":"2026-05-04T21:24:54.719Z"},\n'
    )
    checksum = "sha256:" + hashlib.sha256(path.read_bytes()[:-88]).hexdigest()
    assert json.loads(path.read_text())["meta"] == {
        "format": 1,
        "epoch": 7,
        "sequence": 41,
        "time": NOW,
        "rows": 3,
        "broken": 0,
        "checksum": checksum,
    }
    assert written.trailer == read_trailer(path) == Trailer(7, 41, NOW, 3, 0, checksum)
    assert check_trailer(path) == written
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert files(tmp_path) == ["credits.json"]


async def test_write_when_there_are_no_rows_then_the_file_is_an_empty_ledger(tmp_path: Path) -> None:
    path = tmp_path / "credits.json"
    await write_ledger(path, [], now_ms=NOW_MS)
    assert read(path) == {}


async def test_write_when_the_old_ledger_loads_it_then_its_rows_are_there(tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    path = tmp_path / "credits.json"
    await write_ledger(path, [row("a", monthly_consumed=7, note="é 😀", price=Decimal("1.10"))], now_ms=NOW_MS)
    script = """
        let ledger = JSON.parse(await require("fs/promises").readFile(process.argv[1], "utf8")) || { rows: {} };
        if (!ledger.rows) ledger.rows = {};
        const row = ledger.rows["a"];
        console.log(JSON.stringify([new Date(row.last_renewal_at).toISOString(), row.monthly_consumed, row.note]));
    """
    command = [node, "-e", f"(async () => {{ {script} }})()", str(path)]
    output = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=True)
    assert json.loads(output.stdout) == [PERIOD["last_renewal_at"], 7, "é 😀"]


async def test_write_when_it_publishes_then_file_and_folder_are_synced_around_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real calls run; they are only noted on the way."""
    path = tmp_path / "credits.json"
    path.write_text("old")
    noted: list[str] = []
    sync, rename = os.fsync, Path.replace

    def noting_sync(descriptor: int) -> None:
        target = Path(f"/proc/self/fd/{descriptor}").readlink()
        noted.append(f"fsync {'folder' if target == tmp_path else 'temp' if target.suffix == '.tmp' else target}")
        assert (path.read_text() == "old") == (target != tmp_path)
        sync(descriptor)

    def noting_rename(source: Path, target: Path) -> Path:
        assert source.parent == tmp_path
        assert stat.S_IMODE(source.stat().st_mode) == 0o600
        noted.append(f"rename to {target.name}")
        return rename(source, target)

    monkeypatch.setattr(os, "fsync", noting_sync)
    monkeypatch.setattr(Path, "replace", noting_rename)
    await write_ledger(path, [row()], now_ms=NOW_MS)
    assert noted == ["fsync temp", "rename to credits.json", "fsync folder"]


async def test_write_when_the_rows_fail_midway_then_the_old_file_stays_and_no_temp_file(tmp_path: Path) -> None:
    path = tmp_path / "credits.json"
    path.write_text("old")

    def failing() -> Iterator[Row]:
        yield from (row(f"i-{number}") for number in range(5000))
        raise RuntimeError("the source ended")

    with pytest.raises(RuntimeError, match="the source ended"):
        await write_ledger(path, failing(), now_ms=NOW_MS)
    assert path.read_text() == "old"
    assert files(tmp_path) == ["credits.json"]


async def test_write_when_it_is_cancelled_midway_then_the_old_file_stays_and_no_temp_file(tmp_path: Path) -> None:
    path = tmp_path / "credits.json"
    path.write_text("old")

    async def cancelling() -> AsyncIterator[Row]:
        for number in range(5000):
            yield row(f"i-{number}")
        task.cancel()
        await asyncio.sleep(0)

    task = asyncio.ensure_future(write_ledger(path, cancelling(), now_ms=NOW_MS))
    with pytest.raises(asyncio.CancelledError):
        await task
    assert path.read_text() == "old"
    assert files(tmp_path) == ["credits.json"]


FILL_THE_DISK = """
import asyncio, resource, sys
from pathlib import Path
from limiter.errors import LedgerFileError
from limiter.ledger.row_codec import row_from_member
from tests.support.ledger_files import write_ledger
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
rows = (row_from_member(f"i-{number}", {}, now_ms=0) for number in range(100_000))
try:
    asyncio.run(write_ledger(Path(sys.argv[1]), rows, now_ms=0))
except LedgerFileError as error:
    print(error)
"""


def test_write_when_the_disk_is_full_then_the_old_file_stays_and_no_temp_file(tmp_path: Path) -> None:
    path = tmp_path / "credits.json"
    path.write_text("old")
    command = [sys.executable, "-c", FILL_THE_DISK, str(path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output == f"{path} cannot be written: File too large; nothing was replaced\n"
    assert path.read_text() == "old"
    assert files(tmp_path) == ["credits.json"]


async def test_write_when_the_target_is_a_folder_or_its_folder_is_missing_then_the_error_says_so(
    tmp_path: Path,
) -> None:
    for path, cause in (
        (tmp_path, "Is a directory"),
        (tmp_path / "none" / "credits.json", "No such file or directory"),
    ):
        with pytest.raises(LedgerFileError, match=f"{path} cannot be written: {cause}"):
            await write_ledger(path, [row()], now_ms=NOW_MS)


async def test_write_when_the_target_is_a_link_then_what_it_points_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "credits.json").write_text("old")
    (tmp_path / "credits.json").symlink_to("real/credits.json")
    await write_ledger(tmp_path / "credits.json", [row()], now_ms=NOW_MS)
    assert (tmp_path / "credits.json").is_symlink()
    assert list(read(tmp_path / "real" / "credits.json")) == ["a"]


async def test_write_when_killed_writers_left_temp_files_then_they_are_removed_and_a_living_ones_stays(
    tmp_path: Path,
) -> None:
    dead, fresh = tmp_path / ".credits.json.dead.tmp", tmp_path / ".credits.json.new.tmp"
    for path in (dead, fresh):
        path.write_text("half")
    with LedgerWriter(tmp_path / "credits.json"):
        alive = next(tmp_path / name for name in files(tmp_path) if tmp_path / name not in (dead, fresh))
        for path in (dead, alive):
            os.utime(path, (0, 0))
        await write_ledger(tmp_path / "credits.json", [row()], now_ms=NOW_MS)
        assert files(tmp_path) == sorted([alive.name, ".credits.json.new.tmp", "credits.json"])
