"""Imports that are killed, interrupted, doubled, or whose file or server is not what it was."""

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from redis import Redis as BlockingRedis

from limiter import CreditLimiter, Execution, LedgerFileError, LimiterUnavailable, PutStatus, connect
from limiter.backup.dump import dump
from limiter.backup.import_lock import exclusive_import
from limiter.backup.importer import _BATCHES_SENT, BATCH_ROWS, Progress, import_file
from limiter.backup.row_writer import ParsedEntry, RowWriter
from limiter.credits.scripts import Scripts
from limiter.credits.session import Session
from limiter.ledger.file import LedgerFile
from tests.support.cli import LIMITER, environment, limiter
from tests.support.credits import PATIENCE_MS, TIERS
from tests.support.imports import counts, dumps, many, member, run_import
from tests.support.redis_servers import Server, binaries
from tests.support.redis_topologies import ClusterSetUp
from tests.support.wait import eventually, wait_until

pytestmark = pytest.mark.slow

# How many kills at random points; a long run raises it.
KILLS = int(os.environ.get("LIMITER_TEST_IMPORT_KILLS", "2"))
MODES = ["", "--merge", "--replace"] if KILLS > 2 else [""]
ROWS = 6000


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    """A ledger of many rows: regular ones, ones to migrate, with other members, and some that cannot be taken."""
    rows = many(ROWS) | {f"m-{number}": {"month": "2025-10", "x": number} for number in range(200)}
    rows |= {f"n-{number}": {"anniversary_day": 31} for number in range(200)}
    rows |= {f"b-{number}": member(monthly_consumed=-1) for number in range(7)}
    path = tmp_path / "credits.json"
    path.write_text(json.dumps({"rows": rows}, separators=(",", ":")))
    return path


@pytest.fixture
def server(own_server: Callable[..., Server]) -> Iterator[BlockingRedis]:
    client = BlockingRedis(port=own_server("valkey", "--appendfsync", "no").port)
    yield client
    client.close()


def url_of(client: BlockingRedis) -> str:
    return f"redis://127.0.0.1:{client.connection_pool.connection_kwargs['port']}/0"


def rows_of(client: BlockingRedis) -> dict[bytes, dict[Any, Any]]:
    """The rows but for the moment at which those without a period began."""
    rows: dict[bytes, dict[Any, Any]] = {
        key: client.hgetall(key) for key in client.scan_iter(match="*:install:*", count=1000)
    }
    for key, fields in rows.items():
        if b":n-" in key:
            assert fields.pop(b"last_renewal_at") == fields.pop(b"last_active_at")
    return rows


def start(path: Path, client: BlockingRedis, *options: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [LIMITER, "import", str(path), "--redis", url_of(client), *options],
        env=environment(),
        cwd=path.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("mode", MODES)
def test_import_when_it_is_killed_at_random_points_and_repeated_then_the_end_is_the_same(
    server: BlockingRedis, ledger: Path, mode: str
) -> None:
    options = [mode] if mode else []
    whole = limiter("import", str(ledger), "--redis", url_of(server), *options, cwd=ledger.parent)
    assert (whole.returncode, "7 rows were rejected" in whole.stderr) == (1, True), whole.stderr
    assert re.search(r"^rejected: row '[^']+': ", whole.stderr, re.MULTILINE), "each says its id once"
    wanted = rows_of(server)
    assert len(wanted) == ROWS + 400
    server.flushall()
    for _ in range(KILLS):
        process = start(ledger, server, *options)
        goal = random.randrange(ROWS)
        wait_until(lambda p=process, goal=goal: p.poll() is not None or server.dbsize() > goal, within_s=30)  # type: ignore[misc]
        process.kill()
        process.communicate()
        server.delete("credits:import")  # as if its time were over
    repeat = limiter("import", str(ledger), "--redis", url_of(server), "--json", *options, cwd=ledger.parent)
    report = json.loads(repeat.stdout)
    assert (report["rejected"], report["changed"]) == (7, 0)
    assert rows_of(server) == wanted


def test_import_when_ctrl_c_ends_it_then_it_says_what_is_stored_and_another_can_begin_at_once(
    server: BlockingRedis, ledger: Path
) -> None:
    process = start(ledger, server)
    wait_until(lambda: server.dbsize() > 100, within_s=30)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    if process.returncode != 1:  # or it was done before
        assert process.returncode == 130
        assert "interrupted" in printed
        assert "import the file again" in printed
    assert server.hget("credits:import", "lapses_ms") == b"0"
    assert limiter("import", str(ledger), "--redis", url_of(server), cwd=ledger.parent).returncode == 1
    assert len(rows_of(server)) == ROWS + 400


def test_import_when_two_run_at_once_then_the_second_waits_and_finds_the_same(
    server: BlockingRedis, ledger: Path
) -> None:
    processes = [start(ledger, server), start(ledger, server)]
    printed = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [1, 1], printed  # the rows that cannot be taken
    assert sorted("another import runs" in errors for _, errors in printed) in ([False, True], [False, False])
    assert len(rows_of(server)) == ROWS + 400


async def test_import_when_another_has_the_lease_then_it_waits_until_it_is_given_back(
    server: BlockingRedis, ledger: Path, closing: AsyncExitStack
) -> None:
    redis = await connect(url_of(server))
    closing.push_async_callback(redis.aclose)
    limiter = CreditLimiter(redis, TIERS)
    async with exclusive_import(limiter.session):
        second = asyncio.create_task(run_import(limiter, ledger))
        await asyncio.sleep(0.5)  # it has read the file, and waits for the lease
        assert not second.done()
        assert await dumps(redis) == {}
    assert (await second).new == ROWS + 400


async def test_import_when_another_took_the_lease_meanwhile_then_the_check_says_so(
    server: BlockingRedis, closing: AsyncExitStack
) -> None:
    redis = await connect(url_of(server))
    closing.push_async_callback(redis.aclose)
    limiter = CreditLimiter(redis, TIERS)
    async with exclusive_import(limiter.session, lease_s=0.1) as still_ours:
        server.hset("credits:import", mapping={"owner": "other:1:x", "lapses_ms": "9999999999999"})

        async def lost() -> bool:
            try:
                await still_ours()
            except LedgerFileError as error:
                return "another import began (other:1:x)" in str(error)
            return False

        await eventually(lost)
    assert server.hget("credits:import", "owner") == b"other:1:x"  # and it is left to the other


def test_import_when_it_was_stopped_and_another_ran_meanwhile_then_it_stops(
    server: BlockingRedis, tmp_path: Path
) -> None:
    rows = 20_000
    for name, count in (("first", 1), ("second", 2)):
        printed = {f"i-{number}": member(lifetime_consumed=count) for number in range(rows)}
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": printed}, separators=(",", ":")))
    first = start(tmp_path / "first.json", server, "--replace")
    wait_until(lambda: first.poll() is not None or server.dbsize() > 100, within_s=30)
    first.send_signal(signal.SIGSTOP)
    assert server.dbsize() < rows
    second = limiter(
        "import", "second.json", "--redis", url_of(server), "--replace", cwd=tmp_path
    )  # when that has expired
    assert second.returncode == 0, second.stderr
    first.send_signal(signal.SIGCONT)
    _, errors = first.communicate(timeout=60)
    assert (first.returncode, "another import began (it has ended)" in errors) == (1, True), errors
    stored = [server.hget(f"credits:install:i-{number}", "lifetime_consumed") for number in range(rows)]
    assert stored.count(b"2") >= rows - _BATCHES_SENT * BATCH_ROWS, "what was under way is in, and no more"


def test_import_when_rows_are_rejected_at_once_then_their_file_holds_each_of_them(
    server: BlockingRedis, ledger: Path
) -> None:
    broken = {f"i-{number}" for number in range(0, ROWS, 100)}
    for name in broken:
        server.set(f"credits:install:{name}", "no row")
    done = limiter("import", str(ledger), "--redis", url_of(server), "--merge", cwd=ledger.parent)
    printed = json.loads(ledger.with_name("credits.json.rejected.json").read_text())["rejected"]
    assert done.returncode == 1
    assert {each["install_id"] for each in printed} == broken | {f"b-{number}" for number in range(7)}
    assert len(printed) == len(broken) + 7


@pytest.mark.parametrize("phase", ["check", "wait", "compare"])
def test_import_when_ctrl_c_ends_it_before_it_writes_then_it_says_that_nothing_was_changed(
    server: BlockingRedis, ledger: Path, phase: str
) -> None:
    saying = {"check": "checking the file", "wait": "another import runs", "compare": "comparing with Redis"}[phase]
    if phase == "check":
        text = json.dumps(many(300_000), separators=(",", ":"))
        ledger.write_text(f'{{"rows":{text}}}')
    elif phase == "compare":
        assert limiter("import", str(ledger), "--redis", url_of(server), cwd=ledger.parent).returncode == 1
    else:
        later_ms = int((time.time() + 3600) * 1000)
        server.hset("credits:import", mapping={"owner": "other:1:x", "epoch": 1, "lapses_ms": later_ms})
    process = start(ledger, server)
    assert process.stderr
    while saying not in (line := process.stderr.readline()):
        assert line, "it ended before that"
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    assert (process.returncode, "limiter: interrupted: nothing was changed" in printed) == (130, True), printed


async def test_batch_when_one_of_its_calls_fails_then_the_others_are_over_when_it_says_so(
    server: BlockingRedis, closing: AsyncExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What went on would write over another import's rows."""
    redis = await connect(url_of(server))
    closing.push_async_callback(redis.aclose)
    limiter = CreditLimiter(redis, TIERS)
    path = tmp_path / "credits.json"
    path.write_text(json.dumps({"rows": many(100)}, separators=(",", ":")))
    over: list[str] = []
    create_rows = Scripts.create_rows

    async def some_fail(scripts: Scripts, keys: Sequence[str], texts: Sequence[str]) -> list[PutStatus]:
        if keys[0].endswith(":i-20"):
            raise LimiterUnavailable("no answer", execution=Execution.UNKNOWN)
        await asyncio.sleep(0.05)
        over.append(keys[0])
        return await create_rows(scripts, keys, texts)

    async def unrepeated(attempt: Callable[[], Awaitable[list[PutStatus]]]) -> list[PutStatus]:
        return await attempt()

    monkeypatch.setattr(Scripts, "create_rows", some_fail)
    monkeypatch.setattr(limiter.session, "retry", unrepeated)
    writer = RowWriter(limiter.session, reject=lambda *_: asyncio.sleep(0))
    with LedgerFile(path) as file, pytest.raises(LimiterUnavailable):
        await writer.store([ParsedEntry(entry, entry.row(now_ms=0)) for entry in file.entries()], "create")
    assert len(over) == 4
    assert server.dbsize() == 80


async def test_import_when_the_server_becomes_unavailable_then_the_error_says_what_is_stored_and_what_to_do(
    own_server: Callable[..., Server], ledger: Path, closing: AsyncExitStack
) -> None:
    server = own_server()
    redis = await connect(server.url, timeout_ms=PATIENCE_MS)
    closing.push_async_callback(redis.aclose)

    def kill(progress: Progress) -> None:
        if progress.phase == "write" and progress.rows >= 3 * BATCH_ROWS:
            server.kill()

    impatient = Session(redis, deadline_ms=5000)
    with pytest.raises(LimiterUnavailable, match=r"Of 6,400 rows [\d,]+ or more are in, each whole: ") as gone:
        await import_file(impatient, ledger, mode="create", on_progress=kill)
    server.start()
    patient = CreditLimiter(redis, TIERS, timeout_ms=PATIENCE_MS, deadline_ms=PATIENCE_MS)
    report = await run_import(patient, ledger)
    assert report.new + report.same == ROWS + 400
    assert 3 * BATCH_ROWS <= said_to_be_in(gone.value) <= report.same


def said_to_be_in(error: Exception) -> int:
    """Return how many rows an error says are in, at least."""
    assert ".." not in str(error)
    found = re.search(r" rows ([\d,]+) or more are in", str(error))
    assert found
    return int(found[1].replace(",", ""))


# A file that is not what it was


async def test_import_when_a_dumped_file_was_changed_then_it_refuses_and_nothing_is_in(
    server: BlockingRedis, ledger: Path, tmp_path: Path, closing: AsyncExitStack
) -> None:
    redis = await connect(url_of(server))
    closing.push_async_callback(redis.aclose)
    limiter = CreditLimiter(redis, TIERS)
    await run_import(limiter, ledger)
    dumped = tmp_path / "dumped.json"
    await dump(limiter.session, dumped)
    server.flushall()
    text = dumped.read_text()
    dumped.write_text(text.replace('"lifetime_consumed":3', '"lifetime_consumed":4', 1))
    with pytest.raises(LedgerFileError, match=r"its checksum does not match.*delete its member meta"):
        await run_import(limiter, dumped)
    dumped.write_text(json.dumps(json.loads(text), indent=1))  # nothing but its form
    with pytest.raises(LedgerFileError, match="its checksum does not match"):
        await run_import(limiter, dumped, "merge", dry_run=True)
    assert await dumps(redis) == {}
    dumped.write_text(json.dumps({"rows": json.loads(text)["rows"]}, indent=1))
    assert counts(await run_import(limiter, dumped)) == (ROWS + 400, 0, 0, 0)


async def test_import_when_the_file_is_written_to_meanwhile_then_it_says_so(
    server: BlockingRedis, ledger: Path, closing: AsyncExitStack
) -> None:
    redis = await connect(url_of(server))
    closing.push_async_callback(redis.aclose)

    def write(progress: Progress) -> None:
        if progress.phase == "write" and progress.rows == BATCH_ROWS:
            with ledger.open("a") as file:
                file.write(" ")

    with pytest.raises(LedgerFileError, match=r"was written to while it was read: .*Of 6,400 rows") as changed:
        await import_file(CreditLimiter(redis, TIERS).session, ledger, mode="create", on_progress=write)
    assert BATCH_ROWS <= said_to_be_in(changed.value) <= len(await dumps(redis))


# A cluster


async def test_import_when_redis_is_a_cluster_then_every_row_is_in_and_a_repeat_changes_nothing(
    tmp_path: Path, closing: AsyncExitStack
) -> None:
    path = tmp_path / "credits.json"
    path.write_text(json.dumps({"rows": many(3 * BATCH_ROWS) | {"b": 5}}))
    binary = binaries()["valkey"]
    assert binary
    cluster = ClusterSetUp(binary, tmp_path / "cluster", replicas=0, node_timeout_ms=60_000).start()
    closing.callback(cluster.kill)
    redis = await connect(cluster.url)
    closing.push_async_callback(redis.aclose)
    limiter = CreditLimiter(redis, TIERS)
    assert counts(await run_import(limiter, path)) == (3 * BATCH_ROWS, 0, 0, 1)
    assert counts(await run_import(limiter, path)) == (0, 3 * BATCH_ROWS, 0, 1)
