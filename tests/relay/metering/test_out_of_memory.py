"""A Redis that is out of memory: nobody is served for nothing, what was begun is settled, and it passes by itself."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import pytest
from redis.asyncio import Redis

from limiter import CreditLimiter, connect
from limiter.config.settings import OnRedisDown
from limiter.relay.handlers.context import RELAY
from tests.support.openai_backend import Backend, running_backend
from tests.support.redis_servers import Server
from tests.support.relay import RunningRelay, client_of, new_install, relays_on, tiers
from tests.support.wait import eventually


class FullRedis:
    """A relay with both backends on a server of its own, whose memory a test can use up."""

    def __init__(self, server: Server, redis: Redis, relay: RunningRelay, gemini: Backend, hardware: Backend) -> None:
        self.server, self.redis, self.relay, self.gemini, self.hardware = server, redis, relay, gemini, hardware

    async def fill(self) -> None:
        await self.redis.config_set("maxmemory", "1")

    async def make_room(self) -> None:
        await self.redis.config_set("maxmemory", "0")

    @property
    def state(self) -> str:
        return self.relay.app[RELAY].availability.state


StartFull = Callable[..., "asyncio.Future[FullRedis]"]


@pytest.fixture(params=["valkey", "redis"])
async def start(own_server: Callable[..., Server], request: pytest.FixtureRequest) -> AsyncIterator[StartFull]:
    async with AsyncExitStack() as stack:

        async def open_relay(on_redis_down: OnRedisDown) -> FullRedis:
            server = own_server(request.param)
            redis = await connect(server.url)
            stack.push_async_callback(redis.aclose)
            gemini = await stack.enter_async_context(running_backend())
            hardware = await stack.enter_async_context(running_backend())
            start_relay = await stack.enter_async_context(relays_on(redis))
            clients = (client_of("gemini", gemini.url), client_of("hardware", hardware.url))
            limiter = CreditLimiter(redis, tiers(lifetime=100))
            relay = await start_relay(*clients, on=limiter, on_redis_down=on_redis_down)
            return FullRedis(server, redis, relay, gemini, hardware)

        yield lambda on_redis_down="deny": asyncio.ensure_future(open_relay(on_redis_down))


@pytest.mark.parametrize("on_redis_down", ["deny", "hardware"])
async def test_redis_when_it_is_out_of_memory_then_nobody_is_served_and_least_of_all_for_nothing(
    start: StartFull, on_redis_down: OnRedisDown
) -> None:
    full = await start(on_redis_down)
    assert (await full.relay.ask()).status == 200
    asked = len(full.gemini.seen)
    await full.fill()
    for install_id in (full.relay.install_id, new_install(), new_install()):
        answer = await full.relay.ask(headers={"X-Install-Id": install_id})
        assert (answer.status, answer.code) == (503, "limiter_out_of_memory")
        assert answer.headers["Retry-After"] == "5"
        assert "X-Credits-Unmetered" not in answer.headers
    assert (len(full.gemini.seen), len(full.hardware.seen)) == (asked, 0)
    await full.make_room()
    assert (await full.relay.ask()).status == 200, "the state refuses nothing by itself"
    assert await full.relay.spent() == (2, 2)


async def test_redis_when_it_is_out_of_memory_then_readiness_metrics_and_log_show_it_and_a_balance_is_answered(
    start: StartFull, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("limiter.relay.metering.availability._OUT_OF_MEMORY_S", 0.5)
    caplog.set_level(logging.DEBUG, "limiter")
    full = await start()
    relay = full.relay
    assert (await relay.ask()).status == 200
    await full.fill()
    for _ in range(20):
        assert (await relay.ask()).code == "limiter_out_of_memory"
    assert full.state == "out_of_memory"
    ready = await relay.send("GET", "/readyz")
    assert (ready.status, ready.document["status"], ready.document["redis"]) == (503, "not ready", "out of memory")
    assert ready.document["redis_mode"]["state"] == "out_of_memory"
    metrics = (await relay.send("GET", "/metrics")).body.decode()
    assert "limiter_redis_out_of_memory 1.0" in metrics
    assert 'limiter_decisions_total{reason="",status="OUT_OF_MEMORY",tier="core"} 20.0' in metrics
    assert (await relay.send("GET", "/v1/credits", X_Install_Id=relay.install_id)).status == 200
    await full.make_room()
    await eventually(lambda: full.state == "ok", what="the end of the state")
    assert (await relay.send("GET", "/readyz")).status == 200
    logged = [record.__dict__.get("event") for record in caplog.records if record.levelno > logging.INFO]
    assert logged == ["redis_out_of_memory", "redis_has_memory"]


async def test_redis_when_memory_runs_out_under_a_request_then_it_is_debited_or_released_as_ever(
    start: StartFull,
) -> None:
    full = await start()
    relay = full.relay
    served, left = (asyncio.ensure_future(relay.ask("wait")) for _ in range(2))
    await eventually(lambda: len(full.gemini.seen) == 2)
    await full.fill()
    assert (await relay.ask()).code == "limiter_out_of_memory"
    left.cancel()
    await eventually(lambda: any(seen.gone.is_set() for seen in full.gemini.seen), what="the end of what was left")
    full.gemini.go_on.set()
    assert (await served).status == 200
    assert await relay.spent() == (1, 1)
    await full.make_room()


async def test_redis_when_it_has_no_memory_and_then_dies_then_it_is_unavailable_until_it_is_back(
    start: StartFull,
) -> None:
    full = await start()
    await full.fill()
    assert (await full.relay.ask()).code == "limiter_out_of_memory"
    full.server.kill()
    await eventually(lambda: full.state == "away", what="notice of it")
    assert (await full.relay.ask()).code == "limiter_unavailable"
    full.server.start()
    await eventually(lambda: full.state == "ok", what="the recovery")
    assert (await full.relay.ask()).status == 200
    assert await full.relay.spent() == (1, 1)
