"""Unmetered service from hardware while Redis is unavailable, if the operator has enabled it."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
from redis.asyncio import Redis

from limiter import CreditLimiter, Decision, connect
from limiter.config.settings import METERED_PATHS
from limiter.relay.telemetry.metrics import METRICS
from limiter.relay.upstream.circuit_breaker import CircuitBreaker
from tests.support.licences import PUBLIC_KEY, claims, signed
from tests.support.openai_backend import Backend
from tests.support.redis_servers import Server, free_port
from tests.support.relay import CHAT, ONE_SERVER, Answer, RunningRelay, client_of, new_install, relays_on, tiers
from tests.support.wait import eventually

UPLOAD = "/v1/audio/transcriptions"


@dataclass
class Node:
    """A relay with both backends, on a server that the test may stop."""

    server: Server
    relay: RunningRelay
    redis: Redis

    async def lose_redis(self, how: str = "kill") -> None:
        """End the server, and wait until the relay has noticed."""
        getattr(self.server, how)()
        assert (await self.relay.ask(headers={"X-Install-Id": new_install()})).status == 200
        assert await self.state() == "away"

    async def bring_back(self, how: str = "kill") -> None:
        self.server.start() if how == "kill" else self.server.resume()

        async def back() -> bool:
            return await self.state() == "ok"

        await eventually(back, what="the recovery")

    async def state(self) -> str:
        ready = await self.relay.send("GET", "/readyz")
        return str(ready.document["redis_mode"]["state"])

    def counted(self, name: str) -> list[str]:
        text = self.relay.app[METRICS].render().decode()
        return [line for line in text.splitlines() if line.startswith(name + "{")]


def is_unmetered(answer: Answer) -> bool:
    ratelimit = [name for name in answer.headers if name.lower().startswith("ratelimit")]
    backend = answer.headers.get("X-Credits-Backend")
    unmetered = answer.headers.get("X-Credits-Unmetered") == "true"
    assert not unmetered or (backend, ratelimit) == ("hardware", [])
    return unmetered


@pytest.fixture
async def node(own_server: Callable[..., Server], gemini: Backend, hardware: Backend) -> AsyncIterator[Node]:
    server = own_server()
    async with AsyncExitStack() as stack:
        redis = await connect(server.url, timeout_ms=400)
        stack.push_async_callback(redis.aclose)
        start = await stack.enter_async_context(relays_on(redis))
        limiter = CreditLimiter(redis, tiers(lifetime=5), timeout_ms=400, deadline_ms=800)
        relay = await start(
            client_of("gemini", gemini.url),
            client_of(
                "hardware",
                hardware.url,
                breaker=CircuitBreaker(failures=2, reset_s=60),
                routes=[path for path in METERED_PATHS if path != "/v1/completions"],
                lacks={"cloud"},
            ),
            on=limiter,
            public_keys=[PUBLIC_KEY],
            on_redis_down="hardware",
        )
        yield Node(server, relay, redis)
        server.resume() if server.process else server.start()  # so that all can be settled


@pytest.mark.parametrize("how", ["kill", "pause"])
async def test_request_when_redis_is_unavailable_then_hardware_serves_it_and_nothing_is_debited(
    node: Node, gemini: Backend, how: str
) -> None:
    relay = node.relay
    assert not is_unmetered(await relay.ask())
    await node.lose_redis(how)
    asked_of_gemini = len(gemini.seen)
    for _ in range(10):  # twice what the install has
        answer = await relay.ask()
        assert (answer.status, is_unmetered(answer)) == (200, True)
    assert len(gemini.seen) == asked_of_gemini == 1
    await node.bring_back(how)
    assert not is_unmetered(await relay.ask())
    assert await relay.spent() == (2, 2)
    (counted,) = [line for line in node.counted("limiter_decisions_total") if "UNMETERED" in line]
    assert counted.endswith('tier="core"} 11.0')


@pytest.mark.parametrize("how", ["kill", "pause"])
async def test_requests_when_they_find_redis_unavailable_then_they_are_served_and_what_they_may_hold_is_released(
    node: Node, gemini: Backend, how: str
) -> None:
    """A paused server executes the reserves after the relay has given up on them."""
    relay = node.relay
    assert (await relay.ask()).status == 200
    assert await relay.spent() == (1, 1)
    getattr(node.server, how)()
    answers = await asyncio.gather(*(relay.ask() for _ in range(3)))
    assert [is_unmetered(answer) for answer in answers] == [True] * 3
    assert len(gemini.seen) == 1
    await node.bring_back(how)
    assert await relay.spent() == (1, 1)


@pytest.mark.parametrize(("model", "path"), [("plain", "/v1/completions"), ("cloud", CHAT)])
@pytest.mark.parametrize("is_noticed", [True, False])
async def test_request_when_redis_is_unavailable_and_hardware_cannot_serve_it_then_it_is_refused(
    node: Node, gemini: Backend, hardware: Backend, model: str, path: str, is_noticed: bool
) -> None:
    assert (await node.relay.ask(model, path)).headers["X-Credits-Backend"] == "gemini"
    if is_noticed:
        await node.lose_redis()
    else:
        node.server.kill()
    asked_of_hardware = len(hardware.seen)
    answer = await node.relay.ask(model, path)
    assert (answer.status, answer.code) == (503, "limiter_unavailable")
    assert (len(gemini.seen), len(hardware.seen)) == (1, asked_of_hardware)
    await node.bring_back()


async def test_stream_when_redis_is_unavailable_then_it_passes_unchanged_and_its_event_has_a_charge_of_0(
    node: Node,
) -> None:
    await node.lose_redis()
    answer = await node.relay.ask("stream", headers={"X-Credits-Event": "1"})
    assert is_unmetered(answer)
    assert b"data: [DONE]" in answer.body
    summary = json.loads(answer.body.rpartition(b": credits ")[2])
    assert summary == {"backend": "hardware", "charged": 0, "unmetered": True}


@pytest.mark.parametrize("is_noticed", [True, False])
async def test_upload_when_redis_is_unavailable_then_its_body_passes_to_hardware(
    node: Node, gemini: Backend, hardware: Backend, is_noticed: bool
) -> None:
    """Also when the upload is the first to find out: none of its body has been read before."""
    if is_noticed:
        await node.lose_redis()
    else:
        node.server.pause()
    form = aiohttp.FormData({"model": "plain"})
    form.add_field("file", b"x" * 300_000, filename="a.wav")
    headers = {"X-Install-Id": node.relay.install_id}
    async with node.relay.session.post(node.relay.url + UPLOAD, data=form, headers=headers) as response:
        assert response.status == 200
        assert response.headers["X-Credits-Unmetered"] == "true"
    assert hardware.last.received > 300_000
    assert gemini.seen == []
    if not is_noticed:
        await node.bring_back("pause")
        assert await node.relay.spent() == (0, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": "Bearer a.b.c"}, 401),
        ({"X-Install-Id": "nobody"}, 400),
        ({"Idempotency-Key": ""}, 400),
    ],
)
async def test_request_when_redis_is_unavailable_then_its_identity_and_body_are_still_checked(
    node: Node, hardware: Backend, headers: Mapping[str, str], status: int
) -> None:
    await node.lose_redis()
    before = len(hardware.seen)
    assert (await node.relay.ask(headers=headers)).status == status
    assert len(hardware.seen) == before


async def test_credits_when_redis_is_unavailable_then_503_and_readyz_shows_the_mode(node: Node) -> None:
    relay = node.relay
    await node.lose_redis()
    assert (await relay.send("GET", "/v1/credits", X_Install_Id=relay.install_id)).status == 503
    assert (await relay.send("GET", "/healthz")).status == 200
    ready = await relay.send("GET", "/readyz")
    assert (ready.status, ready.document["status"]) == (503, "unmetered")
    assert (await relay.send("GET", "/readyz?unmetered=1")).status == 200
    assert (await relay.send("GET", "/v1/models", X_Install_Id=relay.install_id)).status == 200
    await node.bring_back()
    assert (await relay.send("GET", "/readyz")).status == 200


async def test_hardware_when_it_fails_too_then_502_and_the_relay_is_not_ready(node: Node, gemini: Backend) -> None:
    relay = node.relay
    await node.lose_redis()
    for _ in range(3):
        answer = await relay.ask("status:500", headers={"X-Install-Id": new_install()})  # one alone opens no breaker
        assert (answer.status, answer.code) == (502, "backend_unavailable")
    ready = await relay.send("GET", "/readyz?unmetered=1")
    assert (ready.status, ready.document["status"]) == (503, "not ready")
    assert gemini.seen == []


async def test_key_when_redis_is_unavailable_then_it_is_not_remembered_and_its_request_is_debited_once_afterwards(
    node: Node, hardware: Backend
) -> None:
    relay, key = node.relay, {"Idempotency-Key": "k"}
    await node.lose_redis()
    served = len(hardware.seen)
    assert [is_unmetered(await relay.ask(headers=key)) for _ in range(2)] == [True, True]
    assert len(hardware.seen) == served + 2
    await node.bring_back()
    answers = [await relay.ask(headers=key) for _ in range(2)]
    assert answers[1].headers["Idempotency-Replayed"] == "true"
    assert await relay.spent() == (1, 1)


async def test_retry_when_its_first_attempt_was_unmetered_then_it_is_debited_and_not_answered_as_an_earlier_request(
    node: Node,
) -> None:
    relay, counts = node.relay, [{"x-stainless-retry-count": str(number)} for number in range(3)]
    assert not is_unmetered(await relay.ask(headers=counts[0]))
    await relay.settled()
    await node.lose_redis()
    assert is_unmetered(await relay.ask(headers=counts[0]))
    await node.bring_back()
    answers = [await relay.ask(headers=counts[number]) for number in (1, 2)]
    assert ["Idempotency-Replayed" in answer.headers for answer in answers] == [False, True]
    assert await relay.spent() == (2, 2)


async def test_licence_when_redis_is_unavailable_then_its_seats_are_not_counted(node: Node) -> None:
    await node.lose_redis()
    for _ in range(3):
        token = signed(claims(tier="core", installs=1))
        headers = {"X-Install-Id": new_install(), "Authorization": f"Bearer {token}"}
        assert is_unmetered(await node.relay.ask(headers=headers))


class Split(CreditLimiter):
    """A limiter that has one install's row on another server."""

    elsewhere: tuple[str, CreditLimiter]

    async def reserve(self, install_id: str, **options: Any) -> Decision:
        install, limiter = self.elsewhere
        return await (limiter.reserve if install_id == install else super().reserve)(install_id, **options)


@ONE_SERVER
async def test_request_when_only_its_reserve_is_not_answered_then_it_is_refused_and_not_free(
    redis: Redis, own_server: Callable[..., Server], hardware: Backend
) -> None:
    """Other installs are served for credits by that Redis, so this one must not be served for free."""
    gone = own_server()
    lost = await connect(gone.url, timeout_ms=200)
    async with relays_on(redis) as start:
        limiter = Split(redis, tiers(lifetime=5))
        relay = await start(client_of("hardware", hardware.url), on=limiter, on_redis_down="hardware")
        limiter.elsewhere = (relay.install_id, CreditLimiter(lost, tiers(lifetime=5), timeout_ms=200, deadline_ms=600))
        gone.kill()
        asking = asyncio.ensure_future(relay.ask())
        while not asking.done():
            assert not is_unmetered(await relay.ask(headers={"X-Install-Id": new_install()}))
        assert (await asking).status == 503
        assert not is_unmetered(await relay.ask(headers={"X-Install-Id": new_install()}))
    await lost.aclose()


async def test_answers_when_sent_then_none_has_a_server_header(node: Node) -> None:
    for answer in (
        await node.relay.ask(),
        await node.relay.ask("stream"),
        await node.relay.send("GET", "/healthz"),
        await node.relay.send("GET", "/nowhere"),
    ):
        assert "Server" not in answer.headers


async def test_relay_when_hardware_cannot_be_reached_then_502_and_gemini_is_not_called(
    own_server: Callable[..., Server], gemini: Backend
) -> None:
    server = own_server()
    redis = await connect(server.url, timeout_ms=400)
    async with relays_on(redis) as start:
        limiter = CreditLimiter(redis, tiers(lifetime=5), timeout_ms=400, deadline_ms=800)
        nowhere = client_of("hardware", f"http://127.0.0.1:{free_port()}/v1")
        relay = await start(client_of("gemini", gemini.url), nowhere, on=limiter, on_redis_down="hardware")
        server.kill()
        answer = await relay.ask()
        assert (answer.status, answer.code) == (502, "backend_unavailable")
        assert gemini.seen == []
        server.start()
    await redis.aclose()


@pytest.mark.parametrize("path", [CHAT, "/v1/responses"])
async def test_answer_when_hardware_delivers_nothing_then_it_is_a_failure_here_as_well(node: Node, path: str) -> None:
    await node.lose_redis()
    for stream in (True, False):
        answer = await node.relay.ask("error-200", path, stream=stream)
        assert (answer.status, answer.code) == (502, "backend_unavailable")
    await node.bring_back()


async def test_stream_when_it_breaks_then_its_error_event_stands_alone_and_the_comment_says_that_nothing_was_charged(
    node: Node,
) -> None:
    await node.lose_redis()
    answer = await node.relay.ask("break-stream", headers={"X-Credits-Event": "1"}, stream=True)
    content, error, comment, end = answer.body.split(b"\n\n")
    assert json.loads(content.removeprefix(b"data: "))["choices"]
    assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == "backend_unavailable"
    assert comment == b': credits {"charged":0,"backend":"hardware","unmetered":true}'
    assert end == b""
    await node.bring_back()
