"""Redis is killed, stopped and restarted under real relay processes that serve without a pause, in both modes.

No client waits past a bound, exactly what was served for credits is debited, and no relay is restarted.
"""

import asyncio
import queue
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest

from limiter import CreditLimiter, connect
from tests.support.cli import Relay
from tests.support.openai_backend import Backend, running_backend
from tests.support.redis_servers import Server
from tests.support.relay import CHAT, new_install, tiers
from tests.support.wait import eventually

CLIENTS = 12
TIMEOUT_MS = 300
BOUND_S = 15  # three calls to Redis, each 3 x TIMEOUT_MS at most, and a machine that does other things
FAULTS = ("kill", "pause", "stop")


@dataclass
class Counts:
    """The answers to the clients of one relay, and how often each install was served for credits."""

    metered: int = 0
    unmetered: int = 0
    refused: int = 0
    served: dict[str, int] = field(default_factory=dict)


@dataclass
class Fleet:
    """Relay processes on one server, each with clients that send requests without a pause."""

    server: Server
    relays: list[Relay]
    counts: list[Counts]
    gemini: Backend
    session: aiohttp.ClientSession
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    async def ask(self, number: int) -> None:
        """Be one client with an install of its own."""
        relay, counts, install_id = self.relays[number % 2], self.counts[number % 2], new_install()
        counts.served[install_id] = 0
        while not self.stop.is_set():
            async with asyncio.timeout(BOUND_S):
                await self._ask_once(relay, counts, install_id, "stream:1:0" if number % 3 else "plain")
            await asyncio.sleep(0.01)  # refusals come so fast that nothing else would get the machine

    async def _ask_once(self, relay: Relay, counts: Counts, install_id: str, model: str) -> None:
        headers = {"X-Install-Id": install_id}
        async with self.session.post(relay.url + CHAT, json={"model": model}, headers=headers) as answer:
            body = await answer.read()
            if answer.status == 503:
                assert b"limiter_unavailable" in body
                counts.refused += 1
            elif "X-Credits-Unmetered" in answer.headers:
                assert (answer.status, answer.headers["X-Credits-Backend"]) == (200, "hardware")
                counts.unmetered += 1
            else:
                assert (answer.status, answer.headers["X-Credits-Backend"]) == (200, "gemini")
                counts.metered += 1
                counts.served[install_id] += 1

    async def status(self, relay: Relay, path: str) -> int:
        async with asyncio.timeout(BOUND_S), self.session.get(relay.url + path) as answer:
            return answer.status

    async def all_say(self, path: str, status: int) -> bool:
        return [await self.status(relay, path) for relay in self.relays] == [status, status]

    def at_least(self, kind: str, more: int) -> Callable[[], bool]:
        """Return a function that returns whether each relay has given so many more answers of a kind."""
        before = [getattr(counts, kind) for counts in self.counts]
        return lambda: all(getattr(counts, kind) >= was + more for counts, was in zip(self.counts, before, strict=True))


@asynccontextmanager
async def fleet_on(server: Server, folder: Path, mode: str) -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as stack:
        gemini = await stack.enter_async_context(running_backend())
        hardware = await stack.enter_async_context(running_backend())
        settings = {
            "LIMITER_BACKENDS__GEMINI__URL": gemini.url,
            "LIMITER_BACKENDS__GEMINI__API_KEY": "k",
            "LIMITER_BACKENDS__HARDWARE__URL": hardware.url,
            "LIMITER_PERSISTER__FILE": "",
            "LIMITER_RELAY__MINT_PER_IP": "0",
            "LIMITER_TIERS__CORE__LIFETIME": "1000000",
            "LIMITER_TIERS__CORE__GEMINI_CAP": "1000000",
            "LIMITER_REDIS__TIMEOUT_MS": str(TIMEOUT_MS),
            "LIMITER_REDIS__ON_REDIS_DOWN": mode,
        }
        starting = [asyncio.to_thread(Relay, folder, "--redis", server.url, settings=settings) for _ in range(2)]
        relays = await asyncio.gather(*starting)
        for relay in relays:
            stack.callback(relay.kill)
        connector = aiohttp.TCPConnector(limit=0)
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        yield Fleet(server, relays, [Counts(), Counts()], gemini, session)


def changes_logged(relay: Relay) -> list[str]:
    """Return the events that an ended relay logged about Redis, in order."""
    while True:
        try:
            line = relay._lines.get(timeout=5)
        except queue.Empty:
            break
        if not line:
            break
        relay.output.append(line)
    words = ("redis_unavailable", "redis_available")
    return [word for line in relay.output for word in words if word in line]


async def go_through(fleet: Fleet, fault: str, mode: str) -> None:
    """Lose Redis and get it back, with answers of the mode in between and metered ones afterwards."""
    kind = "unmetered" if mode == "hardware" else "refused"
    getattr(fleet.server, fault)()
    await eventually(lambda: fleet.all_say("/readyz", 503), what="notice of it")
    assert await fleet.all_say("/healthz", 200)
    assert await fleet.all_say("/readyz?unmetered=1", 200 if mode == "hardware" else 503)
    gemini_calls = len(fleet.gemini.seen)
    await eventually(fleet.at_least(kind, 20), what=f"answers that are {kind}")
    assert len(fleet.gemini.seen) - gemini_calls <= CLIENTS, "at most what had been reserved"
    fleet.server.resume() if fault == "pause" else fleet.server.start()
    await eventually(lambda: fleet.all_say("/readyz", 200), what="the recovery")
    await eventually(fleet.at_least("metered", 20), what="metered answers again")


@pytest.mark.parametrize("mode", ["deny", "hardware"])
async def test_redis_when_it_is_killed_stopped_and_restarted_under_load_then_no_credit_is_lost_and_no_client_hangs(
    own_server: Callable[..., Server], tmp_path: Path, mode: str
) -> None:
    server = own_server()
    async with fleet_on(server, tmp_path, mode) as fleet:
        asking = [asyncio.ensure_future(fleet.ask(number)) for number in range(CLIENTS)]
        await eventually(fleet.at_least("metered", 20))
        for fault in FAULTS:
            await go_through(fleet, fault, mode)
        fleet.stop.set()
        await asyncio.gather(*asking)
        assert await asyncio.gather(*(asyncio.to_thread(relay.stop) for relay in fleet.relays)) == [0, 0]
        for relay in fleet.relays:
            changes = changes_logged(relay)
            times = len(changes) // 2  # a server that catches up on a busy machine may go a second time
            assert changes == ["redis_unavailable", "redis_available"] * times
            assert len(FAULTS) <= times <= 2 * len(FAULTS)
        redis = await connect(server.url)
        limiter = CreditLimiter(redis, tiers(lifetime=1_000_000))
        for counts in fleet.counts:
            assert not (counts.unmetered if mode == "deny" else counts.refused > CLIENTS * len(FAULTS))
            for install_id, served in counts.served.items():
                row = await limiter.row(install_id)
                assert row
                assert (row.lifetime_consumed, row.lifetime_gemini_consumed, row.holds) == (served, served, ())
        await redis.aclose()
