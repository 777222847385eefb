"""Server cost of a decision: reserve and commit by redis-benchmark, in interleaved rounds, with their spread.

`python -m benchmarks.scripts [decision] [installs] [holds] [months] [--server valkey] [--rounds 9]`. It needs Debian's
redis-tools, and starts servers of its own. Throughput is what redis-benchmark says; cost is the server's own processor
time for each request, which other work on the machine hardly touches. A commit that finds its hold gone is cheap, so
there are far more rows than requests: 2 in 100 of them meet a row for the second time.
"""

import argparse
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from redis import Redis

from benchmarks.findings import Bar, Finding, as_text, compared
from limiter.redis.lua_source import compose
from tests.support.redis_servers import Server, binaries

ROWS = 200_000
REQUESTS = 10_000
ROUNDS = 5
HOLD_ID = "0123456789abcdef0123456789abcdef"
KEY = "credits:install:__rand_int__"  # redis-benchmark puts 12 digits below the number of rows here
ARGUMENTS = {
    "reserve": (
        *(HOLD_ID[:20] + "__rand_int__", "pro", "monthly", "1000000", "400000", "16", "1", "1", "1", "600000", "1"),
        *("250", "30000", "1"),  # the rate of the default tier pro
    ),
    "commit": (HOLD_ID, "", "", "core", ""),
}
FILL = """
local began, lapses, hold_id, others, holds = ARGV[3], ARGV[4], ARGV[5], tonumber(ARGV[6]), tonumber(ARGV[6])
if hold_id ~= "" then holds = holds + 1 end
for i = tonumber(ARGV[1]), tonumber(ARGV[2]) do
  local key = string.format("credits:install:%012d", i)
  redis.call("DEL", key)
  redis.call("HSET", key, "tier_snapshot", "pro", "lifetime_consumed", 3, "lifetime_gemini_consumed", 2,
    "monthly_consumed", 5, "monthly_gemini_consumed", 3, "last_renewal_at", began, "last_active_at", began,
    "anniversary_day", 11, "flow", ARGV[7])
  if holds > 0 then
    redis.call("HSET", key, "held", string.format("%d 0 0 0 %d %d %s", holds, holds, holds, lapses))
  end
  for number = 1, others do
    redis.call("HSET", key, string.format("hold:fedcba9876543210%016d", number), "gemini pro monthly 1 " .. lapses)
  end
  if hold_id ~= "" then redis.call("HSET", key, "hold:" .. hold_id, "gemini pro monthly 1 " .. lapses) end
end
"""
DAY_MS = 24 * 60 * 60 * 1000


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to measure: an operation, or its floor, on rows that are made for it."""

    label: str
    operation: str
    floor: bool = False
    rows: int = ROWS
    holds: int = 0  # live ones on each row, besides the one to commit
    days_ago: int = 1  # when the row's period began


@dataclass(frozen=True, slots=True)
class Run:
    """What one round of a case took."""

    per_s: float
    cpu_us: float  # the server's own, for each request


class Bench:
    """One server, and the runs on it."""

    def __init__(self, server: Server) -> None:
        self.server, self.redis = server, Redis(port=server.port)

    def fill(self, case: Case) -> None:
        """Make every row anew, so that no round finds what another left."""
        now_s = time.time()
        began = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(now_s - case.days_ago * DAY_MS / 1000))
        hold_id = HOLD_ID if case.operation == "commit" else ""
        # Valkey would free the old ones by a thread, whose processor time would be taken for that of the requests.
        self.redis.execute_command("FLUSHDB", "SYNC")  # type: ignore[no-untyped-call]  # redis-py 8.1
        step = 2_000 // (1 + case.holds)
        for first in range(0, case.rows, step):
            last = min(first + step, case.rows) - 1
            self.redis.eval(
                FILL, 0, first, last, began, int(now_s * 1000) + DAY_MS, hold_id, case.holds, int(now_s * 1000)
            )

    def run(self, case: Case) -> Run:
        """Send a case's requests, sixteen at a time on each of fifty connections."""
        floor = Path(__file__).parent / "lua_floor" / f"{case.operation}.lua"
        text = floor.read_text() if case.floor else compose(case.operation).text
        sha = str(self.redis.script_load(text))
        self.fill(case)
        command = ["redis-benchmark", "-p", str(self.server.port), "-c", "50", "-P", "16", "--csv", "-n", str(REQUESTS)]
        command += ["-r", str(case.rows), "EVALSHA", sha, "1", KEY, *ARGUMENTS[case.operation]]
        before_s = self._cpu_s()
        answer = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603  our own words
        cpu_us = (self._cpu_s() - before_s) * 1e6 / REQUESTS
        return Run(float(answer.stdout.splitlines()[-1].split(",")[1].strip('"')), cpu_us)

    def _cpu_s(self) -> float:
        used = self.redis.info("cpu")
        return float(used["used_cpu_user"]) + float(used["used_cpu_sys"])


def pairs(section: str) -> Iterator[tuple[Case, Case]]:
    """Give a section's cases, each with the one that it is measured against."""
    if section == "decision":
        for name in ARGUMENTS:
            yield Case(name, name), Case("its floor", name, floor=True)
    elif section == "installs":
        for rows, name in [
            (10_000, "reserve"),
            (100_000, "reserve"),
            (1_000_000, "reserve"),
            (1_000_000, "its floor"),
        ]:
            operation, floor = "reserve", name != "reserve"
            few = Case(f"{name}, 1,000 installs", operation, floor, rows=1000)
            yield Case(f"{name}, {rows:,} installs", operation, floor, rows=rows), few
    elif section == "holds":
        for name in ARGUMENTS:
            for holds in (1, 8, 64):
                none = Case(f"{name}, no other live hold", name, rows=ROWS // 10)
                yield Case(f"{name}, {holds} other live holds", name, rows=ROWS // 10, holds=holds), none
    else:
        for months in (1, 12, 120):
            awake = Case("reserve, in the running period", "reserve")
            yield Case(f"reserve, first after {months} months", "reserve", days_ago=months * 31 + 1), awake


def measure(bench: Bench, section: str, rounds: int) -> Iterator[Finding]:
    """Measure a section's pairs: throughput, where it has a bar, and the server's processor time."""
    for case, against in pairs(section):
        runs = [(bench.run(case), bench.run(against)) for _ in range(rounds)]
        speeds = [[run.per_s for run in column] for column in zip(*runs, strict=True)]
        costs = [[run.cpu_us for run in column] for column in zip(*runs, strict=True)]
        if section == "decision":
            yield compared(f"{case.label}, requests", against.label, *speeds, unit="/s", bar=Bar(0.7, "at least"))
        bar = _COST_BARS.get((section, case.holds))
        yield compared(f"{case.label}, server's processor time", against.label, *costs, unit="µs", bar=bar)


_COST_BARS = {("installs", 0): Bar(1.1, "at most"), ("holds", 64): Bar(1.5, "at most")}
SECTIONS = ("decision", "installs", "holds", "months")


def findings(name: str, rounds: int, sections: Iterable[str] = SECTIONS) -> list[Finding]:
    """Measure on one server of the matrix; nothing where it is not installed."""
    binary = binaries()[name]
    if binary is None:
        return []
    with tempfile.TemporaryDirectory() as folder:
        server = Server(binary, Path(folder), "--appendonly", "no").start()
        try:
            bench = Bench(server)
            return list(chain.from_iterable(measure(bench, section, rounds) for section in sections))
        finally:
            server.stop()


def main() -> None:
    """Measure what is asked for, on the servers that there are."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="section", help=f"{', '.join(SECTIONS)}; all of them without")
    parser.add_argument("--server", choices=sorted(binaries()), help="one of the servers; both without")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    asked = parser.parse_args()
    if unknown := set(asked.sections) - set(SECTIONS):
        parser.error(f"no section {min(unknown)!r}: give {', '.join(SECTIONS)}")
    for name in [asked.server] if asked.server else sorted(binaries()):
        print(f"\n{name}\n{as_text(findings(name, asked.rounds, asked.sections or SECTIONS))}", flush=True)


if __name__ == "__main__":
    main()
