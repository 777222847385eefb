"""Decisions of one process: 256 at once against the package `limits`, one at a time against redis-py's `evalsha`.

Run it as `python -m benchmarks.decisions [ROUNDS]`. It starts a server of its own, and installs `limits` into
.cache/limits, beside the redis-py of our own environment, which both use. All run on uvloop. The rounds are
interleaved, and what counts is the ratio within a round: the machine may be busy with other things. The processor time
that a process takes for a decision is what others disturb least. At the end, processes race for one install's credits.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from redis import Redis

from limiter.lua_source import script_names
from tests.servers import Server, binaries

ROUNDS = 7
SECONDS = 1.5
AT_ONCE = 256
MIXES = ("hot", "uniform", "zipf")
LIMITS = "limits==5.8.0"
FOLDER = Path(__file__).parent.parent / ".cache" / "limits"
RACERS, RACED_FOR = 4, 5000
SPENDER_LIMITS = json.dumps({"monthly": RACED_FOR, "gemini_cap": RACED_FOR})


@dataclass(frozen=True, slots=True)
class Measured:
    """One run: decisions a second, the median of a call, processor time of the process for each."""

    per_s: float
    p50_us: float
    cpu_us: float


def install_peer() -> None:
    """Install `limits` into its folder, unless it is there."""
    if not (FOLDER / "limits").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--target", str(FOLDER)]
        subprocess.run([*pip, LIMITS], check=True)  # noqa: S603  our own words


def decide(server: Server, how: str, mix: str, tasks: int) -> Measured:
    """Run one process on an empty server."""
    with Redis(port=server.port) as redis:
        redis.flushall()
    answer = subprocess.run(  # noqa: S603  our own words
        [sys.executable, "-W", "ignore", "-m", "benchmarks.decider", how, server.url, mix, str(tasks), str(SECONDS)],
        env=os.environ | {"PYTHONPATH": f"{FOLDER}{os.pathsep}{Path(__file__).parent.parent}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    return Measured(**json.loads(answer.stdout))


def measure(server: Server, kinds: Sequence[str], mix: str, tasks: int, rounds: int) -> dict[str, list[Measured]]:
    """Let all kinds take their turn in each round, in an order that changes."""
    runs: dict[str, list[Measured]] = {how: [] for how in kinds}
    for number in range(rounds):
        turn = number % len(kinds)
        for how in (*kinds[turn:], *kinds[:turn]):
            runs[how].append(decide(server, how, mix, tasks))
    return runs


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Give the median of the rounds' ratios, and their spread."""
    each = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    return f"{statistics.median(each):5.2f} ({min(each):.2f} to {max(each):.2f})"


def race(server: Server) -> int:
    """Let processes spend one install's credits until none are left; give how many more than there were."""
    with Redis(port=server.port) as redis:
        redis.flushall()
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.spender",
        server.url,
        "raced",
        "pro",
        SPENDER_LIMITS,
        "1",
        "0.2",
    ]
    racers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)  # noqa: S603
        for _ in range(RACERS)
    ]
    for racer in racers:
        assert racer.stdout  # noqa: S101  for mypy
        racer.stdout.readline()
    spent = 0
    for racer in racers:
        assert racer.stdin  # noqa: S101  for mypy
        racer.stdin.write("\n")
        racer.stdin.flush()
    for racer in racers:
        spent += sum(json.loads(racer.communicate()[0]).values())
    return spent - RACED_FOR


def report(server: Server, rounds: int) -> None:
    """Measure all, and print the tables."""
    print(
        f"\n{AT_ONCE} at once       decisions/s     / limits                / evalsha       cpu us each  limits' / ours"
    )
    for mix in MIXES:
        runs = measure(server, ("debit", "reserve", "evalsha", "limits"), mix, AT_ONCE, rounds)
        for how, mine in runs.items():
            rates, cpu_us = [run.per_s for run in mine], [run.cpu_us for run in mine]
            print(
                f"{mix:8} {how:8} {statistics.median(rates):12.0f}"
                f"   {ratios(rates, [run.per_s for run in runs['limits']]):22}"
                f"   {ratios(rates, [run.per_s for run in runs['evalsha']]):22}"
                f" {statistics.median(cpu_us):8.1f}"
                f"   {ratios([run.cpu_us for run in runs['limits']], cpu_us)}"
            )
    print("\none at a time     median us     cpu us each   / evalsha, time")
    runs = measure(server, ("debit", "reserve", "evalsha"), "uniform", 1, rounds)
    for how, mine in runs.items():
        times = [run.p50_us for run in mine]
        print(
            f"uniform  {how:8} {statistics.median(times):10.0f} {statistics.median(run.cpu_us for run in mine):15.1f}"
            f"   {ratios(times, [run.p50_us for run in runs['evalsha']])}"
        )
    over = max(race(server) for _ in range(rounds))
    print(f"\n{RACERS} processes race for {RACED_FOR} credits, {rounds} times: at most {over} were spent too many")


def main() -> None:
    """Measure against a server of our own."""
    binary = binaries()["valkey"]
    if binary is None:
        sys.exit("that server is not installed")
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    install_peer()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(binary, Path(folder), "--appendonly", "no").start()
        try:
            with Redis(port=server.port) as redis:
                info = redis.info()
            print(f"valkey {info.get('valkey_version')}, {len(script_names())} scripts, {rounds} rounds of {SECONDS} s")
            report(server, rounds)
        finally:
            server.stop()


if __name__ == "__main__":
    main()
