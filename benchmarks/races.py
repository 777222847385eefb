"""Processes that race for one install's credits, while nothing or something goes wrong: exactly all must be spent.

Run it as `python -m benchmarks.races [ROUNDS]`. It starts a server of its own. What was spent too many was admitted
beyond the quota; a row that says other than the processes were told has debited something twice, or not at all.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from redis import Redis

from benchmarks.findings import markdown_table
from tests.support.redis_servers import Server, binaries

ROUNDS = 3
RACERS, RACED_FOR, STOPPED_S = 4, 5000, 3
_LIMITS = json.dumps({"monthly": RACED_FOR, "gemini_cap": RACED_FOR})
_GIVE_BACK = 0.2  # the share of the holds that are released instead of committed
_PYTHON = (sys.executable, "-W", "ignore", "-m")


@dataclass(frozen=True, slots=True)
class Raced:
    """One race. spent: what the processes committed, of it without an answer: it was lost, and a repeat said GONE."""

    spent: int
    unheard: int
    in_row: int
    holds_left: int


class Trouble:
    """What goes wrong in a race. `url` is where the racers go, `begin` is called once they run."""

    def __init__(self, url: str, begin: Callable[[], None] = lambda: None) -> None:
        self.url, self.begin = url, begin


Case = Callable[[Server], AbstractContextManager[Trouble]]


@contextmanager
def undisturbed(server: Server) -> Iterator[Trouble]:
    """Let them race."""
    yield Trouble(server.url)


@contextmanager
def stopped(server: Server) -> Iterator[Trouble]:
    """Stop the server's process in the middle: every racer's calls wait."""

    def stop_and_go() -> None:
        time.sleep(0.2)
        server.pause()
        time.sleep(STOPPED_S)
        server.resume()

    yield Trouble(server.url, stop_and_go)


@contextmanager
def cut(server: Server) -> Iterator[Trouble]:
    """Put a proxy before the server that cuts connections instead of passing on the replies to what was executed."""
    command = [*_PYTHON, "benchmarks.lossy_redis_proxy", str(server.port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as proxy:  # noqa: S603  our own words
        try:
            yield Trouble(f"redis://127.0.0.1:{_line_of(proxy)}/0", lambda: _go(proxy))
        finally:
            proxy.terminate()


CASES: dict[str, Case] = {
    "nothing": undisturbed,
    f"the server stands still for {STOPPED_S} s": stopped,
    "connections are cut between a command and its reply": cut,
}


def race(server: Server, case: Case) -> Raced:
    """Let processes spend one install's credits until none are left."""
    with Redis(port=server.port, decode_responses=True) as redis:
        redis.flushall()
        with case(server) as trouble:
            command = [
                *_PYTHON,
                "tests.support.race_worker",
                trouble.url,
                "raced",
                "pro",
                _LIMITS,
                "1",
                str(_GIVE_BACK),
            ]
            racers = [
                subprocess.Popen(  # noqa: S603  our own words
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
                )
                for _ in range(RACERS)
            ]
            for racer in racers:
                _line_of(racer)
            for racer in racers:
                _go(racer)
            trouble.begin()
            told = [json.loads(racer.communicate()[0]) for racer in racers]
        row = redis.hgetall("credits:install:raced")
    return Raced(
        spent=sum(sum(each.values()) for each in told),
        unheard=sum(each.get("GONE", 0) for each in told),
        in_row=int(row["monthly_consumed"]),
        holds_left=sum(name.startswith("hold:") for name in row),
    )


def measure(rounds: int) -> dict[str, list[Raced]]:
    """Race several times in each case, in rounds."""
    binary = binaries()["valkey"]
    assert binary  # noqa: S101  it is a dependency
    raced: dict[str, list[Raced]] = {name: [] for name in CASES}
    with tempfile.TemporaryDirectory() as folder:
        server = Server(binary, Path(folder), "--appendonly", "no").start()
        try:
            for _ in range(rounds):
                for name, case in CASES.items():
                    raced[name].append(race(server, case))
        finally:
            server.stop()
    return raced


def table(rounds: int) -> str:
    """Race, and give the worst of each case as a table."""
    heads = (
        "meanwhile",
        "races",
        "too many",
        "too few",
        "the row says other",
        "holds left",
        "commits whose reply was lost",
    )
    lines = [(name, *(f"{number:,}" for number in _worst(raced))) for name, raced in measure(rounds).items()]
    said = f"{RACERS} processes of 64 tasks each race for {RACED_FOR:,} credits, and give back a fifth of their holds."
    return f"{said} The worst of all races:\n\n{markdown_table(heads, lines)}"


def _worst(raced: Sequence[Raced]) -> tuple[int, ...]:
    return (
        len(raced),
        max(0, *(each.spent - RACED_FOR for each in raced)),
        max(0, *(RACED_FOR - each.spent for each in raced)),
        max(abs(each.in_row - each.spent) for each in raced),
        max(each.holds_left for each in raced),
        sum(each.unheard for each in raced),
    )


def _line_of(process: "subprocess.Popen[str]") -> str:
    assert process.stdout  # noqa: S101  for mypy
    return process.stdout.readline().strip()


def _go(process: "subprocess.Popen[str]") -> None:
    assert process.stdin  # noqa: S101  for mypy
    process.stdin.write("\n")
    process.stdin.flush()


if __name__ == "__main__":
    print(table(int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS))
