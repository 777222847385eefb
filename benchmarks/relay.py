"""What metering costs: our relay against a bare pass-through of aiohttp on uvloop, both before the same quick backend.

Run it as `python -m benchmarks.relay [ROUNDS]`. It needs wrk (Debian's package), and starts all servers itself. The
rounds are interleaved, and what counts is the ratio within a round: the machine may be busy with other things. The
processor time that a server takes for a request is what others disturb least.
"""

import asyncio
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from benchmarks.quick_backend import CHUNKS, GAP_S
from tests.processes import Relay
from tests.servers import Server, binaries

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
MANY = "1000000000"
SETTINGS = {
    "LIMITER_BACKENDS__GEMINI__API_KEY": "k",
    "LIMITER_TIERS__CORE__LIFETIME": MANY,
    "LIMITER_TIERS__CORE__GEMINI_CAP": MANY,
    "LIMITER_TIERS__CORE__MAX_IN_FLIGHT": "100000",
    "LIMITER_RELAY__MINT_OVERALL": "0",
    "LIMITER_PERSISTER__FILE": "",
    "LIMITER_LOGS__FORMAT": "json",
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

    def cpu_s(self) -> float:
        """Tell the processor time that it has taken."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def process(*arguments: str) -> Iterator[Served]:
    """Run one of the modules here."""
    command = [sys.executable, "-m", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:  # noqa: S603  our own words
        assert running.stdout  # noqa: S101  it was asked for
        try:
            yield Served(f"http://127.0.0.1:{running.stdout.readline().strip()}", running.pid)
        finally:
            running.terminate()


def load(server: Served, script: Path) -> Load:
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
        str(script),
        server.url + PATH,
    ]
    before_s = server.cpu_s()
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603  our own words
    if "Non-2xx" in told or "Socket errors" in told:
        sys.exit(told)
    cpu_s = server.cpu_s() - before_s
    found = re.search(r"\n +50% +(\S+)\s.*\n +99% +(\S+)\s+(\d+) requests in .*Requests/sec: +(\S+)", told, re.DOTALL)
    if found is None:
        sys.exit(told)
    return Load(float(found[4]), _ms(found[1]), _ms(found[2]), cpu_s / int(found[3]) * 1e6)


def _ms(text: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+)(us|ms|s)", text).groups()  # type: ignore[union-attr]  wrk's own form
    return float(number) * {"us": 0.001, "ms": 1, "s": 1000}[unit]


async def stream(url: str) -> Stream:
    """Read some streams at once; the gaps are those between reads."""
    firsts: list[float] = []
    gaps: list[float] = []

    async def one(session: aiohttp.ClientSession, number: int) -> None:
        headers = {"X-Install-Id": f"00000000-0000-4000-8000-{number:012}"}
        await asyncio.sleep(number * GAP_S / STREAMS)  # not all in one moment
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


def row(name: str, ours: Sequence[float], bare: Sequence[float], direct: Sequence[float], unit: str) -> str:
    """Give a line: medians, and the ratio of ours to the pass-through's with its spread."""
    ratios = [mine / other for mine, other in zip(ours, bare, strict=True)]
    relay, other, floor = (statistics.median(numbers) for numbers in (ours, bare, direct))
    return (
        f"{name:30}{relay:9.1f}{other:14.1f}{floor:10.1f} {unit:4}"
        f"  ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    )


def main() -> None:
    """Measure, and print a table."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    if shutil.which("wrk") is None:
        sys.exit("wrk is not installed: apt-get install wrk")
    binary = binaries()["valkey"]
    assert binary  # noqa: S101  it is a dependency
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        script = folder / "ask.lua"
        script.write_text(ASK)
        server = Server(binary, folder / "redis", "--appendfsync", "everysec").start()
        stack.callback(server.stop)
        backend = stack.enter_context(process("benchmarks.quick_backend"))
        bare = stack.enter_context(process("benchmarks.pass_through", backend.url))
        settings = SETTINGS | {"LIMITER_BACKENDS__GEMINI__URL": f"{backend.url}/v1"}
        relay = Relay(folder, "--redis", server.url, settings=settings)
        stack.callback(relay.kill)
        servers = (Served(relay.url, relay.process.pid), bare, backend)
        for one in servers:
            load(one, script)  # warms up, and makes the rows
        loads = [[load(one, script) for one in servers] for _ in range(rounds)]
        streams = [[asyncio.run(stream(one.url)) for one in servers] for _ in range(rounds)]
    print(f"{rounds} rounds of {ROUND_S} s, {CONNECTIONS} connections; {STREAMS} streams of {CHUNKS} chunks")
    print(f"{'':30}{'relay':>9}{'pass-through':>14}{'direct':>10}")
    of_load: list[tuple[str, Callable[[Load], float], str]] = [
        ("requests", lambda one: one.rate, "/s"),
        ("latency, median", lambda one: one.p50_ms, "ms"),
        ("latency, 99 %", lambda one: one.p99_ms, "ms"),
        ("processor time of a request", lambda one: one.cpu_us, "us"),
    ]
    of_streams: list[tuple[str, Callable[[Stream], float], str]] = [
        ("stream, first byte", lambda one: one.first_ms, "ms"),
        ("stream, gap between chunks", lambda one: one.gap_ms, "ms"),
    ]
    for name, fact, unit in of_load:
        print(row(name, *([fact(one) for one in column] for column in zip(*loads, strict=True)), unit))
    for name, of, unit in of_streams:
        print(row(name, *([of(one) for one in column] for column in zip(*streams, strict=True)), unit))


if __name__ == "__main__":
    main()
