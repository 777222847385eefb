"""The main job on real input: an old file in, two relay processes, a real client until the credits end, a file out."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import openai
import pytest
from openai import AsyncOpenAI
from redis.asyncio import Redis

from limiter import connect
from tests.support.cli import Relay, limiter
from tests.support.litellm import backend_process
from tests.support.redis_servers import Server

OLD = "b879d5d7-bb73-4526-a28e-55a8af93660b"  # an old row, with `month`
NEW = "e9929239-4dca-45bc-9571-7570a82f0739"  # a row as credits.js writes it today
FRESH = "B230E268-cdbb-42e6-9d47-76bd3362b93f"  # in no file
OLD_ROW = {
    "install_id": OLD,
    "tier_snapshot": "core",
    "lifetime_consumed": 46,
    "lifetime_gemini_consumed": 19,
    "monthly_consumed": 0,
    "last_active_at": "2026-04-28T21:24:54.719Z",
    "month": "2026-04",
    "note": {"from": "support", "ticket": 17},
}
NEW_ROW = {
    "install_id": NEW,
    "tier_snapshot": "core",
    "lifetime_consumed": 48,
    "lifetime_gemini_consumed": 20,
    "last_renewal_at": "2026-05-04T21:24:54.719Z",
    "anniversary_day": 4,
    "monthly_consumed": 0,
    "monthly_gemini_consumed": 0,
    "last_active_at": "2026-05-04T21:24:54.719Z",
}
MESSAGES: Any = [{"role": "user", "content": "Good morning to you"}]


@pytest.fixture
def hardware() -> Iterator[str]:
    """Run an OpenAI-compatible server in a process of its own, and yield its base URL."""
    with backend_process() as url:
        yield url


@pytest.fixture
def relays(tmp_path: Path, hardware: str, redis_url: str) -> Iterator[Callable[..., Relay]]:
    """Start relays on the shared Redis, with hardware as their only backend."""
    started: list[Relay] = []

    def start(**settings: str) -> Relay:
        common = {"LIMITER_BACKENDS__HARDWARE__URL": hardware, "LIMITER_PERSISTER__FILE": ""}
        relay = Relay(tmp_path, "--redis", redis_url, settings=common | settings)
        started.append(relay)
        return relay

    yield start
    for relay in started:
        relay.kill()


@pytest.fixture
async def clients() -> AsyncIterator[Callable[[Relay, str], AsyncOpenAI]]:
    """Make OpenAI clients, which know of the relay only its URL."""
    made: list[AsyncOpenAI] = []

    def make(relay: Relay, install_id: str) -> AsyncOpenAI:
        made.append(AsyncOpenAI(base_url=f"{relay.url}/v1", api_key=install_id))
        return made[-1]

    yield make
    for client in made:
        await client.close()


async def seen_by(backend: str) -> list[dict[str, Any]]:
    """Ask a backend of the tests for the requests that it got."""

    def ask() -> list[dict[str, Any]]:
        with urlopen(backend.removesuffix("/v1") + "/seen") as answer:  # noqa: S310  our own server
            requests: list[dict[str, Any]] = json.load(answer)
            return requests

    return await asyncio.to_thread(ask)


async def spend_until_402(clients: list[AsyncOpenAI]) -> int:
    """Send requests by each client in turn, every third one as a stream, until a 402; return the number of answers."""
    for served in range(1000):
        client = clients[served % len(clients)]
        try:
            if served % 3 == 2:
                stream = await client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
                text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])
            else:
                answer = await client.chat.completions.create(model="m", messages=MESSAGES)
                text = answer.choices[0].message.content or ""
        except openai.APIStatusError as error:
            if error.status_code == 402 and error.code == "out_of_credits":
                return served
            raise
        assert text
    raise AssertionError("the credits did not end")


async def test_imported_ledger_is_spent_through_two_relays_until_402_and_dumped_again(
    redis: Redis, redis_url: str, tmp_path: Path, hardware: str, relays: Any, clients: Any
) -> None:
    assert await redis.dbsize() == 0
    old_file = tmp_path / "old-credits.json"
    old_file.write_text(json.dumps({"rows": {OLD: OLD_ROW, NEW: NEW_ROW}}))
    imported = limiter("import", str(old_file), "--redis", redis_url, "--json", cwd=tmp_path)
    assert imported.returncode == 0, imported.stderr
    assert json.loads(imported.stdout)["new"] == 2

    one, other = relays(), relays()
    served: dict[str, int] = {}
    for install_id in (OLD, NEW, FRESH):
        served[install_id] = await spend_until_402([clients(one, install_id), clients(other, install_id)])
    assert served == {OLD: 4, NEW: 2, FRESH: 50}
    assert len(await seen_by(hardware)) == sum(served.values())

    new_file = tmp_path / "credits.json"
    dumped = limiter("dump", str(new_file), "--redis", redis_url, "--json", cwd=tmp_path)
    assert dumped.returncode == 0, dumped.stderr
    rows = json.loads(new_file.read_text())["rows"]
    assert rows.keys() == {OLD, NEW, FRESH.lower()}
    for install_id, before in ((OLD, OLD_ROW), (NEW, NEW_ROW), (FRESH.lower(), {})):
        # All was served by hardware, so the debits are the lifetime's, and none is Gemini's.
        assert rows[install_id]["lifetime_consumed"] == 50
        assert rows[install_id]["lifetime_gemini_consumed"] == before.get("lifetime_gemini_consumed", 0)
        assert rows[install_id]["tier_snapshot"] == "core"
    assert rows[OLD]["note"] == OLD_ROW["note"]
    assert "month" not in rows[OLD]
    assert all(client.stop() == 0 for client in (one, other))


async def test_many_clients_at_once_on_two_relays_get_exactly_the_quota(
    redis: Redis, relays: Any, clients: Any
) -> None:
    one, other = relays(LIMITER_TIERS__CORE__MAX_IN_FLIGHT="64"), relays(LIMITER_TIERS__CORE__MAX_IN_FLIGHT="64")
    both = [clients(one, FRESH), clients(other, FRESH)]

    async def ask(number: int) -> bool:
        try:
            # Each request differs: one with the same body would be recognised as an SDK's retry and replayed.
            words: Any = [{"role": "user", "content": f"Number {number}"}]
            await both[number % 2].with_options(max_retries=20).chat.completions.create(model="m", messages=words)
        except openai.APIStatusError as error:
            if error.code == "out_of_credits":
                return False
            raise
        return True

    answers = await asyncio.gather(*(ask(number) for number in range(100)))
    assert sum(answers) == 50
    row = await redis.hgetall(f"credits:install:{FRESH.lower()}")
    assert row[b"lifetime_consumed"] == b"50"


async def test_kill_9_in_mid_request_releases_the_credit_when_the_hold_expires(
    redis: Redis, relays: Any, clients: Any
) -> None:
    relay = relays(
        LIMITER_RELAY__HOLD_S="3",
        LIMITER_RELAY__UPLOAD_S="0.4",
        LIMITER_BACKENDS__GEMINI__TIMEOUT_S="1",
        LIMITER_BACKENDS__HARDWARE__TIMEOUT_S="1.5",
        LIMITER_TIERS__CORE__LIFETIME="1",
    )
    other = relays(LIMITER_TIERS__CORE__LIFETIME="1")
    client = clients(relay, FRESH).with_options(max_retries=0)
    asking = asyncio.ensure_future(client.chat.completions.create(model="hang", messages=MESSAGES))
    key = f"credits:install:{FRESH.lower()}"
    while not await redis.hexists(key, "held"):
        await asyncio.sleep(0.01)
    relay.kill()
    with pytest.raises(openai.APIConnectionError):
        await asking

    # The credit is held: others wait for it, with the SDK's own retries, until it is free again.
    answer = (
        await clients(other, FRESH).with_options(max_retries=10).chat.completions.create(model="m", messages=MESSAGES)
    )
    assert answer.choices[0].message.content
    assert other.stop() == 0
    assert await redis.hget(key, "lifetime_consumed") == b"1"


async def test_relay_survives_an_outage_of_redis(
    own_server: Callable[..., Server], tmp_path: Path, hardware: str, clients: Any
) -> None:
    server = own_server()
    settings = {"LIMITER_BACKENDS__HARDWARE__URL": hardware, "LIMITER_PERSISTER__FILE": ""}
    relay = Relay(tmp_path, "--redis", server.url, settings=settings)
    try:
        client = clients(relay, FRESH).with_options(max_retries=0)
        await client.chat.completions.create(model="m", messages=MESSAGES)
        server.kill()
        with pytest.raises(openai.InternalServerError) as refused:
            await client.chat.completions.create(model="m", messages=MESSAGES)
        assert (refused.value.status_code, refused.value.code) == (503, "limiter_unavailable")
        assert "Retry-After" in refused.value.response.headers
        server.start()
        words: Any = [{"role": "user", "content": "Something else"}]  # or it would be a retry of what was answered
        await client.with_options(max_retries=5).chat.completions.create(model="m", messages=words)
        assert relay.stop(signal.SIGTERM) == 0
        checked = await connect(server.url)
        assert await checked.hget(f"credits:install:{FRESH.lower()}", "lifetime_consumed") == b"2"
        await checked.aclose()
    finally:
        relay.kill()


async def test_gemini_key_sends_requests_there_with_the_operators_key(
    redis: Redis, redis_url: str, tmp_path: Path, hardware: str, clients: Any
) -> None:
    settings = {
        "LIMITER_BACKENDS__GEMINI__URL": hardware,
        "LIMITER_BACKENDS__GEMINI__API_KEY": "operators-own-key",
        "LIMITER_PERSISTER__FILE": "",
    }
    relay = Relay(tmp_path, "--redis", redis_url, settings=settings)
    try:
        answer = await clients(relay, FRESH).chat.completions.with_raw_response.create(model="m", messages=MESSAGES)
        assert answer.headers["X-Credits-Backend"] == "gemini"
        headers = dict((await seen_by(hardware))[-1]["headers"])
        assert headers["Authorization"] == "Bearer operators-own-key"
        assert FRESH not in json.dumps(headers)
        assert relay.stop() == 0
        assert await redis.hget(f"credits:install:{FRESH.lower()}", "lifetime_gemini_consumed") == b"1"
    finally:
        relay.kill()
