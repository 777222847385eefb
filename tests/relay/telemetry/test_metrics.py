"""A relay's metrics of its calls to backends and of its settlements, as /metrics shows them."""

import asyncio
from collections.abc import Callable

import pytest
from prometheus_client.parser import text_string_to_metric_families
from redis.asyncio import Redis

from limiter import CreditLimiter, SettlementStatus, connect
from limiter.relay.telemetry.metrics import METRICS
from limiter.relay.upstream.circuit_breaker import CircuitBreaker
from tests.support.openai_backend import Backend
from tests.support.redis_servers import Server, free_port
from tests.support.relay import ONE_SERVER, RunningRelay, StartRelay, client_of, relays_on, tiers
from tests.support.wait import eventually


def counted(relay: RunningRelay, name: str, **labels: str) -> float:
    """Return a counter as a scrape would see it, summed over all labels that are not given."""
    families = text_string_to_metric_families(relay.app[METRICS].render().decode())
    samples = (sample for family in families for sample in family.samples if sample.name == name)
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


def calls(relay: RunningRelay, backend: str) -> dict[str, float]:
    outcomes = ("served", "refused", "failed", "timeout", "cancelled", "breaker_open", "busy")
    counts = {one: counted(relay, "limiter_backend_calls_total", backend=backend, outcome=one) for one in outcomes}
    assert sum(counts.values()) == counted(relay, "limiter_backend_calls_total", backend=backend)
    return {outcome: count for outcome, count in counts.items() if count}


# Calls


@ONE_SERVER
@pytest.mark.parametrize(
    ("model", "outcome"),
    [
        ("plain", "served"),
        ("stream", "served"),
        ("gzip", "served"),
        ("bad-request", "refused"),
        ("status:500", "failed"),
        ("status:401", "failed"),
        ("break-before", "failed"),
        ("break-stream", "failed"),
        ("empty", "failed"),
        ("hang", "timeout"),
        ("hang-inside", "timeout"),
    ],
)
async def test_call_when_it_has_ended_then_it_is_counted_by_its_outcome(
    start_relay: StartRelay, gemini: Backend, model: str, outcome: str
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url, timeout_s=0.2))
    await relay.ask(model)
    await eventually(lambda: calls(relay, "gemini") == {outcome: 1}, what="the count")


@ONE_SERVER
@pytest.mark.parametrize("model", ["wait", "stepwise"])
async def test_call_when_its_client_leaves_then_it_is_counted_as_cancelled(
    relay: RunningRelay, gemini: Backend, model: str
) -> None:
    async with relay.connect(model) as (reader, _):
        await gemini.arrived.wait()
        if model == "stepwise":
            await reader.readuntil(b"data: ")
    await eventually(lambda: calls(relay, "gemini") == {"cancelled": 1}, what="the end of the call")


@ONE_SERVER
async def test_call_when_the_breaker_prevents_it_then_it_is_counted_too_and_so_is_the_one_to_hardware(
    start_relay: StartRelay, hardware: Backend
) -> None:
    dead = client_of("gemini", f"http://127.0.0.1:{free_port()}/v1", breaker=CircuitBreaker(failures=1, reset_s=60))
    relay = await start_relay(dead, client_of("hardware", hardware.url))
    for _ in range(3):
        assert (await relay.ask()).status == 200
    assert calls(relay, "gemini") == {"failed": 1, "breaker_open": 2}
    assert calls(relay, "hardware") == {"served": 3}


# Settlements


@ONE_SERVER
async def test_settlements_when_they_are_made_then_they_are_counted_with_what_they_debited(
    start_relay: StartRelay, gemini: Backend
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url), costs={"default": 3})
    for model in ("plain", "stream", "status:500"):
        await relay.ask(model)
    await relay.settled()
    assert counted(relay, "limiter_settlements_total", kind="commit", outcome="COMMITTED") == 2
    assert counted(relay, "limiter_settlements_total", kind="release", outcome="RELEASED") == 1
    assert counted(relay, "limiter_settlements_total") == 3
    assert counted(relay, "limiter_credits_debited_total", backend="gemini") == 6


@ONE_SERVER
async def test_commit_when_the_row_was_broken_meanwhile_then_it_is_counted_as_failed(
    relay: RunningRelay, gemini: Backend, redis: Redis
) -> None:
    asking = asyncio.ensure_future(relay.ask("wait"))
    await gemini.arrived.wait()
    key = relay.limiter.session.keys.install(relay.install_id)
    await redis.hset(key, "lifetime_consumed", "many")
    gemini.go_on.set()
    assert (await asking).status == 200
    await relay.settled()
    assert counted(relay, "limiter_settlements_total", kind="commit", outcome="FAILED") == 1
    assert counted(relay, "limiter_settlements_total") == 1
    await redis.delete(key)


async def test_commit_when_shutdown_cannot_wait_for_redis_then_it_is_counted_as_given_up(
    own_server: Callable[..., Server], gemini: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("limiter.relay.metering.background_retries._MIN_DRAIN_S", 0.1)
    server = own_server()
    redis = await connect(server.url, timeout_ms=300)
    async with relays_on(redis) as start:
        limiter = CreditLimiter(redis, tiers(lifetime=5), timeout_ms=300, deadline_ms=600)
        relay = await start(client_of("gemini", gemini.url), on=limiter, drain_s=0)
        asking = asyncio.ensure_future(relay.ask("wait"))
        await gemini.arrived.wait()
        server.kill()
        gemini.go_on.set()
        assert (await asking).status == 200
        await relay.runner.cleanup()
        assert counted(relay, "limiter_settlements_total", kind="commit", outcome="GAVE_UP") == 1
        assert counted(relay, "limiter_settlements_total") == 1
        server.start()
        await limiter.release(relay.install_id, (await asking).headers["X-Request-Id"])
    await redis.aclose()


async def test_undo_when_too_many_are_under_way_then_it_is_counted_as_given_up(
    own_server: Callable[..., Server], gemini: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("limiter.relay.metering.settlement._MAX_UNDOS", 0)
    server = own_server()
    redis = await connect(server.url, timeout_ms=300)
    async with relays_on(redis) as start:
        limiter = CreditLimiter(redis, tiers(lifetime=5), timeout_ms=300, deadline_ms=300)
        relay = await start(client_of("gemini", gemini.url), on=limiter)
        assert (await relay.ask()).status == 200
        await relay.settled()
        server.pause()
        refused = await relay.ask()
        assert refused.status == 503
        assert counted(relay, "limiter_settlements_total", kind="undo", outcome="GAVE_UP") == 1
        server.resume()

        async def released() -> bool:
            return await limiter.release(relay.install_id, refused.headers["X-Request-Id"]) is SettlementStatus.RELEASED

        await eventually(released, what="the hold that was left")
    await redis.aclose()


async def test_undo_when_redis_is_available_again_then_it_is_counted_separately_from_releases(
    own_server: Callable[..., Server], gemini: Backend
) -> None:
    server = own_server()
    redis = await connect(server.url, timeout_ms=300)
    async with relays_on(redis) as start:
        limiter = CreditLimiter(redis, tiers(lifetime=5), timeout_ms=300, deadline_ms=600)
        relay = await start(client_of("gemini", gemini.url), on=limiter)
        assert (await relay.ask()).status == 200
        await relay.settled()
        server.pause()
        assert (await relay.ask()).status == 503
        server.resume()
        await relay.settled()
        assert counted(relay, "limiter_settlements_total", kind="undo") == 1
        assert counted(relay, "limiter_settlements_total", kind="release") == 0
    await redis.aclose()
