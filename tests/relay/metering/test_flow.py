"""What bounds an install beside its credits: its rate, the requests that are left, the streams that run."""

import asyncio
import re
from collections import Counter
from contextlib import AsyncExitStack, suppress

import aiohttp
import pytest
from redis.asyncio import Redis

from limiter import CreditLimiter
from limiter.relay.handlers.context import RELAY
from limiter.relay.telemetry.metrics import METRICS
from tests.support.credits import fields_of
from tests.support.openai_backend import Backend
from tests.support.relay import ONE_SERVER, RunningRelay, StartRelay, client_of, tiers
from tests.support.wait import eventually

pytestmark = ONE_SERVER
KEY = "Idempotency-Key"
SDK = "x-stainless-retry-count"


@pytest.fixture
def start(start_relay: StartRelay, gemini: Backend) -> StartRelay:
    async def started(**options: object) -> RunningRelay:
        return await start_relay(client_of("gemini", gemini.url), **options)

    return started


async def leave(relay: RunningRelay, gemini: Backend, model: str = "hang", **headers: str) -> None:
    """Send a request, and leave once the backend works for it."""
    gemini.arrived.clear()
    named = {name.replace("_", "-"): value for name, value in headers.items()}

    async def ask() -> None:
        async with relay.post(model, headers=named):
            pass

    asking = asyncio.ensure_future(ask())
    await gemini.arrived.wait()
    asking.cancel()
    with suppress(asyncio.CancelledError):
        await asking
    async with asyncio.timeout(1):  # the backend's work ends within a second
        await gemini.last.gone.wait()
    await relay.settled()


def metric(relay: RunningRelay, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", relay.app[METRICS].render().decode(), re.MULTILINE)
    return float(found[1]) if found else 0


async def streams_open(relay: RunningRelay, stack: AsyncExitStack, count: int) -> Counter[str]:
    """Ask for so many streams, one after the other; leave those open that have begun."""
    answers: Counter[str] = Counter()
    for _ in range(count):
        response = await stack.enter_async_context(relay.post("stepwise", stream=True))
        if response.status == 200:
            await response.content.readany()
            answers["200"] += 1
        else:
            answers[(await response.json())["error"]["code"]] += 1
        await relay.settled()
    return answers


async def test_requests_when_they_are_left_again_and_again_then_only_the_free_leaves_cost_nothing(
    start: StartRelay, gemini: Backend
) -> None:
    relay = await start(tiers=tiers(lifetime=50, gemini_cap=20, free_leaves=5))
    for _ in range(12):
        await leave(relay, gemini)
    assert await relay.spent() == (7, 7)
    assert metric(relay, 'limiter_releases_total{cause="left"}') == 12
    assert metric(relay, 'limiter_settlements_total{kind="leave",outcome="RELEASED"}') == 5
    assert metric(relay, 'limiter_settlements_total{kind="leave",outcome="COMMITTED"}') == 7
    assert metric(relay, 'limiter_requests_over_bound_total{bound="leaves"}') == 7


async def test_stream_when_it_is_left_while_it_only_pings_then_it_is_a_leave(
    start_relay: StartRelay, gemini: Backend
) -> None:
    relay = await start_relay(
        client_of("gemini", gemini.url, first_event_s=0.01), tiers=tiers(lifetime=50, free_leaves=1)
    )
    for spent in (0, 1):
        async with relay.post("pings:1000:0.02", stream=True) as response:
            await response.content.readany()
            response.close()
        await asyncio.wait_for(gemini.last.gone.wait(), 1)
        assert (await relay.spent())[0] == spent


@pytest.mark.parametrize("counts", [False, True])
async def test_request_when_each_of_its_retries_is_left_then_it_is_one_leave(
    start: StartRelay, gemini: Backend, counts: bool
) -> None:
    relay = await start(tiers=tiers(lifetime=50, free_leaves=2))
    for attempt in range(8):
        await leave(relay, gemini, **({SDK: str(attempt)} if counts else {KEY: "k"}))
    assert await relay.spent() == (0, 0)
    for _ in range(3):  # each a request of its own: one more is free
        await leave(relay, gemini, model="hang", **{SDK: "0"})
    assert (await relay.spent())[0] == 2


async def test_request_when_its_leave_was_debited_then_its_retry_is_not_served_and_not_debited_again(
    start: StartRelay, gemini: Backend
) -> None:
    relay = await start(tiers=tiers(lifetime=50, free_leaves=0))
    for _ in range(3):
        if gemini.seen:
            answer = await relay.ask("hang", headers={KEY: "k"})
            assert (answer.status, answer.code) == (409, "idempotency_answer_not_kept")
        else:
            await leave(relay, gemini, **{KEY: "k"})
    assert (await relay.spent(), len(gemini.seen)) == ((1, 1), 1)


async def test_request_when_its_client_leaves_before_a_backend_has_it_then_it_is_no_leave(
    start_relay: StartRelay, gemini: Backend
) -> None:
    relay = await start_relay(
        client_of("gemini", gemini.url, max_connections=1), tiers=tiers(lifetime=50, free_leaves=0)
    )
    async with relay.post("stepwise", stream=True) as response:
        await response.content.readany()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3), relay.post("plain"):
                pass
        await eventually(lambda: metric(relay, 'limiter_releases_total{cause="unsent"}') == 1)
        gemini.go_on.set()
        await response.read()
    assert (await relay.spent())[0] == 1


async def test_requests_when_they_are_refused_by_the_backend_then_the_rate_bounds_them(
    start: StartRelay, gemini: Backend
) -> None:
    relay = await start(tiers=tiers(lifetime=50, rate_per_min=6, burst=5))
    answers = [await relay.ask("status:400") for _ in range(40)]
    assert Counter(answer.status for answer in answers) == {400: 5, 429: 35}
    assert len(gemini.seen) == 5
    refused = answers[-1]
    assert refused.code == "rate_limited"
    wait_s = int(refused.headers["Retry-After"])
    assert 0 < wait_s <= 10
    assert '"rate";q=5;w=50' in refused.headers["RateLimit-Policy"]
    assert refused.headers["RateLimit"].endswith(f'"rate";r=0;t={wait_s}')
    assert metric(relay, 'limiter_releases_total{cause="refused"}') == 5
    assert metric(relay, 'limiter_requests_over_bound_total{bound="rate"}') == 35


async def test_replays_when_the_rate_is_used_up_then_they_are_answered(start: StartRelay) -> None:
    relay = await start(tiers=tiers(lifetime=50, rate_per_min=1, burst=1))
    answers = [await relay.ask("plain", headers={KEY: "k"}) for _ in range(4)]
    assert [answer.status for answer in answers] == [200] * 4
    assert (await relay.ask("plain")).code == "rate_limited"


async def test_streams_when_they_run_then_max_in_flight_counts_them_until_their_last_byte(
    start: StartRelay, gemini: Backend
) -> None:
    relay = await start(tiers=tiers(lifetime=200, max_in_flight=4))
    async with AsyncExitStack() as stack:
        assert await streams_open(relay, stack, 50) == {"200": 4, "too_many_in_flight": 46}
        gemini.go_on.set()
    await eventually(lambda: no_marks(relay), what="the end of every stream")
    assert (await relay.ask("plain")).status == 200
    assert (await relay.spent())[0] == 5


async def no_marks(relay: RunningRelay) -> bool:
    await relay.settled()
    row = await relay.limiter.row(relay.install_id)
    return row is not None and not row.streams


async def test_streams_when_their_clients_leave_then_their_places_are_free(start: StartRelay) -> None:
    relay = await start(tiers=tiers(lifetime=200, max_in_flight=4))
    for _ in range(3):
        async with AsyncExitStack() as stack:
            assert await streams_open(relay, stack, 4) == {"200": 4}
        await eventually(lambda: no_marks(relay), what="the end of every stream")


async def test_streams_when_their_node_is_gone_then_their_places_are_free_after_the_lease_and_not_before(
    start: StartRelay, gemini: Backend
) -> None:
    limits = tiers(lifetime=200, max_in_flight=4)
    relay, other = await start(tiers=limits), await start(tiers=limits)
    other.install_id = relay.install_id
    settlements = relay.app[RELAY].settlements
    settlements._lease_s, settlements._lease_ms = 1.5, 1500
    async with AsyncExitStack() as stack:
        assert await streams_open(relay, stack, 4) == {"200": 4}
        settlements._streams.clear()  # as of a dead node: nobody renews
        assert (await other.ask("plain")).code == "too_many_in_flight"
        await eventually(lambda: served(other), what="the end of the leases", within_s=20)
        gemini.go_on.set()


async def served(relay: RunningRelay) -> bool:
    return (await relay.ask("plain")).status == 200


async def test_stream_when_it_outlives_its_lease_then_it_stays_in_flight(
    start: StartRelay, gemini: Backend, redis: Redis
) -> None:
    limits = tiers(lifetime=200, max_in_flight=1)
    relay = await start(tiers=limits)
    settlements = relay.app[RELAY].settlements
    settlements._lease_s, settlements._lease_ms = 3.0, 3000
    async with settlements.renewing(), AsyncExitStack() as stack:
        assert await streams_open(relay, stack, 1) == {"200": 1}
        for _ in range(12):
            await asyncio.sleep(0.5)
            assert (await relay.ask("plain")).code == "too_many_in_flight"
        await redis.script_flush()
        await asyncio.sleep(2)
        assert (await relay.ask("plain")).code == "too_many_in_flight"
        gemini.go_on.set()
    await eventually(lambda: no_marks(relay), what="the end of the stream")


async def test_bounds_when_they_are_only_logged_then_nothing_is_refused_or_debited_and_all_is_counted(
    redis: Redis, start: StartRelay, gemini: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    limits = tiers(lifetime=50, rate_per_min=1, burst=2, free_leaves=1)
    relay = await start(on=CreditLimiter(redis, limits, enforces_bounds=False), bounds="log")
    for _ in range(4):
        await leave(relay, gemini)
    assert await relay.spent() == (0, 0)
    assert metric(relay, 'limiter_requests_over_bound_total{bound="rate"}') == 2
    assert metric(relay, 'limiter_requests_over_bound_total{bound="leaves"}') == 3
    logged = [
        getattr(record, "bound", "")
        for record in caplog.records
        if getattr(record, "event", "") == "request_over_bound"
    ]
    assert Counter(logged) == {"rate": 2, "leaves": 3}


async def test_requests_when_the_relay_stops_under_them_then_they_are_no_leaves(
    redis: Redis, start: StartRelay, gemini: Backend
) -> None:
    relay = await start(tiers=tiers(lifetime=50, free_leaves=0), drain_s=0)
    relay.runner._shutdown_timeout = 0.1

    async def ask() -> None:
        with suppress(aiohttp.ClientError):
            async with relay.post("hang"):
                pass

    asking = asyncio.ensure_future(ask())
    await gemini.arrived.wait()
    await relay.runner.cleanup()
    await asking
    assert (await fields_of(redis, relay.install_id))["lifetime_consumed"] == "0"
