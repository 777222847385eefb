"""What open streams cost: our relay against a bare pass-through of aiohttp on uvloop, and against relays of others.

Run it as `python -m benchmarks.streams [--peers] [--rounds N]`. Each server is a new process for each round, so that
its memory is of this round's streams. All streams stay open and get a chunk each in a fixed interval; processor time
and chunks are counted while all of them are open.
"""

import argparse
import asyncio
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

from benchmarks.findings import Bar, Finding, as_text, compared
from benchmarks.peers import install_peers, litellm, portkey
from benchmarks.relay import BARE, LITELLM, OURS, PATH, PORTKEY, Served, our_relay, process, redis_server
from limiter._util.open_files import clients_within, open_files, raise_open_files

ROUNDS = 3
STREAMS, GAP_S = 200, 0.05
PEERS_STREAMS = {PORTKEY: STREAMS, LITELLM: 50}  # LiteLLM's proxy does not bear more at 20 chunks a second
FEW, MANY, MANY_GAP_S = 100, 10_000, 2.0
_WINDOW_S = 6.0
_OPENED_PER_S = 1000
_BEGIN_S = 60.0
_ROWS = 1000
_BODY = b'{"model": "m", "stream": true, "messages": [{"role": "user", "content": "Hi"}]}'
_EVENT = b"data: "

Start = Callable[[], AbstractContextManager[Served]]


@dataclass(frozen=True, slots=True)
class Cost:
    """What a server spent on its streams."""

    chunk_us: float  # processor time
    stream_kib: float  # memory
    begun: int


class Stream(asyncio.Protocol):
    """One client, which reads a stream until it is closed. It costs little itself."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.has_begun = False
        self.refusal = b""
        self.chunks = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:  # noqa: D102
        self.transport = cast("asyncio.Transport", transport)
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:  # noqa: D102
        if not self.has_begun and not data.startswith(b"HTTP/1.1 200"):
            self.refusal = data
        self.has_begun = True
        self.chunks += data.count(_EVENT)


def memory_kib(pid: int) -> int:
    """Return a process's resident memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1])


async def measure(server: Served, count: int, gap_s: float) -> Cost:
    """Open streams, wait until each has begun, and measure for some seconds; then leave all of them."""
    address = urlsplit(server.url)
    host, port = address.hostname or "", address.port or 0
    streams: list[Stream] = []
    loop = asyncio.get_running_loop()

    async def open_one(number: int) -> None:
        headers = {"X-Install-Id": f"00000000-0000-4000-8000-{number % _ROWS:012}", **server.headers}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = f"POST {PATH} HTTP/1.1\r\nHost: relay\r\nContent-Type: application/json\r\n{lines}"
        request = f"{head}Content-Length: {len(_BODY)}\r\n\r\n".encode() + _BODY
        _, stream = await loop.create_connection(lambda: Stream(request), host, port)
        streams.append(stream)

    async def wait_until_all_began() -> None:
        async with asyncio.timeout(_BEGIN_S):
            while not all(stream.has_begun for stream in streams):  # noqa: ASYNC110  an event each would cost memory
                await asyncio.sleep(0.1)
        if refused := [stream.refusal for stream in streams if stream.refusal]:
            raise ConnectionRefusedError(f"{len(refused)} of {len(streams)} streams were refused: {refused[0][:300]!r}")

    await asyncio.gather(*(open_one(number) for number in range(10)))  # imports, and the first rows
    await wait_until_all_began()
    idle_kib = memory_kib(server.pid)
    for number in range(10, count):
        await open_one(number)
        if number % (_OPENED_PER_S // 20) == 0:
            await asyncio.sleep(1 / 20)
    await wait_until_all_began()
    await asyncio.sleep(2 * gap_s)
    cpu_s, chunks = server.cpu_s(), sum(stream.chunks for stream in streams)
    await asyncio.sleep(max(_WINDOW_S, 3 * gap_s))
    cpu_s, chunks = server.cpu_s() - cpu_s, sum(stream.chunks for stream in streams) - chunks
    stream_kib = (memory_kib(server.pid) - idle_kib) / (count - 10)
    for stream in streams:
        stream.transport.abort()
    return Cost(cpu_s / chunks * 1e6, stream_kib, len(streams))


def run(start: Start, count: int, gap_s: float) -> Cost:
    """Measure a server that is started for this."""
    with start() as server:
        return asyncio.run(measure(server, count, gap_s))


@contextmanager
def bare(backend: str) -> Iterator[Served]:
    """Start the bare pass-through."""
    with process("benchmarks.aiohttp_passthrough", backend) as (url, pid):
        yield Served(url, pid)


@contextmanager
def peer(start: Callable[[], AbstractContextManager[object]]) -> Iterator[Served]:
    """Start a relay of others."""
    with start() as running:
        yield Served(running.url, running.pid, headers=running.headers)  # type: ignore[attr-defined]  # a Peer


def findings(rounds: int, *, peers: bool) -> Iterator[Finding]:
    """Measure everything, in interleaved rounds."""
    raise_open_files()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        redis = stack.enter_context(redis_server(folder))
        quick, _ = stack.enter_context(process("benchmarks.constant_backend", "0", str(GAP_S)))
        slow, _ = stack.enter_context(process("benchmarks.constant_backend", "0", str(MANY_GAP_S)))
        ours, theirs = [], []
        for _ in range(rounds):
            ours.append(run(partial(our_relay, folder, quick, redis), STREAMS, GAP_S))
            theirs.append(run(partial(bare, quick), STREAMS, GAP_S))
        yield _compared("processor time of a chunk", BARE, ours, theirs, unit="µs", bar=Bar(0.6, "at most"))
        yield _compared("memory of an open stream", BARE, ours, theirs, unit="KiB", bar=Bar(0.7, "at most"))
        many = min(MANY, clients_within(open_files()) - 10)
        few = [run(partial(our_relay, folder, slow, redis), FEW, GAP_S) for _ in range(rounds)]
        all_of_them = [run(partial(our_relay, folder, slow, redis), many, MANY_GAP_S) for _ in range(rounds)]
        what = f"processor time of a chunk, {many:,} open streams"
        yield _compared(what, f"{OURS}, {FEW} of them", all_of_them, few, unit="µs", bar=Bar(1.2, "at most"))
        if not peers:
            return
        install_peers()
        for name, starting in ((PORTKEY, portkey), (LITELLM, litellm)):
            count = PEERS_STREAMS[name]
            try:
                other = [run(partial(peer, partial(starting, quick, folder)), count, GAP_S) for _ in range(rounds)]
            except ConnectionRefusedError as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
                continue
            same = [run(partial(our_relay, folder, quick, redis), count, GAP_S) for _ in range(rounds)]
            chunk, memory = (1 / 50, 1 / 40) if name == LITELLM else (1, 1)
            what = f"processor time of a chunk, {count} streams"
            yield _compared(what, name, same, other, unit="µs", bar=Bar(chunk, "at most"))
            what = f"memory of an open stream, {count} streams"
            yield _compared(what, name, same, other, unit="KiB", bar=Bar(memory, "at most"))


def _compared(what: str, against: str, ours: list[Cost], theirs: list[Cost], *, unit: str, bar: Bar) -> Finding:
    fact = (lambda cost: cost.chunk_us) if unit == "µs" else (lambda cost: cost.stream_kib)
    return compared(what, against, [*map(fact, ours)], [*map(fact, theirs)], unit=unit, bar=bar)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peers", action="store_true", help="also against Portkey's gateway and LiteLLM's proxy")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    asked = parser.parse_args()
    print(f"{resource.getrlimit(resource.RLIMIT_NOFILE)[1]:,} open files", file=sys.stderr)
    print(as_text(findings(asked.rounds, peers=asked.peers)))


if __name__ == "__main__":
    main()
