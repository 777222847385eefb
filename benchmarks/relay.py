"""What metering costs: our relay against a bare pass-through of aiohttp on uvloop, and against relays of others.

Run it as `python -m benchmarks.relay [--peers] [--rounds N]`. All stand before the same quick backend. It needs wrk
(Debian's package), and starts all servers itself; with --peers it installs the others first. The rounds are
interleaved, and what counts is the ratio within a round: the machine may be busy with other things. The processor time
that a server takes for a request is what others disturb least.
"""

import argparse
import asyncio
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import aiohttp

from benchmarks.constant_backend import GAP_S
from benchmarks.findings import Bar, Finding, as_text, compared
from benchmarks.peers import install_peers, litellm, portkey
from tests.support.cli import Relay
from tests.support.redis_servers import Server, binaries

T = TypeVar("T")
ROUNDS = 5
ROUND_S = 4
CONNECTIONS = 64
STREAMS = 16
PATH = "/v1/chat/completions"
# Each request is of one of a thousand installs, as in life: rows are not all the same one.
ASK = """
wrk.method = "POST"
wrk.body = '{"model": "m", "messages": [{"role": "user", "content": "Hi"}]}'
wrk.headers["Content-Type"] = "application/json"
local n = 0
request = function()
  n = (n + 1) % 1000
  wrk.headers["X-Install-Id"] = string.format("00000000-0000-4000-8000-%012d", n)
  return wrk.format()
end
"""
BODY = b'{"model": "m", "messages": [{"role": "user", "content": "Hi"}]}'
PACED_PER_S, PACED_S = 40, 5  # well below what the slowest can do
MANY = "1000000000"
SETTINGS = {
    "LIMITER_BACKENDS__GEMINI__API_KEY": "k",
    "LIMITER_TIERS__CORE__LIFETIME": MANY,
    "LIMITER_TIERS__CORE__GEMINI_CAP": MANY,
    "LIMITER_TIERS__CORE__MAX_IN_FLIGHT": "100000",
    "LIMITER_TIERS__CORE__RATE_PER_MIN": "60000",  # it is counted, and never reached
    "LIMITER_TIERS__CORE__BURST": "60000",
    "LIMITER_RELAY__MINT_OVERALL": "0",
    "LIMITER_PERSISTER__FILE": "",
    "LIMITER_LOGS__FORMAT": "json",
    "LIMITER_LOGS__REQUESTS_PER_S": "0",  # each request has its line
}


@dataclass(frozen=True, slots=True)
class Load:
    """What wrk saw of one server in one round."""

    rate: float
    p50_ms: float
    p99_ms: float
    cpu_us: float  # of the server's own process, for each request


@dataclass(frozen=True, slots=True)
class Stream:
    """What a client saw of streams through one server: medians."""

    first_ms: float
    gap_ms: float


@dataclass(frozen=True, slots=True)
class Served:
    """A server that is measured, and its process."""

    url: str
    pid: int
    script: Path = Path()  # wrk's, with the headers that this server wants
    headers: Mapping[str, str] = field(default_factory=dict)

    def cpu_s(self) -> float:
        """Tell the processor time that it has taken."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def process(*arguments: str) -> Iterator[tuple[str, int]]:
    """Run one of the modules here; gives its URL and process id."""
    command = [sys.executable, "-m", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:  # noqa: S603  our own words
        assert running.stdout  # noqa: S101  it was asked for
        try:
            yield f"http://127.0.0.1:{running.stdout.readline().strip()}", running.pid
        finally:
            running.terminate()


@contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """Run a Valkey with an append-only file; gives its URL."""
    binary = binaries()["valkey"]
    assert binary  # noqa: S101  it is a dependency
    redis = Server(binary, folder / "redis", "--appendfsync", "everysec").start()
    try:
        yield redis.url
    finally:
        redis.stop()


@contextmanager
def our_relay(folder: Path, backend: str, redis: str) -> Iterator[Served]:
    """Run our relay, metering, before a backend."""
    settings = SETTINGS | {"LIMITER_BACKENDS__GEMINI__URL": f"{backend}/v1"}
    with (folder / "log").open("wb") as log:  # as of an operator's: nobody here has to read it
        relay = Relay(folder, "--redis", redis, settings=settings, log=log.fileno())
        try:
            yield Served(relay.url, relay.process.pid)
        finally:
            relay.kill()


def load(server: Served) -> Load:
    """Ask as fast as answers come, on so many connections."""
    command = [
        "wrk",
        "-t1",
        f"-c{CONNECTIONS}",
        f"-d{ROUND_S}s",
        "--timeout",
        "30s",
        "--latency",
        "-s",
        str(server.script),
        server.url + PATH,
    ]
    before_s = server.cpu_s()
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603  our own words
    if "Non-2xx" in told or "Socket errors" in told:
        sys.exit(told)
    cpu_s = server.cpu_s() - before_s
    found = re.search(r"\n +50% +(\S+)\s.*\n +99% +(\S+)\s+(\d+) requests in .*Requests/sec: +(\S+)", told, re.DOTALL)
    if found is None or found[3] == "0":
        sys.exit(f"{server.url} answered nothing in {ROUND_S} s:\n{told}")
    return Load(float(found[4]), _ms(found[1]), _ms(found[2]), cpu_s / int(found[3]) * 1e6)


def _ms(text: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+)(us|ms|s)", text).groups()  # type: ignore[union-attr]  # wrk's own form
    return float(number) * {"us": 0.001, "ms": 1, "s": 1000}[unit]


async def stream(url: str) -> Stream:
    """Read some streams at once; the gaps are those between reads."""
    firsts: list[float] = []
    gaps: list[float] = []

    async def one(session: aiohttp.ClientSession, number: int) -> None:
        headers = {"X-Install-Id": f"00000000-0000-4000-8000-{number:012}"}
        await asyncio.sleep(number * GAP_S / 2)  # not all in one moment, which would measure a queue
        began = time.perf_counter()
        body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": f"Number {number}"}]}
        async with session.post(url + PATH, json=body, headers=headers) as response:
            last = None
            async for _ in response.content.iter_any():
                now = time.perf_counter()
                firsts.append(now - began) if last is None else gaps.append(now - last)
                last = now

    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*(one(session, number) for number in range(STREAMS)))
    return Stream(statistics.median(firsts) * 1000, statistics.median(gaps) * 1000)


async def paced(server: Served) -> tuple[float, float]:
    """Ask at a fixed rate, whether or not the answers come; median and 99 % of the latency, in milliseconds."""
    took: list[float] = []

    async def one(session: aiohttp.ClientSession, number: int) -> None:
        await asyncio.sleep(number / PACED_PER_S)
        headers = {"Content-Type": "application/json", "X-Install-Id": f"00000000-0000-4000-8000-{number:012}"}
        began = time.perf_counter()
        async with session.post(server.url + PATH, data=BODY, headers=headers | dict(server.headers)) as answer:
            await answer.read()
            answer.raise_for_status()
        took.append((time.perf_counter() - began) * 1000)

    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*(one(session, number) for number in range(PACED_PER_S * PACED_S)))
    return statistics.median(took), statistics.quantiles(took, n=100)[98]


class Bench:
    """The servers that are measured, by name."""

    def __init__(self, stack: ExitStack, folder: Path, *, peers: bool) -> None:
        self._folder = folder
        redis = stack.enter_context(redis_server(folder))
        backend, backend_pid = stack.enter_context(process("benchmarks.constant_backend"))
        relay = stack.enter_context(our_relay(folder, backend, redis))
        self.servers = {
            "direct": self._served(backend, backend_pid),
            OURS: self._served(relay.url, relay.pid),
            BARE: self._served(*stack.enter_context(process("benchmarks.aiohttp_passthrough", backend))),
        }
        if peers:
            install_peers()
            for name, starting in {
                PORTKEY: portkey(backend, folder),
                LITELLM: litellm(backend, folder),
                f"{LITELLM}, Redis budgets": litellm(backend, folder, budgets_at=redis),
            }.items():
                peer = stack.enter_context(starting)
                self.servers[name] = self._served(peer.url, peer.pid, peer.headers)

    def _served(self, url: str, pid: int, headers: Mapping[str, str] | None = None) -> Served:
        lines = "".join(f'wrk.headers["{name}"] = "{value}"\n' for name, value in (headers or {}).items())
        script = self._folder / f"ask-{pid}.lua"
        script.write_text(ASK + lines)
        return Served(url, pid, script, headers or {})

    def findings(self, rounds: int) -> Iterator[Finding]:
        """Measure everything, in interleaved rounds."""
        for server in self.servers.values():
            load(server)  # warms up, and makes the rows
        loads = self._rounds(rounds, load)
        for name in self.servers:
            if name not in {OURS, "direct"}:
                yield Column(loads, lambda one: one.rate, "/s").against(name, "requests, 64 at once", _RATE_BARS[name])
        yield Column(loads, lambda one: one.p50_ms, "ms").against(BARE, "latency at that, median")
        yield Column(loads, lambda one: one.p99_ms, "ms").against(BARE, "latency at that, 99 %")
        yield Column(loads, lambda one: one.cpu_us, "µs").against(BARE, "processor time of a request")
        latencies = self._rounds(rounds, lambda server: asyncio.run(paced(server)))
        for number, share in enumerate(("median", "99 %")):
            added = {
                name: [one[number] - direct[number] for one, direct in zip(column, latencies["direct"], strict=True)]
                for name, column in latencies.items()
            }
            for name in self.servers:
                if name not in {OURS, "direct"}:
                    what = f"added latency at {PACED_PER_S}/s, {share}"
                    bar = Bar(0.35, "at most") if name == PORTKEY else None
                    yield compared(what, name, added[OURS], added[name], unit="ms", bar=bar)
        some = {name: self.servers[name] for name in ("direct", OURS, BARE)}
        streams = self._rounds(1 + rounds, lambda server: asyncio.run(stream(server.url)), some)
        streams = {name: column[1:] for name, column in streams.items()}  # the first one warms up
        floor = [one.first_ms for one in streams["direct"]]
        ours, bare = (
            [one.first_ms - least for one, least in zip(streams[name], floor, strict=True)] for name in (OURS, BARE)
        )
        first = Bar(1.1, "at most")
        yield compared("stream, added time to first byte", BARE, ours, bare, unit="ms", bar=first)
        # The whole gap: what either adds to it is less than what the clock of the backend varies by.
        gap = Column(streams, lambda one: one.gap_ms, "ms")
        yield gap.against(BARE, "stream, gap between chunks", Bar(1.2, "at most"))

    def _rounds(
        self, rounds: int, measure: Callable[[Served], T], servers: Mapping[str, Served] | None = None
    ) -> dict[str, list[T]]:
        measured: dict[str, list[T]] = {name: [] for name in servers or self.servers}
        for _ in range(rounds):
            for name, server in (servers or self.servers).items():
                measured[name].append(measure(server))
        return measured


@dataclass(frozen=True, slots=True)
class Column(Generic[T]):
    """One fact of what was measured, by server."""

    measured: Mapping[str, Sequence[T]]
    fact: Callable[[T], float]
    unit: str

    def against(self, name: str, what: str, bar: Bar | None = None) -> Finding:
        """Compare ours with one of the others."""
        ours, theirs = ([self.fact(one) for one in self.measured[server]] for server in (OURS, name))
        return compared(what, name, ours, theirs, unit=self.unit, bar=bar)


OURS, BARE, PORTKEY, LITELLM = "relay", "bare pass-through", "Portkey gateway 1.15.2", "LiteLLM proxy"
_RATE_BARS = {
    BARE: Bar(1.1, "at least"),
    PORTKEY: Bar(7, "at least"),
    LITELLM: Bar(60, "at least"),
    f"{LITELLM}, Redis budgets": Bar(60, "at least"),
}


def measure(rounds: int, *, peers: bool) -> list[Finding]:
    """Start everything, measure, stop everything."""
    if shutil.which("wrk") is None:
        sys.exit("wrk is not installed: apt-get install wrk")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        return list(Bench(stack, folder, peers=peers).findings(rounds))


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peers", action="store_true", help="also against Portkey's gateway and LiteLLM's proxy")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    asked = parser.parse_args()
    print(as_text(measure(asked.rounds, peers=asked.peers)))


if __name__ == "__main__":
    main()
