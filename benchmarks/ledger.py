"""Ledgers of a million rows: import, dump, their memory, a row's size, decisions during a dump; each against a floor.

Run it as `python -m benchmarks.ledger [ROWS]`; without a number it has a million rows. It needs Debian's redis-tools,
and starts a server of its own, with AOF as in production.
"""

import asyncio
import json
import math
import random
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from redis import Redis

from benchmarks.findings import Bar, Finding, as_text, compared
from limiter import CreditLimiter, Tiers, connect
from limiter.credits.models import ROW_MEMBERS
from limiter.redis.lua_source import compose
from tests.support.redis_servers import Server, binaries

ROWS = 1_000_000
ROUNDS = 3
DECISIONS_PER_S = 500
DECIDE_S = 10.0
TIERS = Tiers.from_mapping({"core": {"lifetime": 1_000_000}})
_JOB = """
import asyncio, sys, time
from pathlib import Path
import uvloop
from limiter import connect
from limiter.backup.dump import dump
from limiter.backup.importer import import_file
from limiter.credits.session import Session

def most_kib():
    # Not by getrusage, which counts on from the process that started this one.
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))

async def main(job, url, path):
    redis = await connect(url, allow_eviction=True)
    session = Session(redis)
    idle_kib = most_kib()
    began = time.perf_counter()
    if job == "import":
        await import_file(session, Path(path), mode="create")
    elif job == "dump":
        await dump(session, Path(path))
    else:
        await read_all(redis)
    took_s = time.perf_counter() - began
    print(took_s, most_kib(), idle_kib)
    await redis.aclose()

async def read_all(redis):
    cursor = 0
    while True:
        cursor, names = await redis.scan(cursor, match="credits:install:*", count=500)
        pipeline = redis.pipeline(transaction=False)
        for name in names:
            pipeline.hgetall(name)
        await pipeline.execute()
        if cursor == 0:
            return

uvloop.run(main(*sys.argv[1:]))
"""


def rows(count: int) -> Iterator[dict[str, object]]:
    """Make rows as a ledger in use has them."""
    chance = random.Random(count)
    for _ in range(count):
        yield {
            "install_id": str(uuid.UUID(int=chance.getrandbits(128), version=4)),
            "tier_snapshot": chance.choice(("core", "pro", "max")),
            "lifetime_consumed": chance.randrange(50),
            "lifetime_gemini_consumed": chance.randrange(20),
            "last_renewal_at": f"2026-10-{chance.randrange(1, 29):02d}T21:24:54.719Z",
            "anniversary_day": chance.randrange(1, 29),
            "monthly_consumed": chance.randrange(1000),
            "monthly_gemini_consumed": chance.randrange(400),
            "last_active_at": f"2026-11-{chance.randrange(1, 22):02d}T21:24:54.719Z",
        }


def write_files(count: int, ledger: Path, commands: Path) -> int:
    """Write the rows as the old ledger does, and as HSETs for redis-cli --pipe; give the bytes of their JSON."""
    size_bytes = 0
    with ledger.open("w") as file, commands.open("w") as pipe:
        file.write('{"rows":{')
        for number, row in enumerate(rows(count)):
            text = json.dumps(row, separators=(",", ":"))
            size_bytes += len(text)
            file.write(f'{"," if number else ""}"{row["install_id"]}":{text}')
            _write_hset(pipe, row)
        file.write("}}")
    return size_bytes


def _write_hset(pipe: TextIO, row: dict[str, object]) -> None:
    words = ["HSET", f"credits:install:{row['install_id']}"]
    for name in ROW_MEMBERS[1:]:
        words += [name, str(row[name])]
    pipe.write(f"*{len(words)}\r\n" + "".join(f"${len(word)}\r\n{word}\r\n" for word in words))


class Bench:
    """One server, and what runs against it."""

    def __init__(self, server: Server, folder: Path, count: int) -> None:
        self.server, self.folder, self.count = server, folder, count
        self.ledger, self.commands = folder / "credits.json", folder / "hsets"
        self.json_bytes = write_files(count, self.ledger, self.commands)
        self.redis = Redis(port=server.port)

    def empty(self) -> None:
        """Take all rows away, and wait until the server has nothing else to do."""
        self.redis.execute_command("FLUSHALL", "SYNC")  # type: ignore[no-untyped-call]  # redis-py 8.1
        # or the server frees memory while others are measured
        self.redis.script_load(compose("create_rows").text)
        self.settle()

    def settle(self) -> None:
        """Wait for the rewriting of the AOF."""
        while self.redis.info("persistence")["aof_rewrite_in_progress"]:
            time.sleep(0.1)

    def server_s(self) -> float:
        """Give the processor time of the server so far."""
        used = self.redis.info("cpu")
        return float(used["used_cpu_user"] + used["used_cpu_sys"])

    def pipe(self) -> float:
        """Give the seconds of redis-cli --pipe."""
        self.empty()
        began = time.perf_counter()
        with self.commands.open("rb") as commands:
            subprocess.run(  # noqa: S603  our own words
                ["redis-cli", "-p", str(self.server.port), "--pipe"],  # noqa: S607  Debian's
                stdin=commands,
                stdout=subprocess.DEVNULL,
                check=True,
            )
        return time.perf_counter() - began

    def job(self, name: str) -> tuple[float, float, float]:
        """Run an import, a dump or a bare scan-and-read in a process of its own: seconds, MiB at most, MiB idle."""
        if name == "import":
            self.empty()
        self.settle()
        path = self.ledger if name == "import" else self.folder / "dumped.json"
        if name == "dump":
            path.unlink(missing_ok=True)
        command = [sys.executable, "-c", _JOB, name, self.server.url, str(path)]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603  our own words
        took_s, most_kib, idle_kib = map(float, told.split())
        return took_s, most_kib / 1024, idle_kib / 1024

    async def p99_ms(self, while_running: "subprocess.Popen[bytes] | None") -> float:
        """Give the p99 of decisions at a steady rate, while a process runs or else for some seconds."""
        redis = await connect(self.server.url)
        limiter = CreditLimiter(redis, TIERS, timeout_ms=10_000, deadline_ms=10_000)
        took: list[float] = []

        async def decide() -> None:
            began = time.perf_counter()
            await limiter.debit(f"bench-{random.randrange(1000)}", tier="core", has_hardware=True)
            took.append(time.perf_counter() - began)

        began = time.perf_counter()
        calls: set[asyncio.Task[None]] = set()
        while (time.perf_counter() - began < DECIDE_S) if while_running is None else while_running.poll() is None:
            due = int((time.perf_counter() - began) * DECISIONS_PER_S) - len(took) - len(calls)
            calls |= {asyncio.create_task(decide()) for _ in range(due)}
            await asyncio.sleep(0.002)
            calls = {call for call in calls if not call.done()}
        await asyncio.gather(*calls)
        await redis.aclose()
        return sorted(took)[math.ceil(len(took) * 0.99) - 1] * 1000

    async def p99_ratio(self) -> tuple[float, float]:
        """Give the p99 without a dump and during one, in milliseconds."""
        await self.p99_ms(None)
        without = await self.p99_ms(None)
        command = [sys.executable, "-c", _JOB, "dump", self.server.url, str(self.folder / "dumped.json")]
        dumping = await asyncio.to_thread(subprocess.Popen, command, stdout=subprocess.DEVNULL)
        return without, await self.p99_ms(dumping)

    def row_bytes(self) -> float:
        """Give what Redis needs for a row: its memory less that of the empty server."""
        self.empty()
        before = self.redis.info("memory")["used_memory_dataset"]
        self.pipe()
        return float(self.redis.info("memory")["used_memory_dataset"] - before) / self.count


def rounds_of(ours: Callable[[], float], floor: Callable[[], float]) -> tuple[list[float], list[float]]:
    """Give the seconds of both, of rounds that take turns."""
    pairs = [(ours(), floor()) for _ in range(ROUNDS)]
    return [mine for mine, _ in pairs], [below for _, below in pairs]


def measure(bench: Bench) -> Iterator[Finding]:
    """Run everything, in an order that needs few fillings."""
    memory: dict[str, list[tuple[float, float]]] = {"import": [], "dump": [], "read": []}
    server_us: dict[str, list[float]] = {"import": [], "pipe": []}

    def job(name: str) -> float:
        took_s, *used = bench.job(name)
        memory[name].append((used[0], used[1]))
        return took_s

    def charged(name: str, run: Callable[[], float]) -> float:
        before = bench.server_s()
        took_s = run()
        server_us[name].append(1e6 * (bench.server_s() - before) / bench.count)
        return took_s

    def per_s(times: list[float]) -> list[float]:
        return [bench.count / took_s for took_s in times]

    rows_each = f"of {bench.count:,} rows"
    ours, floor = rounds_of(lambda: charged("import", lambda: job("import")), lambda: charged("pipe", bench.pipe))
    pipe, read = "redis-cli --pipe of the same HSETs", "a loop that scans and reads"
    yield compared(f"import {rows_each}", pipe, per_s(ours), per_s(floor), unit="/s", bar=Bar(0.5, "at least"))
    yield compared("of it, the server's time for a row", pipe, server_us["import"], server_us["pipe"], unit="µs")
    ours, floor = rounds_of(lambda: job("dump"), lambda: job("read"))
    yield compared(f"dump {rows_each}", read, per_s(ours), per_s(floor), unit="/s", bar=Bar(0.7, "at least"))
    for name in ("import", "dump"):
        most, idle = ([one[at] for one in memory[name]] for at in (0, 1))
        yield compared(f"{name}, memory at most", "the process at its start", most, idle, unit="MiB")
    pairs = [asyncio.run(bench.p99_ratio()) for _ in range(ROUNDS)]
    without, during = ([pair[at] for pair in pairs] for at in (0, 1))
    yield compared("99 % of decisions during a dump", "without", during, without, unit="ms", bar=Bar(1.5, "at most"))
    row, json_row = [bench.row_bytes()], [bench.json_bytes / bench.count]
    yield compared("a row in Redis", "its JSON", row, json_row, unit="bytes", bar=Bar(1.2, "at most"))


def findings(count: int) -> list[Finding]:
    """Measure on a server of our own, with AOF."""
    binary = binaries()["valkey"]
    assert binary  # noqa: S101  it is a dependency
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = Server(binary, folder / "server", "--appendfsync", "everysec").start()
        try:
            return list(measure(Bench(server, folder, count)))
        finally:
            server.kill()


def main() -> None:
    """Measure, and print a table."""
    print(as_text(findings(int(sys.argv[1].replace("_", "")) if len(sys.argv) > 1 else ROWS)))


if __name__ == "__main__":
    main()
