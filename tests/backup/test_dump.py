# ruff: noqa: ASYNC240  the tests look at small files; nothing else waits for their loop
import asyncio
import base64
import json
import os
import stat
import subprocess
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis

from limiter import CreditLimiter, LedgerFileError, LimiterUnavailable, connect
from limiter.backup.dump import dump
from limiter.credits.models import STORED_FIELDS, Row
from limiter.credits.scripts import stored_values
from limiter.ledger.file import LedgerFile
from limiter.ledger.rotation import generations, prune
from limiter.ledger.row_codec import line_from_row
from limiter.ledger.row_fast_path import line_from_values
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


# One dump


async def test_dump_when_there_are_rows_then_the_file_has_them_as_they_are_read(
    limiter: CreditLimiter, path: Path
) -> None:
    for number in range(30):
        await limiter.debit(f"i-{number}", tier="pro", has_hardware=True, cost=number + 1)
    report = await dump(limiter.session, path)
    assert report.clean
    assert (report.rows, report.kept, report.broken_file) == (30, None, None)
    expected = {}
    for number in range(30):
        row = await limiter.row(f"i-{number}")
        assert row
        expected[row.install_id] = row.as_dict()
    assert rows_of(path) == expected
    assert json.loads(path.read_text())["meta"]["time"] == report.time == "2026-05-11T23:02:57.123Z"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_dump_when_credits_are_held_then_the_holds_are_not_in_the_file(
    limiter: CreditLimiter, path: Path
) -> None:
    await limiter.reserve("a", tier="pro", has_hardware=True, cost=5, hold_id="h-1")
    await dump(limiter.session, path)
    assert "h-1" not in path.read_text()
    assert "held" not in rows_of(path)["a"]
    assert rows_of(path)["a"]["monthly_consumed"] == 0


async def test_dump_when_its_checksum_is_taken_with_two_common_tools_then_it_is_that_of_meta(
    limiter: CreditLimiter, path: Path
) -> None:
    await limiter.debit("a", tier="pro", has_hardware=True)
    report = await dump(limiter.session, path)
    command = ["sh", "-c", 'head -c -88 "$0" | sha256sum', str(path)]
    reported = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=True)
    assert report.checksum == f"sha256:{reported.stdout.split()[0]}"


async def test_dump_when_there_is_nothing_then_an_empty_ledger_is_written(limiter: CreditLimiter, path: Path) -> None:
    assert (await dump(limiter.session, path)).rows == 0
    assert rows_of(path) == {}
    assert (await dump(limiter.session, path)).rows == 0


async def test_dump_when_rows_are_broken_then_the_others_are_written_and_the_broken_are_kept_raw(
    limiter: CreditLimiter, redis: Redis, path: Path
) -> None:
    await limiter.debit("good", tier="pro", has_hardware=True)
    for name in ("counter", "tier", "extra"):
        await limiter.debit(name, tier="pro", has_hardware=True)
    await redis.hset("credits:install:counter", "monthly_consumed", "lots")
    await redis.hset("credits:install:tier", "tier_snapshot", "a tier")
    await redis.hset("credits:install:extra", "extra", "{")
    await redis.set("credits:install:string", b"\xff")
    report = await dump(limiter.session, path)
    assert list(rows_of(path)) == ["good"]
    assert not report.clean
    assert (report.rows, report.broken, len(report.first_broken)) == (1, 4, 4)
    broken_file = path.with_name("credits.json.broken.json")
    assert report.broken_file == broken_file
    reported = {each["key"]: each for each in json.loads(broken_file.read_text())["broken"]}
    assert set(reported) == {f"credits:install:{name}" for name in ("counter", "tier", "extra", "string")}
    assert "field monthly_consumed is 'lots'" in reported["credits:install:counter"]["reason"]
    assert reported["credits:install:tier"]["fields"]["tier_snapshot"] == "a tier"
    assert "field extra is '{', want a JSON object" in reported["credits:install:extra"]["reason"]
    await redis.flushdb()
    for key, each in reported.items():  # nothing of them is lost
        await redis.restore(key, 0, base64.b64decode(each["dump"]))
    assert await redis.get("credits:install:string") == b"\xff"
    assert await redis.hget("credits:install:counter", "monthly_consumed") == b"lots"


async def test_dump_when_no_row_can_be_read_then_the_file_stays(
    limiter: CreditLimiter, redis: Redis, path: Path
) -> None:
    await limiter.debit("a", tier="pro", has_hardware=True)
    await dump(limiter.session, path)
    before = path.read_bytes()
    await redis.hset("credits:install:a", "last_renewal_at", "x")
    with pytest.raises(LedgerFileError, match="not one of the 1 rows in Redis can be read"):
        await dump(limiter.session, path)
    assert path.read_bytes() == before
    assert names(path.parent) == ["credits.json"]


async def test_dump_when_a_uuid_key_is_in_upper_case_then_it_is_reported_and_the_file_stays_valid(
    limiter: CreditLimiter, redis: Redis, path: Path
) -> None:
    install_id = "b879d5d7-bb73-4526-a28e-55a8af93660b"
    await limiter.debit(install_id, tier="pro", has_hardware=True)
    fields = await redis.hgetall(f"credits:install:{install_id}")
    await redis.hset(f"credits:install:{install_id.upper()}", mapping=fields)  # type: ignore[arg-type]  # redis-py 8.1
    report = await dump(limiter.session, path)
    assert report.first_broken == (f"row '{install_id.upper()}': its key is not in lower case",)
    with LedgerFile(path) as file:
        assert [each for each, _ in file.members()] == [install_id]


async def test_dump_when_its_folder_is_missing_then_it_says_so(limiter: CreditLimiter, tmp_path: Path) -> None:
    with pytest.raises(LedgerFileError, match="cannot be written: No such file or directory"):
        await dump(limiter.session, tmp_path / "none" / "credits.json")


async def test_dump_when_its_folder_cannot_be_written_then_it_says_so(limiter: CreditLimiter) -> None:
    with pytest.raises(LedgerFileError, match="cannot be written: "):
        await dump(limiter.session, Path("/proc/credits.json"))  # not even root can make a file there


async def test_dump_when_its_file_is_a_pipe_or_a_folder_then_it_says_so_and_leaves_it(
    limiter: CreditLimiter, path: Path
) -> None:
    os.mkfifo(path)
    await limiter.debit("i-1", tier="pro", has_hardware=True)
    for taken, cause in ((path, "it is not a regular file"), (Path("/"), "Is a directory"), (Path(), "Is a directory")):
        with pytest.raises(LedgerFileError, match=f"cannot be written: {cause}"):
            await dump(limiter.session, taken)
    assert path.is_fifo()
    assert names(path.parent) == [path.name]


async def test_dump_when_redis_becomes_unavailable_midway_then_the_old_file_stays(
    own_server: Callable[..., Server], path: Path, closing: AsyncExitStack
) -> None:
    server = own_server()
    redis = await connect(server.url)
    closing.push_async_callback(redis.aclose)
    limiter = CreditLimiter(redis, TIERS)
    await limiter.debit("a", tier="pro", has_hardware=True)
    await dump(limiter.session, path)
    before = path.read_bytes()
    server.kill()
    with pytest.raises(LimiterUnavailable):
        await dump(limiter.session, path)
    assert path.read_bytes() == before
    assert names(path.parent) == ["credits.json", "server-0"]


async def test_dump_when_it_is_cancelled_then_the_old_file_stays_and_no_temp_file(
    own_server: Callable[..., Server], path: Path, closing: AsyncExitStack, clock: Clock
) -> None:
    server = own_server()
    redis = await connect(server.url)
    closing.push_async_callback(redis.aclose)
    limiter = CreditLimiter(redis, TIERS, clock=clock)
    await limiter.debit("a", tier="pro", has_hardware=True)
    await dump(limiter.session, path)
    before = path.read_bytes()
    server.pause()
    task = asyncio.ensure_future(dump(limiter.session, path))
    await eventually(lambda: len(names(path.parent)) > 2)
    task.cancel()
    server.resume()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert path.read_bytes() == before
    assert names(path.parent) == ["credits.json", "server-0"]


# What it may replace


async def test_dump_when_a_file_with_rows_meets_an_empty_redis_then_it_refuses_and_says_to_import(
    limiter: CreditLimiter, path: Path
) -> None:
    """An operator who starts with a credits.json before importing it must not lose it."""
    path.write_text(json.dumps(OLD))
    with pytest.raises(LedgerFileError, match=r"it has rows and Redis has none. Import it first \(limiter import "):
        await dump(limiter.session, path)
    path.write_text("{broken")
    with pytest.raises(LedgerFileError, match="Import it first"):
        await dump(limiter.session, path)
    assert path.read_text() == "{broken"
    assert names(path.parent) == ["credits.json"]


@pytest.mark.parametrize("content", ["", '{"rows": {}}'])
async def test_dump_when_the_file_has_nothing_to_lose_then_it_is_replaced(
    limiter: CreditLimiter, path: Path, content: str
) -> None:
    path.write_text(content)
    assert (await dump(limiter.session, path)).rows == 0
    assert rows_of(path) == {}


@pytest.mark.parametrize("content", [json.dumps(OLD), "{broken", '{"rows": {"brought": 5}}'])
async def test_dump_when_the_file_was_never_imported_then_it_is_kept_under_another_name(
    limiter: CreditLimiter, path: Path, content: str
) -> None:
    path.write_text(content)
    inode = path.stat().st_ino
    await limiter.debit("new", tier="pro", has_hardware=True)
    report = await dump(limiter.session, path)
    assert report.kept == path.with_name("credits.json.before-20260511T230257.123Z")
    assert (report.kept.read_text(), report.kept.stat().st_ino) == (content, inode)
    assert list(rows_of(path)) == ["new"]


async def test_dump_when_a_dump_is_replaced_then_it_stays_under_its_time_and_so_do_the_latest_of_them(
    limiter: CreditLimiter, path: Path, clock: Clock
) -> None:
    for number in range(6):
        await limiter.debit(f"i-{number}", tier="core", has_hardware=True)
        report = await dump(limiter.session, path, keep=3)
        assert report.file.trailer
        assert (report.rows, report.file.trailer.sequence, report.is_set_aside) == (number + 1, number + 1, False)
        clock.now_ms += 1000
    assert names(path.parent) == [
        "credits.json",
        "credits.json.20260511T230300.123Z",
        "credits.json.20260511T230301.123Z",
    ]
    assert [len(rows_of(each.path)) for each in generations(path)] == [6, 5, 4]


async def test_dump_when_the_rows_are_those_of_the_file_then_nothing_is_replaced(
    limiter: CreditLimiter, path: Path, clock: Clock
) -> None:
    await limiter.debit("a", tier="pro", has_hardware=True)
    first = await dump(limiter.session, path)
    clock.now_ms += 1000
    for last in (first.file, None):  # None: as after a restart
        again = await dump(limiter.session, path, last=last)
        assert (again.unchanged, again.kept, again.time) == (True, None, "2026-05-11T23:02:58.123Z")
        assert (again.rows, again.checksum, again.size_bytes) == (1, first.checksum, path.stat().st_size)
        assert first.file.is_still(path.stat())
    await limiter.reserve("a", tier="pro", has_hardware=True)  # a hold is not in the file
    assert (await dump(limiter.session, path)).unchanged
    await limiter.debit("a", tier="pro", has_hardware=True)
    assert not (await dump(limiter.session, path)).unchanged


async def test_dump_when_rows_are_missing_from_it_then_the_last_whole_one_is_never_removed(
    limiter: CreditLimiter, redis: Redis, path: Path, clock: Clock
) -> None:
    for number in range(20):
        await limiter.debit(f"i-{number}", tier="pro", has_hardware=True)
    whole = await dump(limiter.session, path, keep=2)
    await redis.hset("credits:install:i-0", "monthly_consumed", "x")
    for _ in range(4):
        clock.now_ms += 1000
        await limiter.debit("i-1", tier="pro", has_hardware=True)
        assert (await dump(limiter.session, path, keep=2)).broken == 1
    assert [each.trailer.broken for each in generations(path) if each.trailer] == [1, 1, 0]
    assert generations(path)[-1].trailer == whole.file.trailer
    await redis.hset("credits:install:i-0", "monthly_consumed", "1")
    await dump(limiter.session, path, keep=2)
    assert [each.trailer.broken for each in generations(path) if each.trailer] == [0, 1]


async def test_prune_when_the_file_itself_is_broken_then_nothing_is_removed(
    limiter: CreditLimiter, path: Path, clock: Clock
) -> None:
    for _ in range(3):
        await limiter.debit("a", tier="pro", has_hardware=True)
        await dump(limiter.session, path)
        clock.now_ms += 1000
    content = bytearray(path.read_bytes())
    content[30] ^= 1
    path.write_bytes(content)
    assert prune(path, 1) == []
    content[30] ^= 1
    path.write_bytes(content)
    assert len(prune(path, 1)) == 2
    assert names(path.parent) == ["credits.json"]


async def test_dump_when_another_file_was_put_there_then_it_is_kept(limiter: CreditLimiter, path: Path) -> None:
    await limiter.debit("a", tier="pro", has_hardware=True)
    first = await dump(limiter.session, path)
    second = await dump(limiter.session, path, last=first.file)
    assert second.unchanged
    path.with_name("other").write_text(json.dumps(OLD))
    path.with_name("other").rename(path)
    third = await dump(limiter.session, path, last=second.file)
    assert third.kept is not None
    assert json.loads(third.kept.read_text()) == OLD


async def test_dump_when_redis_lost_most_rows_then_the_larger_file_is_kept(
    limiter: CreditLimiter, redis: Redis, path: Path
) -> None:
    for number in range(20):
        await limiter.debit(f"i-{number}", tier="pro", has_hardware=True)
    last = await dump(limiter.session, path)
    await redis.delete("credits:install:i-0")
    last = await dump(limiter.session, path, last=last.file)
    assert not last.is_set_aside
    await redis.flushdb()
    await limiter.debit("i-1", tier="pro", has_hardware=True)
    report = await dump(limiter.session, path, last=last.file)
    assert report.kept is not None
    assert report.is_set_aside
    assert len(rows_of(report.kept)) == 19
    await limiter.debit("i-2", tier="pro", has_hardware=True)
    assert not (await dump(limiter.session, path, last=report.file)).is_set_aside


async def test_dump_when_a_kept_name_is_taken_then_the_next_is_used(limiter: CreditLimiter, path: Path) -> None:
    await limiter.debit("a", tier="pro", has_hardware=True)
    for _ in range(2):  # at one moment of the clock
        path.write_text(json.dumps(OLD))
        await dump(limiter.session, path)
    kept = "credits.json.before-20260511T230257.123Z"
    assert names(path.parent) == ["credits.json", kept, f"{kept}-2"]


# The short way from Redis' values to a line


def any_time(place: str) -> st.SearchStrategy[str]:
    return st.sampled_from([f"{year}-{day}T{place}Z" for year in (1970, 2024, 2999, 9998) for day in DAYS])


DAYS = ("01-01", "02-28", "02-29", "04-30", "12-31")
COUNTS = st.sampled_from([0, 1, 9, 10, 10**15 - 1, 10**15, 2**53 - 1])
ROWS = st.builds(
    Row,
    install_id=st.from_regex(r"[A-Za-z0-9._-]{1,64}", fullmatch=True),
    tier_snapshot=st.from_regex(r"[A-Za-z0-9_-]{1,20}", fullmatch=True),
    lifetime_consumed=COUNTS,
    lifetime_gemini_consumed=COUNTS,
    last_renewal_at=any_time("23:59:59.999"),
    anniversary_day=st.integers(1, 31),
    monthly_consumed=COUNTS,
    monthly_gemini_consumed=COUNTS,
    last_active_at=any_time("00:00:00.000"),
    extra=st.sampled_from(["", '{"note":"\\u00e9"}']),
)


@given(row=ROWS)
def test_line_when_it_is_made_of_the_stored_values_then_it_is_that_of_the_row_or_none(row: Row) -> None:
    values = [str(value).encode() or None for value in stored_values(row)]
    try:
        line = line_from_row(row)
    except LedgerFileError:
        line = None
    assert line_from_values(row.install_id.encode(), values) in (None, line)


@pytest.mark.parametrize("place", range(len(STORED_FIELDS) - 1))
@pytest.mark.parametrize("value", [None, b"", b"-1", b'"', b"01", b"1\n2", b"\xff", b"2026-13-01T00:00:00.000Z"])
def test_line_when_a_stored_value_is_odd_then_it_is_left_for_a_closer_look(place: int, value: bytes | None) -> None:
    time = b"2026-05-11T23:02:57.123Z"
    values = [b"pro", b"1", b"2", time, b"31", b"3", b"4", time, None]
    assert line_from_values(b"a", values)
    values[place] = value
    is_a_tier = place == 0 and value in (b"-1", b"01")
    assert (line_from_values(b"a", values) is not None) == is_a_tier
