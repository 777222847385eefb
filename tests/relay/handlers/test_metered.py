"""The life of a metered request: what is debited, what is released, and which backend served it."""

import asyncio
import random
import time
from contextlib import suppress
from typing import Any

import pytest
from redis.asyncio import Redis

from limiter import CreditLimiter, Decision
from limiter.relay.handlers.context import RELAY
from tests.support.openai_backend import CHUNK, Backend
from tests.support.redis_servers import free_port
from tests.support.relay import ONE_SERVER, RunningRelay, StartRelay, client_of, new_install, tiers
from tests.support.wait import eventually

pytestmark = ONE_SERVER


async def gone(backend: Backend) -> None:
    await asyncio.wait_for(backend.last.gone.wait(), 1)


# Commit


async def test_chat_when_the_answer_is_complete_then_one_gemini_credit_is_debited(relay: RunningRelay) -> None:
    answer = await relay.ask()
    assert (answer.status, answer.headers["X-Credits-Backend"]) == (200, "gemini")
    assert await relay.spent() == (1, 1)


async def test_chat_when_the_gemini_cap_is_used_up_then_hardware_serves_and_is_debited(
    start_relay: StartRelay, gemini: Backend, hardware: Backend
) -> None:
    relay = await start_relay(
        client_of("gemini", gemini.url), client_of("hardware", hardware.url), tiers=tiers(lifetime=5, gemini_cap=1)
    )
    served = [(await relay.ask()).headers["X-Credits-Backend"] for _ in range(3)]
    assert served == ["gemini", "hardware", "hardware"]
    assert await relay.spent() == (3, 1)
    assert (len(gemini.seen), len(hardware.seen)) == (1, 2)


async def test_costs_when_a_path_has_its_own_then_it_is_debited(start_relay: StartRelay, gemini: Backend) -> None:
    relay = await start_relay(client_of("gemini", gemini.url), costs={"/v1/embeddings": 7, "default": 2})
    await relay.ask(path="/v1/embeddings")
    assert await relay.spent() == (7, 7)
    await relay.ask()
    assert await relay.spent() == (9, 9)


async def test_stream_when_its_first_byte_has_arrived_then_it_is_debited_before_its_end(
    relay: RunningRelay, gemini: Backend
) -> None:
    async with relay.post("stepwise") as response:
        assert await response.content.readany() == CHUNK % 0
        assert await relay.spent() == (1, 1)
        gemini.go_on.set()
        assert (await response.content.read()).endswith(b"data: [DONE]\n\n")
    assert await relay.spent() == (1, 1)


# Release: the backend refused, failed, or timed out before the answer


@pytest.mark.parametrize(
    ("model", "status", "code"),
    [
        ("status:400", 400, "bad"),
        ("status:404", 404, "bad"),
        ("status:422", 422, "bad"),
        ("status:401", 502, "backend_unavailable"),
        ("status:402", 502, "backend_unavailable"),
        ("status:403", 502, "backend_unavailable"),
        ("status:429:7", 502, "backend_unavailable"),
        ("status:500", 502, "backend_unavailable"),
        ("status:503:7", 502, "backend_unavailable"),
        ("redirect", 502, "backend_unavailable"),
        ("switch", 502, "backend_unavailable"),
        ("empty", 502, "backend_unavailable"),
        ("break-before", 502, "backend_unavailable"),
        ("break-head", 502, "backend_unavailable"),
        ("break-body", 502, "backend_unavailable"),
    ],
)
async def test_chat_when_the_only_backend_fails_then_the_hold_is_released(
    start_relay: StartRelay, gemini: Backend, model: str, status: int, code: str
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url))
    answer = await relay.ask(model)
    assert (answer.status, answer.code) == (status, code)
    assert await relay.spent() == (0, 0)
    assert len(gemini.seen) == 1


@pytest.mark.parametrize("model", ["hang", "hang-inside", "dribble"])
async def test_chat_when_the_only_backend_times_out_then_504_and_the_hold_is_released(
    start_relay: StartRelay, gemini: Backend, model: str
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url, timeout_s=0.2))
    answer = await relay.ask(model)
    assert (answer.status, answer.code, answer.headers["Retry-After"]) == (504, "backend_timeout", "1")
    assert await relay.spent() == (0, 0)
    await gone(gemini)


async def test_chat_when_no_backend_listens_then_502_and_the_hold_is_released(start_relay: StartRelay) -> None:
    relay = await start_relay(client_of("hardware", f"http://127.0.0.1:{free_port()}/v1"))
    answer = await relay.ask()
    assert (answer.status, answer.code, answer.headers["Retry-After"]) == (502, "backend_unavailable", "1")
    assert await relay.spent() == (0, 0)


# The client leaves


@pytest.mark.parametrize("model", ["hang", "hang-inside", "dribble"])
async def test_client_when_it_leaves_before_the_answer_then_the_call_ends_and_the_hold_is_released(
    relay: RunningRelay, gemini: Backend, model: str
) -> None:
    asking = asyncio.ensure_future(relay.ask(model))
    await gemini.arrived.wait()
    assert (await relay.limiter.balance(relay.install_id, tier="core")).held == 1
    asking.cancel()
    await gone(gemini)
    left_s = time.monotonic()
    assert await relay.spent() == (0, 0)
    assert time.monotonic() - left_s < 1


async def test_client_when_it_leaves_in_mid_stream_then_the_call_ends_and_the_debit_stands(
    relay: RunningRelay, gemini: Backend
) -> None:
    async with relay.post("stepwise") as response:
        await response.content.readany()
    await gone(gemini)
    assert await relay.spent() == (1, 1)


async def test_client_when_it_leaves_inside_a_big_answer_then_the_debit_stands(
    relay: RunningRelay, gemini: Backend
) -> None:
    """Otherwise all but the last byte of a big answer would be free."""
    async with relay.post("pour") as response:
        await response.content.readexactly(2 << 20)
    await gone(gemini)
    assert await relay.spent() == (1, 1)


class SignallingLimiter(CreditLimiter):
    """Signals when a reserve is on its way."""

    reserving = asyncio.Event()

    async def reserve(self, install_id: str, **named: Any) -> Decision:
        self.reserving.set()
        return await super().reserve(install_id, **named)


async def test_client_when_it_leaves_while_redis_decides_then_the_hold_is_released(
    start_relay: StartRelay, gemini: Backend, redis: Redis
) -> None:
    limiter = SignallingLimiter(redis, tiers(lifetime=1))
    limiter.reserving = asyncio.Event()
    relay = await start_relay(client_of("gemini", gemini.url), on=limiter)
    await redis.client_pause(300)
    asking = asyncio.ensure_future(relay.ask())
    await limiter.reserving.wait()
    asking.cancel()
    await eventually(lambda: bool(relay.app[RELAY].retries._tasks), what="the settlement")
    assert await relay.spent() == (0, 0)
    assert gemini.seen == []
    assert (await relay.ask()).status == 200


class CreatingLimiter(CreditLimiter):
    """Waits before it creates a new row."""

    def __init__(self, redis: Redis) -> None:
        super().__init__(redis, tiers(lifetime=1))
        self.creating, self.go_on = asyncio.Event(), asyncio.Event()

    async def reserve(self, install_id: str, **named: Any) -> Decision:
        if named["may_create"]:
            self.creating.set()
            await self.go_on.wait()
        return await super().reserve(install_id, **named)


async def test_client_when_it_leaves_while_its_install_is_created_then_the_hold_is_released(
    start_relay: StartRelay, gemini: Backend, redis: Redis
) -> None:
    limiter = CreatingLimiter(redis)
    relay = await start_relay(client_of("gemini", gemini.url), on=limiter)
    asking = asyncio.ensure_future(relay.ask())
    await limiter.creating.wait()
    asking.cancel()
    server = relay.runner.server
    assert server
    await eventually(lambda: all(one.transport is None for one in server.connections), what="the client's end")
    limiter.go_on.set()

    async def is_made() -> bool:
        return await limiter.row(relay.install_id) is not None

    await eventually(is_made, what="the new row")
    await eventually(lambda: not relay.app[RELAY].retries._tasks, what="the settlement")
    assert (await limiter.balance(relay.install_id, tier="core")).held == 0
    assert gemini.seen == []


# Broken off after the first byte


async def test_stream_when_it_breaks_then_the_debit_stands_and_an_error_event_is_sent(
    relay: RunningRelay, hardware: Backend
) -> None:
    answer = await relay.ask("break-stream")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "text/event-stream")
    first, last = answer.body.split(b"\n\n", 1)
    assert first + b"\n\n" == CHUNK % 0
    assert last.strip().startswith(b'data: {"type":"urn:limiter:error:backend_unavailable"')
    assert answer.headers["X-Request-Id"].encode() in last
    assert await relay.spent() == (1, 1)
    assert hardware.seen == []


async def test_stream_when_it_stalls_then_the_error_event_is_a_timeout(
    start_relay: StartRelay, gemini: Backend
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url, timeout_s=0.2))
    answer = await relay.ask("stepwise")
    assert b'"code":"backend_timeout"' in answer.body
    assert await relay.spent() == (1, 1)
    await gone(gemini)


async def test_stream_when_it_stops_being_http_then_it_ends_with_an_error_event(
    start_relay: StartRelay, gemini: Backend
) -> None:
    """It must end: aiohttp's C parser stops without an error at an invalid chunk."""
    relay = await start_relay(client_of("gemini", gemini.url, timeout_s=0.3))
    answer = await relay.ask("bad-chunk")
    assert answer.body.startswith(CHUNK % 0)
    assert b"urn:limiter:error:backend_" in answer.body
    assert await relay.spent() == (1, 1)


async def test_stream_when_it_is_packed_and_breaks_then_the_connection_breaks_too(relay: RunningRelay) -> None:
    """Plain text inside a packed stream would be read as damage, not as an error."""
    received = b""
    async with relay.connect("gzip-broken") as (reader, _):
        with suppress(ConnectionResetError):
            received = await asyncio.wait_for(reader.read(), 5)
    assert b"urn:limiter" not in received
    assert not received.endswith(b"0\r\n\r\n")
    assert await relay.spent() == (1, 1)


async def test_big_answer_when_it_breaks_then_the_client_sees_it_broken_and_pays_nothing(relay: RunningRelay) -> None:
    with pytest.raises(Exception, match=r"(?i)payload|connection|disconnected"):
        await relay.ask(f"break-body:{4 << 20}")
    assert await relay.spent() == (0, 0)


# Fallback


@pytest.mark.parametrize(
    "failing",
    ["status:429:9", "status:408", "status:500", "status:503", "break-before", "break-head", "empty", "redirect"],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_fallback_when_gemini_fails_before_its_first_byte_then_hardware_serves_under_the_same_hold(
    start_relay: StartRelay, gemini: Backend, hardware: Backend, failing: str, stream: bool
) -> None:
    relay = await start_relay(
        client_of("gemini", gemini.url, models={"m": failing}),
        client_of("hardware", hardware.url),
        tiers=tiers(lifetime=1),
    )
    answer = await relay.ask("m", stream=stream)
    assert (answer.status, answer.headers["X-Credits-Backend"]) == (200, "hardware")
    assert (len(gemini.seen), len(hardware.seen)) == (1, 1)
    assert hardware.last.document["model"] == "m"
    assert await relay.spent() == (1, 0)


async def test_fallback_when_gemini_times_out_then_hardware_serves_and_the_gemini_call_is_over(
    start_relay: StartRelay, gemini: Backend, hardware: Backend
) -> None:
    relay = await start_relay(
        client_of("gemini", gemini.url, models={"m": "hang"}, timeout_s=0.1), client_of("hardware", hardware.url)
    )
    answer = await relay.ask("m")
    assert (answer.status, answer.headers["X-Credits-Backend"]) == (200, "hardware")
    await gone(gemini)
    assert await relay.spent() == (1, 0)


async def test_fallback_when_gemini_does_not_listen_then_hardware_serves(
    start_relay: StartRelay, hardware: Backend
) -> None:
    relay = await start_relay(
        client_of("gemini", f"http://127.0.0.1:{free_port()}/v1"), client_of("hardware", hardware.url)
    )
    assert (await relay.ask()).headers["X-Credits-Backend"] == "hardware"
    assert await relay.spent() == (1, 0)


@pytest.mark.parametrize("status", [401, 402, 403, 407])
async def test_fallback_when_gemini_refuses_the_operator_then_hardware_serves_and_the_log_says_why(
    start_relay: StartRelay, gemini: Backend, hardware: Backend, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    relay = await start_relay(
        client_of("gemini", gemini.url, models={"m": f"status:{status}"}), client_of("hardware", hardware.url)
    )
    answer = await relay.ask("m")
    assert (answer.status, answer.headers["X-Credits-Backend"]) == (200, "hardware")
    assert (len(gemini.seen), len(hardware.seen)) == (1, 1)
    (record,) = caplog.records
    assert record.__dict__["event"] == "backend_refuses_operator"
    assert record.getMessage().startswith("The backend 'gemini' refuses this relay, not its clients: ")
    assert record.getMessage().endswith(f" ({status}: no: you sent Bearer ***)")
    assert await relay.spent() == (1, 0)


async def test_backend_when_it_refuses_the_operator_and_is_the_only_one_then_the_log_says_so(
    start_relay: StartRelay, gemini: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url))
    answer = await relay.ask("status:401")
    assert answer.document["detail"] == "The backend 'gemini' refuses this relay (401)."
    (record,) = caplog.records
    assert (record.__dict__["event"], record.__dict__["backend"]) == ("backend_refuses_operator", "gemini")
    assert (record.__dict__["cause"], record.__dict__["status"]) == ("key", 401)
    assert record.getMessage() == (
        "The backend 'gemini' refuses this relay, not its clients: its API key is missing, wrong, expired or blocked "
        "(401: no: you sent Bearer ***)"
    )


@pytest.mark.parametrize("model", ["status:400", "status:422"])
async def test_fallback_when_gemini_refuses_the_request_then_there_is_none(
    relay: RunningRelay, gemini: Backend, hardware: Backend, model: str
) -> None:
    assert (await relay.ask(model)).status >= 400
    assert (len(gemini.seen), len(hardware.seen)) == (1, 0)
    assert await relay.spent() == (0, 0)


async def test_fallback_when_hardware_fails_too_then_its_failure_is_reported(
    start_relay: StartRelay, gemini: Backend, hardware: Backend
) -> None:
    relay = await start_relay(
        client_of("gemini", gemini.url, models={"m": "status:500"}),
        client_of("hardware", hardware.url, models={"m": "hang"}, timeout_s=0.1),
    )
    answer = await relay.ask("m")
    assert (answer.status, answer.code) == (504, "backend_timeout")
    assert "'hardware'" in answer.document["detail"]
    assert await relay.spent() == (0, 0)


async def test_hardware_when_it_fails_then_gemini_is_not_tried(
    start_relay: StartRelay, gemini: Backend, hardware: Backend
) -> None:
    relay = await start_relay(
        client_of("gemini", gemini.url),
        client_of("hardware", hardware.url, models={"m": "status:500"}),
        tiers=tiers(lifetime=5, gemini_cap=0),
    )
    assert (await relay.ask("m")).status == 502
    assert (len(gemini.seen), len(hardware.seen)) == (0, 1)
    assert await relay.spent() == (0, 0)


async def test_hardware_when_it_is_the_only_backend_then_it_serves_and_no_gemini_credit_is_debited(
    start_relay: StartRelay, hardware: Backend
) -> None:
    relay = await start_relay(client_of("hardware", hardware.url), tiers=tiers(lifetime=3, gemini_cap=1))
    served = [(await relay.ask()).headers["X-Credits-Backend"] for _ in range(3)]
    assert served == ["hardware"] * 3
    assert await relay.spent() == (3, 0)


async def test_client_when_it_leaves_during_the_fallback_then_both_calls_are_over_and_nothing_is_debited(
    start_relay: StartRelay, gemini: Backend, hardware: Backend
) -> None:
    relay = await start_relay(
        client_of("gemini", gemini.url, models={"m": "status:500"}),
        client_of("hardware", hardware.url, models={"m": "hang"}),
    )
    asking = asyncio.ensure_future(relay.ask("m"))
    await hardware.arrived.wait()
    asking.cancel()
    await gone(hardware)
    assert await relay.spent() == (0, 0)


# Many at once


async def test_quota_when_two_relays_serve_one_install_at_once_then_together_exactly_the_quota(
    start_relay: StartRelay, gemini: Backend, hardware: Backend
) -> None:
    install_id, quota = new_install(), tiers(lifetime=25, gemini_cap=10)
    relays = [
        await start_relay(client_of("gemini", gemini.url), client_of("hardware", hardware.url), tiers=quota)
        for _ in range(2)
    ]
    for relay in relays:
        relay.install_id = install_id
    answers = await asyncio.gather(*(relays[number % 2].ask() for number in range(80)))
    statuses = [answer.status for answer in answers]
    assert statuses.count(200) == 25
    assert {answer.code for answer in answers if answer.status != 200} <= {"credits_in_flight", "out_of_credits"}
    for relay in relays:
        await relay.settled()
    assert await relays[0].spent() == (25, 10)
    assert (len(gemini.seen), len(hardware.seen)) == (10, 15)
    assert (await relays[1].ask()).status == 402


async def test_order_when_clients_leave_at_random_then_what_was_debited_is_what_was_delivered(
    start_relay: StartRelay, gemini: Backend, hardware: Backend
) -> None:
    """Streams, whole answers and failures; a third of the clients leave after a random time."""
    relay = await start_relay(
        client_of("gemini", gemini.url), client_of("hardware", hardware.url), tiers=tiers(lifetime=1000, gemini_cap=60)
    )
    models = ["stream:4:0.01", "slow:0.02", "status:500", "break-before", "stream:1:0", "plain"]
    leave_after_s = random.Random(5)
    served, left = 0, 0

    async def one(number: int) -> None:
        nonlocal served, left
        stays_s = leave_after_s.uniform(0, 0.08) if number % 7 < 2 else 10
        async with relay.connect(models[number % len(models)]) as (reader, _):
            try:
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), stays_s)
                served += head.startswith(b"HTTP/1.1 200 ")
            except TimeoutError:
                left += 1

    await asyncio.gather(*(one(number) for number in range(120)))
    consumed, gemini_consumed = await relay.spent()
    # What was on its way to a client that had gone is debited, too; nothing else may differ.
    assert served <= consumed <= served + left
    assert served > 50
    assert gemini_consumed <= 60


async def test_client_when_it_half_closes_then_it_counts_as_disconnected(relay: RunningRelay, gemini: Backend) -> None:
    async with relay.connect("hang") as (_, writer):
        await gemini.arrived.wait()
        writer.write_eof()
        await gone(gemini)
        assert await relay.spent() == (0, 0)
