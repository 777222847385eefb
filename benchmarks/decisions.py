"""Decisions of one process: 256 at once against the package `limits`, one at a time against redis-py's `evalsha`.

Run it as `python -m benchmarks.decisions [ROUNDS]`. It starts a server of its own, and installs `limits` into
.cache/limits, beside the redis-py of our own environment, which both use. All run on uvloop. The rounds are
interleaved, and what counts is the ratio within a round: the machine may be busy with other things. The processor time
that a process takes for a decision is what others disturb least.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from redis import Redis

from benchmarks.findings import Bar, Finding, as_text, compared
from tests.support.redis_servers import Server, binaries

ROUNDS = 7
SECONDS = 1.5
AT_ONCE = 256
MIXES = ("hot", "uniform", "zipf")
LIMITS = "limits==5.8.0"
FOLDER = Path(__file__).parent.parent / ".cache" / "limits"


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
        [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "benchmarks.decision_worker",
            how,
            server.url,
            mix,
            str(tasks),
            str(SECONDS),
        ],
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


def findings(rounds: int) -> Iterator[Finding]:
    """Measure all against a server of our own."""
    binary = binaries()["valkey"]
    assert binary  # noqa: S101  it is a dependency
    install_peer()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(binary, Path(folder), "--appendonly", "no").start()
        try:
            for mix in MIXES:
                runs = measure(server, ("debit", "reserve", "evalsha", "limits"), mix, AT_ONCE, rounds)
                for how, peer in product(("reserve", "debit"), ("limits", "evalsha")):
                    bar = Bar(7, "at least") if (how, peer) == ("debit", "limits") else None
                    what = f"{how}, {AT_ONCE} at once, installs {mix}"
                    yield _compared(runs, what, how, peer, lambda run: run.per_s, "/s", bar=bar)
            runs = measure(server, ("debit", "reserve", "evalsha"), "uniform", 1, rounds)
            for how in ("reserve", "debit"):
                bar = Bar(0.9, "at most")
                yield _compared(runs, f"{how}, one at a time", how, "evalsha", lambda run: run.p50_us, "µs", bar=bar)
            for tasks in (1, 4, 16, 64, 1024):
                runs = measure(server, ("reserve", "evalsha"), "uniform", tasks, rounds)
                what = f"reserve, {tasks} at once"
                yield _compared(runs, what, "reserve", "evalsha", lambda run: run.per_s, "/s", group="concurrency")
        finally:
            server.stop()


def _compared(  # noqa: PLR0917  one place spells it out
    runs: dict[str, list[Measured]],
    what: str,
    how: str,
    peer: str,
    fact: Callable[[Measured], float],
    unit: str,
    *,
    bar: Bar | None = None,
    group: str = "",
) -> Finding:
    ours, theirs = ([fact(run) for run in runs[name]] for name in (how, peer))
    return compared(what, _PEERS[peer], ours, theirs, unit=unit, bar=bar, group=group)


_PEERS = {"limits": "limits 5.8, fixed window", "evalsha": "redis-py evalsha"}


def main() -> None:
    """Measure, and print a table."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    print(as_text(list(findings(rounds))))


if __name__ == "__main__":
    main()
