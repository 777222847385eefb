"""Honest clients beside an attacker who changes his way every minute: are they served, and does nothing grow.

Run it as `python -m benchmarks.soak [--minutes 60] [--clients 200] [--out FOLDER]`. A relay with its default bounds
stands before a quick backend and a Valkey with 150 MB. The clients ask at a steady rate, well below what it could
serve; `benchmarks.soak_attacks` has the attacks, between which there are quiet minutes. Shorter runs change the attack
more often. It exits with 1 if something that is sampled still grows from the last round of attacks but one to the last
(three of them are an hour), or if during an attack less than 99 % of the honest requests were served, or their 99th
percentile was over three times that of the quiet minutes.
"""

import argparse
import asyncio
import json
import math
import os
import random
import re
import shutil
import statistics
import sys
import tempfile
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field
from itertools import count, cycle
from pathlib import Path
from typing import NamedTuple

import aiohttp
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from redis.asyncio import Redis

from benchmarks.relay import process
from benchmarks.soak_attacks import ATTACKS, QUIET
from benchmarks.streams import memory_kib
from limiter.licences.keys import issue
from limiter.licences.tokens import public_key_text
from tests.support.cli import Relay
from tests.support.redis_servers import Server, binaries

SAMPLE_S, KEYS_EVERY_S = 5.0, 30.0
PAUSE_S = 6.0  # of one client between its requests
QUIET_EVERY = 4  # attacks
TIMEOUT_S = 30.0
MIN_SUCCESS, MAX_P99_RATIO = 0.99, 3.0
FLAT = 0.1  # of the mean: what the last round may rise by
# And by how little something is no growth, whatever its mean.
TOLERANCE = {"memory, MiB": 3.0, "open files": 10, "threads": 2, "in flight": 3, "settlements": 3, "connections": 10}
WITH_ROWS, ROWS = "Redis, MiB", "install"  # rows stay, as many as new installs are let in
MAXMEMORY_MB, KEEP_MB = 150, 64
LOG = "relay.log"
ATTACKERS_LICENCES = 20
UPLOAD = (
    b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n'
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n' + b"\0" * 20_000 + b"\r\n--b--\r\n"
)


@dataclass(frozen=True, slots=True)
class Request:
    """One request of an honest client, and how it ended. latency_s: to the first byte."""

    slot: str
    what: str
    latency_s: float
    outcome: str  # "ok", or what it got instead


class Sample(NamedTuple):
    """What the relay and Redis took at a time."""

    at_s: float
    slot: str
    quiet: int | None
    taken: dict[str, float]


@dataclass(slots=True)
class Soak:
    """What was seen so far. slot: the attack that is made now. quiet: which quiet time this is, once it is quiet."""

    slot: str = QUIET
    quiet: int | None = None
    requests: list[Request] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    unexpiring: list[Counter[str]] = field(default_factory=list)
    attacker_got: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))


def _chat(*, stream: bool) -> bytes:
    messages = [{"role": "user", "content": f"{uuid.uuid4()}"}]
    return json.dumps({"model": "m", "stream": stream, "messages": messages}).encode()


def _next_request() -> tuple[str, bytes | None, dict[str, str]]:
    """Return the path, the body and the headers of an honest request."""
    path, body, kind = random.choice(
        (
            ("/v1/chat/completions", _chat(stream=False), "application/json"),
            ("/v1/chat/completions", _chat(stream=True), "application/json"),
            ("/v1/embeddings", b'{"model": "m", "input": ["a", "b"]}', "application/json"),
            ("/v1/responses", b'{"model": "m", "input": "Hi"}', "application/json"),
            ("/v1/audio/transcriptions", UPLOAD, "multipart/form-data; boundary=b"),
            ("/v1/models", None, ""),
            ("/v1/credits", None, ""),
        )
    )
    headers = {"Content-Type": kind} if body is not None else {}
    if body is not None and random.random() < 1 / 3:
        headers["Idempotency-Key"] = str(uuid.uuid4())
    return path, body, headers


async def be_honest(session: aiohttp.ClientSession, url: str, headers: Mapping[str, str], soak: Soak) -> None:
    """Ask for ever, at a steady rate on average."""
    while True:
        await asyncio.sleep(random.uniform(0.5, 1.5) * PAUSE_S)
        path, body, more = _next_request()
        slot, began_s, first_s = soak.slot, time.monotonic(), 0.0
        try:
            method = "GET" if body is None else "POST"
            async with session.request(method, url + path, data=body, headers={**headers, **more}) as answer:
                first = await answer.content.readany()
                first_s = time.monotonic() - began_s
                text = first + await answer.read()
            outcome = "ok" if answer.ok and b'"error"' not in text else f"{answer.status} {_code(text)}"
        except (aiohttp.ClientError, TimeoutError) as error:
            outcome = type(error).__name__
        soak.requests.append(Request(slot, path, first_s or time.monotonic() - began_s, outcome))


def _code(text: bytes) -> str:
    found = re.search(rb'"code": ?"(\w+)"', text)
    return found[1].decode() if found else ""


async def sample(relay: Relay, log: int, redis: "Redis", session: aiohttp.ClientSession, soak: Soak) -> None:
    """Look every few seconds at what the relay and Redis take."""
    pid, log_b, keys_at_s, rows = relay.process.pid, 0, 0.0, 0
    while True:
        now_s = time.monotonic()
        if now_s >= keys_at_s:
            keys_at_s = now_s + KEYS_EVERY_S
            soak.unexpiring.append(await unexpiring(redis))
            rows = soak.unexpiring[-1][ROWS]
        try:
            async with session.get(f"{relay.url}/metrics") as answer:
                page = await answer.text()
        except (aiohttp.ClientError, TimeoutError):
            page = ""  # the next one will tell
        memory = await redis.info("memory")
        row_b = await _row_bytes(redis)
        log_before_b, log_b = log_b, os.fstat(log).st_size
        soak.samples.append(
            Sample(
                now_s,
                soak.slot,
                soak.quiet,
                {
                    "memory, MiB": memory_kib(pid) / 1024,
                    "open files": _entries(pid, "fd"),
                    "threads": _entries(pid, "task"),
                    "in flight": _metric(page, "limiter_requests_in_flight"),
                    "settlements": _metric(page, "limiter_settlements_in_flight"),
                    "connections": _metric(page, "limiter_client_connections"),
                    WITH_ROWS: memory["used_memory"] / (1 << 20),
                    "Redis but rows, MiB": (memory["used_memory"] - rows * row_b) / (1 << 20),
                    "log, KiB/s": (log_b - log_before_b) / 1024 / SAMPLE_S,
                },
            )
        )
        await asyncio.sleep(max(0, now_s + SAMPLE_S - time.monotonic()))


def _entries(pid: int, folder: str) -> int:
    return len([*Path(f"/proc/{pid}/{folder}").iterdir()])


def _metric(page: str, name: str) -> float:
    found = re.search(rf"^{name} (\S+)", page, re.MULTILINE)
    return float(found[1]) if found else float("nan")


async def _row_bytes(redis: "Redis") -> int:
    key = await redis.randomkey()
    while key is not None and f":{ROWS}:" not in key:
        key = await redis.randomkey()
    return (await redis.memory_usage(key) or 0) if key else 0


async def unexpiring(redis: "Redis") -> Counter[str]:
    """Count the keys that never expire, by what follows the prefix."""
    found: Counter[str] = Counter()
    cursor = 0
    while True:
        cursor, keys = await redis.scan(cursor, count=1000)
        pipeline = redis.pipeline(transaction=False)
        for key in keys:
            pipeline.ttl(key)
        for key, ttl in zip(keys, await pipeline.execute(), strict=True):
            if ttl == -1:
                found[str(key).split(":")[1]] += 1
        if not cursor:
            return found


@asynccontextmanager
async def attacker(relay: str, backend: str, licences: Sequence[str]) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run the attacker."""
    running = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.soak_attacks"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert running.stdin  # noqa: S101  it was asked for
    running.stdin.write(json.dumps({"relay": relay, "backend": backend, "licences": licences}).encode() + b"\n")
    try:
        yield running
    finally:
        running.kill()
        await running.wait()


async def attack(running: asyncio.subprocess.Process, soak: Soak, *, minutes: float, slot_s: float) -> None:
    """Let the attacker go through his ways."""
    assert running.stdin  # noqa: S101  it was asked for
    assert running.stdout  # noqa: S101
    end_s = time.monotonic() + minutes * 60
    quiet = count()
    for name in cycle(plan()):
        running.stdin.write(name.encode() + b"\n")
        soak.attacker_got[soak.slot].update(json.loads(await running.stdout.readline()))
        if time.monotonic() >= end_s:
            return
        soak.slot, begun = name, len(soak.requests)
        await asyncio.sleep(slot_s / 2)
        soak.quiet = next(quiet) if name == QUIET else None
        await asyncio.sleep(slot_s / 2)
        soak.quiet = None
        failed = [request for request in soak.requests[begun:] if request.outcome != "ok"]
        taken = ", ".join(f"{what} {value:.0f}" for what, value in soak.samples[-1].taken.items())
        print(f"{name}: {len(soak.requests) - begun} requests, {len(failed)} not served; {taken}", file=sys.stderr)


def plan() -> Iterator[str]:
    """Yield one round of attacks, with quiet ones between."""
    for number, name in enumerate(ATTACKS):
        if number % QUIET_EVERY == 0:
            yield QUIET
        yield name


async def run(folder: Path, *, minutes: float, clients: int) -> Soak:
    """Start everything, watch it, stop everything."""
    key = Ed25519PrivateKey.generate()
    valid_s = round(minutes * 60) + 3600
    licences = [
        issue(key, tier="max", subject=f"{number}", valid_s=valid_s, installs=1)
        for number in range(clients + ATTACKERS_LICENCES)
    ]
    soak = Soak()
    with ExitStack() as stack:
        backend, _ = stack.enter_context(process("benchmarks.soak_backend"))
        binary = binaries()["valkey"]
        assert binary  # noqa: S101  it is a dependency
        options = ("--appendfsync", "everysec", "--maxmemory", f"{MAXMEMORY_MB}mb", "--maxmemory-policy", "noeviction")
        server = Server(binary, folder / "redis", *options).start()
        stack.callback(server.stop)
        log = stack.enter_context((folder / LOG).open("wb")).fileno()
        relay = Relay(
            folder,
            *("--redis", server.url),
            settings={
                "LIMITER_BACKENDS__GEMINI__URL": f"{backend}/v1",
                "LIMITER_BACKENDS__GEMINI__API_KEY": "k",
                "LIMITER_BACKENDS__HARDWARE__URL": f"{backend}/v1",
                "LIMITER_LICENCE__PUBLIC_KEYS": json.dumps([public_key_text(key.public_key())]),
                "LIMITER_LOGS__FORMAT": "json",
                # Loopback is a trusted proxy here, and no exempt network, so that each client has an address.
                "LIMITER_RELAY__TRUSTED_PROXIES": '["127.0.0.1"]',
                "LIMITER_RELAY__EXEMPT_NETWORKS": "[]",
                "LIMITER_IDEMPOTENCY__KEEP_MB": str(KEEP_MB),  # less than half of what Redis has
                # Marks of served requests are kept for a day by default: too long to see whether they go.
                "LIMITER_IDEMPOTENCY__KEEP_S": str(round(minutes * 6)),
            },
            log=log,
        )
        stack.callback(relay.kill)
        async with (
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=TIMEOUT_S)
            ) as session,
            attacker(relay.url, backend, licences[clients:]) as attacking,
            Redis.from_url(server.url, decode_responses=True) as redis,
            asyncio.TaskGroup() as group,
        ):
            slot_s = min(60, max(10, minutes))
            honest = [
                group.create_task(be_honest(session, relay.url, _honest_headers(number, licence), soak))
                for number, licence in enumerate(licences[:clients])
            ]
            sampling = group.create_task(sample(relay, log, redis, session, soak))
            await asyncio.sleep(PAUSE_S * 2)  # the first requests, which make the rows
            soak.requests.clear()
            await attack(attacking, soak, minutes=minutes, slot_s=slot_s)
            for task in (*honest, sampling):
                task.cancel()
    return soak


def _honest_headers(number: int, licence: str) -> dict[str, str]:
    return {
        "X-Install-Id": f"00000000-0000-4000-8000-{number:012}",
        "Authorization": f"Bearer {licence}",
        "X-Forwarded-For": f"198.18.{number % 250}.{1 + number // 250}",
    }


def rises(samples: Sequence[Sample], name: str) -> list[float]:
    """Return by how much something rose from each round of attacks to the next, in the same quiet times of both."""
    values: dict[int, list[float]] = defaultdict(list)
    for sample in samples:
        if sample.quiet is not None and not math.isnan(sample.taken[name]):
            values[sample.quiet].append(sample.taken[name])
    means = {quiet: statistics.fmean(some) for quiet, some in values.items()}
    a_round = [*plan()].count(QUIET)
    by_round: dict[int, list[float]] = defaultdict(list)
    for quiet, mean in means.items():
        if (before := quiet - a_round) in means:
            by_round[quiet // a_round].append(mean - means[before])
    return [statistics.fmean(some) for some in by_round.values()]


def flatness(soak: Soak) -> Iterator[tuple[str, bool]]:
    """Yield a line for each thing that was sampled, and whether it is flat: whether the last rise is next to none."""
    for name in soak.samples[0].taken:
        values = [sample.taken[name] for sample in soak.samples if not math.isnan(sample.taken[name])]
        mean, risen = statistics.fmean(values), rises(soak.samples, name)
        flat = not risen or risen[-1] <= max(FLAT * mean, TOLERANCE.get(name, 0)) or name == WITH_ROWS
        told = "".join(f"{rise:>+10.1f}" for rise in risen)
        yield f"{name:22}{mean:>10.1f}{max(values):>10.1f}   {_flat(flat)}{told}", flat
    half_way, at_end = soak.unexpiring[len(soak.unexpiring) // 2], soak.unexpiring[-1]
    for prefix, number in at_end.items():
        flat = prefix == ROWS or number <= half_way[prefix] + 2
        yield f"keys without TTL, {prefix}: {half_way[prefix]:,} half-way, {number:,} at the end   {_flat(flat)}", flat


def _flat(flat: bool) -> str:
    return "flat    " if flat else "NOT FLAT"


def service(soak: Soak) -> Iterator[tuple[str, bool]]:
    """Yield a line for each attack, and whether the honest clients were served meanwhile."""
    by_slot: dict[str, list[Request]] = defaultdict(list)
    for request in soak.requests:
        by_slot[request.slot].append(request)
    quiet_p99_s = _p99(by_slot[QUIET])
    for slot in (QUIET, *ATTACKS):
        requests = by_slot[slot]
        if len(requests) <= 1:
            continue
        if slot == "hanging_models":  # who asks for what the backend does not answer must wait
            requests = [request for request in requests if request.what != "/v1/models"]
        failed = Counter(request.outcome for request in requests if request.outcome != "ok")
        success, p99_s = 1 - failed.total() / len(requests), _p99(requests)
        good = success >= MIN_SUCCESS and p99_s <= MAX_P99_RATIO * quiet_p99_s
        got = ", ".join(f"{count} {what}" for what, count in soak.attacker_got[slot].items())
        yield (
            (
                f"{slot:20}{len(requests):>8}{success:>9.2%}{p99_s * 1000:>9.0f} ms{p99_s / quiet_p99_s:>6.1f}"
                f"   {'good' if good else 'BAD '}   {dict(failed) or ''}  attacker: {got}"
            ),
            good,
        )


def _p99(requests: Sequence[Request]) -> float:
    return statistics.quantiles((request.latency_s for request in requests), n=100)[98]


def plot(soak: Soak, path: Path) -> None:
    """Draw the samples over time, if matplotlib is there."""
    try:
        from matplotlib import pyplot as plt  # noqa: PLC0415  it is no dependency
    except ImportError:
        return
    names = [*soak.samples[0].taken]
    figure, panels = plt.subplots(len(names), 1, figsize=(9, 1.6 * len(names)), sharex=True)
    minutes = [(sample.at_s - soak.samples[0].at_s) / 60 for sample in soak.samples]
    for panel, name in zip(panels, names, strict=True):
        panel.plot(minutes, [sample.taken[name] for sample in soak.samples])
        panel.set_ylabel(name, fontsize=8)
        panel.set_ylim(bottom=0)
    panels[-1].set_xlabel("minutes")
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Soak, and print what held."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--out", type=Path, help="a folder for what was seen, a plot of it, and the relay's log")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        soak = asyncio.run(run(Path(folder), minutes=asked.minutes, clients=asked.clients))
        if asked.out:
            asked.out.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(folder) / LOG, asked.out)
            (asked.out / "samples.json").write_text(json.dumps([sample._asdict() for sample in soak.samples]))
            (asked.out / "requests.json").write_text(json.dumps([asdict(request) for request in soak.requests]))
            plot(soak, asked.out / "soak.svg")
    held = [*service(soak)], [*flatness(soak)]
    print(f"{'attack':20}{'honest':>8}{'success':>9}{'p99':>12}{'ratio':>6}")
    print("\n".join(line for line, _ in held[0]))
    print(f"\n{'':22}{'mean':>10}{'peak':>10}{'rise from each round of attacks to the next':>57}")
    print("\n".join(line for line, _ in held[1]))
    sys.exit(0 if all(good for lines in held for _, good in lines) else 1)


if __name__ == "__main__":
    main()
