import asyncio
import json
import re
import stat
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from limiter import CreditLimiter, LedgerFileError, LimiterUnavailable, PutStatus, Row, connect
from limiter._util.timestamps import iso_from_ms
from limiter.backup.dump import dump
from limiter.backup.importer import _BATCHES_SENT, BATCH_ROWS, Progress, import_file
from limiter.credits.models import ROW_MEMBERS
from limiter.credits.scripts import PutMode
from limiter.ledger.file import LedgerFile
from tests.support.credits import TIERS, Clock
from tests.support.imports import Member, counts, dumps, many, member, run_import
from tests.support.redis_servers import Server

Ledger = Callable[..., Path]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """Write a credits.json of these rows, as the old ledger would."""

    def make(rows: dict[str, object], name: str = "credits.json") -> Path:
        path = tmp_path / name
        path.write_text(json.dumps({"rows": rows}))
        return path

    return make


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def rows_of(path: Path) -> list[bytes]:
    """The lines of the rows, in order of install ids, without the commas between them."""
    return sorted(line.rstrip(b",") for line in path.read_bytes().splitlines()[1:-1])


# Into an empty Redis


async def test_import_when_redis_is_empty_then_every_row_is_in(limiter: CreditLimiter, ledger: Ledger) -> None:
    report = await run_import(limiter, ledger(many(2 * BATCH_ROWS + 1)))
    assert (report.total, *counts(report)) == (2 * BATCH_ROWS + 1, 2 * BATCH_ROWS + 1, 0, 0, 0)
    row = await limiter.row("i-200")
    assert row
    assert row.as_dict() == {"install_id": "i-200"} | member(monthly_consumed=200)


async def test_import_when_it_is_a_dry_run_then_it_reports_the_same_and_writes_nothing(
    limiter: CreditLimiter, redis: Redis, ledger: Ledger
) -> None:
    path = ledger(many(7) | {"bad": 5})
    report = await run_import(limiter, path, dry_run=True)
    assert counts(report) == (7, 0, 0, 1)
    assert report.rejected_file is None
    assert await dumps(redis) == {}
    assert names(path.parent) == ["credits.json"]


async def test_import_when_it_is_repeated_then_nothing_changes(
    limiter: CreditLimiter, redis: Redis, clock: Clock, ledger: Ledger
) -> None:
    """Rows without a period begin at the import: a repeat, at another time, must not begin them again."""
    undated = {
        "none": {},
        "day": {"anniversary_day": 31},
        "used": {"monthly_consumed": 3, "last_active_at": "2026-01-01"},
    }
    path = ledger(many(600) | undated | {"month": {"month": "2025-10", "x": 1.5}, "other": member(note="é")})
    assert counts(await run_import(limiter, path)) == (605, 0, 0, 0)
    before = await dumps(redis)
    for mode in ("create", "merge", "replace"):
        clock.now_ms += 86_400_000
        assert counts(await run_import(limiter, path, mode, dry_run=True)) == (0, 605, 0, 0), mode
        assert counts(await run_import(limiter, path, mode)) == (0, 605, 0, 0), mode
    assert await dumps(redis) == before


async def test_import_when_a_row_has_no_period_then_it_begins_at_the_servers_time(redis: Redis, ledger: Ledger) -> None:
    limiter = CreditLimiter(redis, TIERS)
    seconds, microseconds = await redis.time()
    await run_import(limiter, ledger({"a": {}, "b": {}}))
    first, second = await limiter.row("a"), await limiter.row("b")
    assert first
    assert second
    assert first.last_renewal_at == second.last_renewal_at  # one moment for the whole file
    assert iso_from_ms(seconds * 1000 + microseconds // 1000) <= first.last_renewal_at


@pytest.mark.slow
async def test_import_when_it_is_cancelled_midway_and_repeated_then_the_end_is_the_same(
    limiter: CreditLimiter, redis: Redis, ledger: Ledger
) -> None:
    rows = (_BATCHES_SENT + 5) * BATCH_ROWS  # so many batches may be under way when it is cancelled, and come in, too
    path = ledger(many(rows))
    reached = asyncio.Event()

    def watch(progress: Progress) -> None:
        if progress.phase == "write" and progress.rows >= 2 * BATCH_ROWS:
            reached.set()
            task.cancel()

    task = asyncio.ensure_future(import_file(limiter.session, path, mode="create", dry_run=False, on_progress=watch))
    with pytest.raises(asyncio.CancelledError):
        await task
    assert reached.is_set()
    assert 2 * BATCH_ROWS <= await redis.dbsize() < rows
    report = await run_import(limiter, path)
    assert report.new + report.same == rows
    assert report.same >= 2 * BATCH_ROWS
    interrupted = await dumps(redis)
    await redis.flushdb()
    await run_import(limiter, path)
    assert await dumps(redis) == interrupted


async def test_import_when_the_server_forgets_its_scripts_midway_then_it_goes_on(
    limiter: CreditLimiter, ledger: Ledger, redis_url: str
) -> None:
    other = await connect(redis_url)

    def forget(_: Progress) -> None:
        flushes.append(asyncio.ensure_future(other.script_flush()))

    flushes: list[asyncio.Future[Any]] = []
    path = ledger(many(3 * BATCH_ROWS))
    report = await import_file(limiter.session, path, mode="create", dry_run=False, on_progress=forget)
    await asyncio.gather(*flushes)
    await other.aclose()
    assert counts(report) == (3 * BATCH_ROWS, 0, 0, 0)


@pytest.mark.slow
async def test_import_when_redis_dies_midway_then_it_says_so_and_a_repeat_completes_it(
    own_server: Callable[..., Server], ledger: Ledger
) -> None:
    server = own_server()
    redis = await connect(server.url)
    limiter = CreditLimiter(redis, TIERS)
    path = ledger(many(9 * BATCH_ROWS))

    def kill(progress: Progress) -> None:
        if progress.phase == "write" and progress.rows == BATCH_ROWS:
            server.kill()

    with pytest.raises(LimiterUnavailable):
        await import_file(limiter.session, path, mode="create", dry_run=False, on_progress=kill)
    server.start()
    report = await run_import(limiter, path)
    assert sum(counts(report)) == report.new + report.same == 9 * BATCH_ROWS
    assert report.same >= BATCH_ROWS
    await redis.aclose()


async def test_import_when_it_runs_then_progress_goes_through_the_file_in_each_phase(
    limiter: CreditLimiter, ledger: Ledger
) -> None:
    path = ledger(many(2 * BATCH_ROWS + 5))
    seen: list[Progress] = []
    await import_file(limiter.session, path, mode="create", on_progress=seen.append)
    await import_file(limiter.session, path, mode="create", on_progress=seen.append)
    began = seen.pop(3)  # from here on something may be in
    assert (began.phase, began.rows, began.read_bytes) == ("write", 0, 0)
    assert [each.phase for each in seen] == ["check"] * 3 + ["write"] * 3 + ["check"] * 3 + ["compare"] * 3
    for first, middle, last in zip(seen[::3], seen[1::3], seen[2::3], strict=True):
        assert 0 < first.read_bytes <= middle.read_bytes <= last.read_bytes == last.size_bytes == path.stat().st_size
        assert (first.rows, last.rows) == (BATCH_ROWS, 2 * BATCH_ROWS + 5)


# Bad rows and bad files


async def test_import_when_some_rows_are_bad_then_the_good_ones_are_in_and_the_bad_ones_are_reported(
    limiter: CreditLimiter, ledger: Ledger
) -> None:
    bad = {
        "b-1": member(monthly_consumed=-1),
        "b 2": member(),
        "b-3": None,
        "b-4": member(price=1.1, last_active_at="x"),
    }
    path = ledger(many(3) | bad)
    report = await run_import(limiter, path)
    assert (report.total, *counts(report)) == (7, 3, 0, 0, 4)
    assert [each.install_id for each in report.first_rejected] == list(bad)
    rejected_file = path.with_name("credits.json.rejected.json")
    assert report.rejected_file == rejected_file
    assert stat.S_IMODE(rejected_file.stat().st_mode) == 0o600
    listed = json.loads(rejected_file.read_text())["rejected"]
    assert [(each["install_id"], each["row"]) for each in listed] == list(bad.items())
    assert [each["reason"] for each in listed] == [each.reason for each in report.first_rejected]
    assert listed[0]["reason"] == "row 'b-1': monthly_consumed is -1, want an integer from 0 to 2^53 - 1"
    assert report.faults == {
        "monthly_consumed: want an integer from 0 to 2^53 - 1": 1,
        "the install id is not usable": 1,
        "it: want an object": 1,
        "last_active_at: want a time like 2026-05-11T23:02:57.123Z": 1,
    }
    assert await limiter.row("b-1") is None


async def test_dry_run_when_rows_are_bad_then_what_is_wrong_is_counted_the_most_frequent_first(
    limiter: CreditLimiter, ledger: Ledger
) -> None:
    bad = {f"m-{number}": member(monthly_consumed=-number - 1) for number in range(3)} | {
        f"t-{number}": member(tier_snapshot=f"t {number}") for number in range(5)
    }
    report = await import_file(limiter.session, ledger(many(2) | bad), mode="create", dry_run=True)
    assert list(report.faults.items()) == [
        ("tier_snapshot: want 1 to 20 characters of A-Z a-z 0-9 _ -", 5),
        ("monthly_consumed: want an integer from 0 to 2^53 - 1", 3),
    ]


async def test_import_when_most_rows_are_bad_then_all_are_in_the_file_and_the_first_in_the_report(
    limiter: CreditLimiter, ledger: Ledger
) -> None:
    report = await run_import(limiter, ledger({f"b-{number}": number for number in range(1200)}))
    assert report.rejected == 1200
    assert len(report.first_rejected) == 20
    assert report.rejected_file
    assert len(json.loads(report.rejected_file.read_text())["rejected"]) == 1200


@pytest.mark.parametrize(
    "broken",
    [b"", b'{"rows": {"i-0": {}, "i-1": {"a":', b'{"rows": {"i-0": {}, "i-0": {}}}', b"[]", b'{"rows": {"a": NaN}}'],
)
async def test_import_when_the_file_is_unreadable_then_it_refuses_says_where_and_changes_nothing(
    limiter: CreditLimiter, redis: Redis, tmp_path: Path, ledger: Ledger, broken: bytes
) -> None:
    """Where the old ledger starts empty, and overwrites the file."""
    await run_import(limiter, ledger(many(3), "first.json"))
    before = await dumps(redis)
    path = tmp_path / "credits.json"
    path.write_bytes(broken)
    for mode in ("create", "merge", "replace"):
        with pytest.raises(LedgerFileError, match=rf"^{path} line \d+, column \d+: "):
            await run_import(limiter, path, mode)
    assert await dumps(redis) == before
    assert path.read_bytes() == broken
    assert names(tmp_path) == ["credits.json", "first.json"]


async def test_import_when_a_late_row_breaks_the_file_then_the_early_ones_are_not_in(
    limiter: CreditLimiter, redis: Redis, ledger: Ledger
) -> None:
    path = ledger(many(3 * BATCH_ROWS))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(LedgerFileError, match="truncated"):
        await run_import(limiter, path)
    assert await dumps(redis) == {}


async def test_import_when_the_file_is_missing_then_it_says_so(limiter: CreditLimiter, tmp_path: Path) -> None:
    with pytest.raises(LedgerFileError, match="No such file"):
        await run_import(limiter, tmp_path / "none.json")


@pytest.mark.parametrize("folder", [Path(), Path("/")])
async def test_import_when_the_file_is_a_folder_without_a_name_then_it_says_so(
    limiter: CreditLimiter, folder: Path
) -> None:
    with pytest.raises(LedgerFileError, match="Is a directory"):
        await run_import(limiter, folder)


# Into a Redis that has rows


async def test_import_when_redis_has_rows_that_the_file_has_not_then_it_refuses(
    limiter: CreditLimiter, redis: Redis, ledger: Ledger
) -> None:
    await limiter.debit("other", tier="core", has_hardware=True)
    before = await dumps(redis)
    for dry_run in (True, False):
        with pytest.raises(LedgerFileError, match=r"0 rows that differ .* 1 that it does not have.*merge.*replace"):
            await run_import(limiter, ledger(many(3)), dry_run=dry_run)
    assert await dumps(redis) == before


async def test_import_when_rows_differ_then_it_refuses(limiter: CreditLimiter, redis: Redis, ledger: Ledger) -> None:
    path = ledger(many(3))
    await run_import(limiter, path)
    await limiter.debit("i-1", tier="pro", has_hardware=True)
    before = await dumps(redis)
    with pytest.raises(LedgerFileError, match=r"1 rows that differ .* 0 that it does not have"):
        await run_import(limiter, path)
    assert await dumps(redis) == before


async def test_import_when_a_key_is_not_a_hash_then_create_refuses_and_the_others_reject_it(
    limiter: CreditLimiter, redis: Redis, ledger: Ledger
) -> None:
    path = ledger(many(3))
    await redis.set("credits:install:i-1", "x")
    with pytest.raises(LedgerFileError, match="1 rows that differ"):
        await run_import(limiter, path)
    report = await run_import(limiter, path, "replace")
    assert counts(report) == (2, 0, 0, 1)
    assert "is not a hash" in report.first_rejected[0].reason


async def test_merge_when_counters_differ_then_the_larger_win_and_the_other_rows_stay(
    limiter: CreditLimiter, redis: Redis, ledger: Ledger
) -> None:
    old = {
        "more": member(lifetime_consumed=9, monthly_consumed=1, a=1, b=1),
        "later": member(last_renewal_at="2026-06-04T21:24:54.000Z", monthly_consumed=1, last_active_at="2026-06-05"),
        "same": member(),
        "clamped": member(last_renewal_at="2026-02-28T00:00:00.000Z", anniversary_day=31),
        "only-here": member(),
    }
    await run_import(limiter, ledger(old, "old.json"))
    undated = member(lifetime_consumed=7, monthly_consumed=8, anniversary_day=None, last_active_at=None)
    undated["last_renewal_at"] = None
    new = {
        "more": member(lifetime_consumed=2, monthly_consumed=6, tier_snapshot="max", b=2, c=3),
        "later": member(monthly_consumed=900, tier_snapshot="max"),
        "same": member(),
        "clamped": member(last_renewal_at="2026-02-28T00:00:00.000Z", anniversary_day=None),
        "new": member(),
    }
    path = ledger(new)
    assert counts(await run_import(limiter, path, "merge", dry_run=True)) == (1, 3, 1, 0)
    assert counts(await run_import(limiter, path, "merge")) == (1, 3, 1, 0)
    before = await dumps(redis)
    assert counts(await run_import(limiter, path, "merge")) == (0, 5, 0, 0)
    assert await dumps(redis) == before

    assert await fields(limiter, "more") == member(
        lifetime_consumed=9, monthly_consumed=6, tier_snapshot="max", a=1, b=2, c=3
    )
    later = await fields(limiter, "later")
    assert (later["monthly_consumed"], later["tier_snapshot"]) == (1, "pro")  # a later period wins whole
    assert (await fields(limiter, "clamped"))["anniversary_day"] == 31
    assert await limiter.row("only-here")

    await run_import(limiter, ledger({"same": undated}, "undated.json"), "merge")
    same = await fields(limiter, "same")
    assert same == member(lifetime_consumed=7, monthly_consumed=8)  # the period is the one that Redis knows


async def fields(limiter: CreditLimiter, install_id: str) -> Member:
    row = await limiter.row(install_id)
    assert row
    whole = row.as_dict()
    del whole["install_id"]
    return whole


async def test_replace_when_rows_differ_then_the_file_wins_but_live_holds_and_other_rows_stay(
    limiter: CreditLimiter, redis: Redis, ledger: Ledger
) -> None:
    await run_import(limiter, ledger({"a": member(monthly_consumed=50, x=1), "b": member()}, "old.json"))
    held = await limiter.reserve("a", tier="pro", has_hardware=True, cost=3)
    path = ledger({"a": member(monthly_consumed=2)})
    assert counts(await run_import(limiter, path, "replace", dry_run=True)) == (0, 0, 1, 0)
    assert counts(await run_import(limiter, path, "replace")) == (0, 0, 1, 0)
    assert counts(await run_import(limiter, path, "replace")) == (0, 1, 0, 0)
    assert await fields(limiter, "a") == member(monthly_consumed=2)
    assert not await redis.hexists("credits:install:a", "extra")
    assert await limiter.row("b")
    assert (await limiter.balance("a", tier="pro")).held == 3
    await limiter.commit("a", held.hold_id)
    assert (await fields(limiter, "a"))["monthly_consumed"] == 5


async def test_merge_when_the_stored_row_is_broken_then_it_is_rejected_and_replace_mends_it(
    limiter: CreditLimiter, redis: Redis, ledger: Ledger
) -> None:
    await redis.hset("credits:install:i-1", mapping={"monthly_consumed": "x", "last_renewal_at": "2026-05-04"})
    path = ledger(many(3))
    report = await run_import(limiter, path, "merge")
    assert counts(report) == (2, 0, 0, 1)
    assert "credits:install:i-1 field monthly_consumed is 'x'" in report.first_rejected[0].reason
    assert counts(await run_import(limiter, path, "replace")) == (0, 2, 1, 0)
    assert await fields(limiter, "i-1") == member(monthly_consumed=1)


async def test_put_row_when_it_is_a_dry_run_then_it_returns_the_status_and_writes_nothing(
    limiter: CreditLimiter, redis: Redis
) -> None:
    row = Row("a", "core", 1, 0, "2026-05-04T00:00:00.000Z", 4, 0, 0, "2026-05-04T00:00:00.000Z")
    scripts, key = limiter.session.scripts(timeout_ms=1000), limiter.session.keys.install("a")
    assert await scripts.put_row(key, row, mode="create", dry_run=True) is PutStatus.CREATED
    assert await dumps(redis) == {}
    await limiter.put_row(row, mode="create")
    before = await dumps(redis)
    other = Row("a", "core", 2, 0, "2026-05-04T00:00:00.000Z", 4, 0, 0, "2026-05-04T00:00:00.000Z", extra='{"a":1}')
    wanted: dict[PutMode, PutStatus] = {
        "create": PutStatus.EXISTS,
        "merge": PutStatus.MERGED,
        "replace": PutStatus.REPLACED,
    }
    for mode, status in wanted.items():
        assert await scripts.put_row(key, other, mode=mode, dry_run=True) is status
        assert await scripts.put_row(key, row, mode=mode, dry_run=True) is PutStatus.SAME
    assert await dumps(redis) == before


# There and back


async def test_file_when_it_goes_through_redis_and_back_then_its_rows_are_byte_equal(
    limiter: CreditLimiter, redis: Redis, ledger: Ledger, tmp_path: Path
) -> None:
    text = json.dumps({"rows": many(700) | {"x": member(note="é\n😀", price=0)}}).replace('"price": 0', '"price": 1.10')
    ledger({}).write_text(text)
    await run_import(limiter, tmp_path / "credits.json")
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    await dump(limiter.session, first)
    await redis.flushdb()
    await run_import(limiter, first)
    await dump(limiter.session, second)
    assert rows_of(first) == rows_of(second)
    assert len(rows_of(first)) == 701
    assert re.search(rb'"note":"\xc3\xa9\\n\xf0\x9f\x98\x80","price":1.10}', b"".join(rows_of(second)))


COUNTS = st.one_of(st.integers(0, 2**53 - 1), st.none(), st.integers(0, 1000).map(float))
TIMES = st.integers(0, 253_370_764_799_999).map(iso_from_ms)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
IDS = st.one_of(
    st.uuids().map(str), st.from_regex(r"[A-Za-z0-9._-]{1,64}", fullmatch=True).filter(lambda text: len(text) != 36)
)
NAMES = st.text(max_size=12).filter(lambda name: name not in ROW_MEMBERS and name != "month")
MEMBERS = st.builds(
    lambda own, others: others | own,
    st.fixed_dictionaries(
        {"last_renewal_at": TIMES},
        optional={
            "tier_snapshot": st.from_regex(r"[A-Za-z0-9_-]{1,20}", fullmatch=True),
            "lifetime_consumed": COUNTS,
            "lifetime_gemini_consumed": COUNTS,
            "anniversary_day": st.integers(-1, 33) | st.none(),
            "monthly_consumed": COUNTS,
            "monthly_gemini_consumed": COUNTS,
            "last_active_at": TIMES | st.none(),
        },
    ),
    st.dictionaries(NAMES, VALUES, max_size=3),
)


@pytest.fixture
async def scratch(redis: Redis, tmp_path: Path) -> tuple[Redis, Path]:
    return redis, tmp_path


@pytest.mark.slow
@given(rows=st.dictionaries(IDS, MEMBERS, max_size=5))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_rows_when_they_are_legal_then_they_survive_file_and_redis_and_file(
    scratch: tuple[Redis, Path], rows: dict[str, Member]
) -> None:
    redis, folder = scratch
    await redis.flushdb()
    limiter = CreditLimiter(redis, TIERS)
    given_path, dumped_path = folder / "given.json", folder / f"{uuid.uuid4().hex}.json"
    given_path.write_text(json.dumps({"rows": rows}, ensure_ascii=False))
    report = await run_import(limiter, given_path)
    assert counts(report) == (len(rows), 0, 0, 0)
    await dump(limiter.session, dumped_path)
    with LedgerFile(given_path) as given_file, LedgerFile(dumped_path) as dumped_file:
        assert dict(given_file.rows(now_ms=0)) == dict(dumped_file.rows(now_ms=0))
    dumped = json.loads(dumped_path.read_text())["rows"]
    for install_id, row in rows.items():
        for name, value in row.items():
            if name in ROW_MEMBERS and (value is None or name == "anniversary_day"):
                continue
            assert dumped[install_id][name] == value
    assert counts(await run_import(limiter, dumped_path)) == (0, len(rows), 0, 0)
