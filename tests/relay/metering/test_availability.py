"""The availability of Redis as one node sees it: a real server is killed, stopped and restarted under load."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, suppress

import pytest
from redis.asyncio import Redis

from limiter import CreditLimiter, Decision, connect
from limiter.config.settings import OnRedisDown
from limiter.errors import BrokenRow, LimiterUnavailable, Overloaded
from limiter.relay.http.problems import problem_from
from limiter.relay.metering.availability import RedisAvailability, RedisUnavailable, WatchedLimiter
from tests.support.redis_servers import Server
from tests.support.relay import ONE_SERVER, new_install, tiers
from tests.support.wait import eventually

TIMEOUT_MS, DEADLINE_MS = 200, 400


class Node:
    """One node: its limiter and what it knows of Redis, on a server that the test may stop."""

    def __init__(self, server: Server, redis: Redis, on_redis_down: OnRedisDown) -> None:
        self.server, self.redis = server, redis
        self.limiter = CreditLimiter(redis, tiers(lifetime=1000), timeout_ms=TIMEOUT_MS, deadline_ms=DEADLINE_MS)
        self.took_s: list[float] = []
        self.availability = RedisAvailability(self.limiter, on_redis_down=on_redis_down, timed=self.took_s.append)
        self.install_id = new_install()

    async def ask(self, hold_id: str | None = None) -> Decision:
        """Reserve one credit, as a request does."""
        watched = WatchedLimiter(self.limiter, self.availability)
        return await watched.reserve(self.install_id, tier="core", has_hardware=True, hold_id=hold_id)

    async def outcome(self) -> str:
        """Reserve, and return the outcome in a word; an allowed hold is released."""
        try:
            answer = await self.ask()
        except RedisUnavailable:
            return "away"
        except LimiterUnavailable:
            return "unavailable"
        with suppress(LimiterUnavailable):
            await self.limiter.release(self.install_id, answer.hold_id)
        return answer.status

    async def lose_redis(self, how: str) -> None:
        """End the server in some way, and wait until this node has noticed."""
        getattr(self.server, how)()
        assert await self.outcome() == "unavailable"
        assert self.availability.state == "away"

    def bring_back(self, how: str) -> None:
        """Undo it."""
        self.server.start() if how == "kill" else self.server.resume()

    async def is_back(self) -> float:
        """Wait for the recovery, and return how long it took."""
        return await eventually(lambda: self.availability.state == "ok", what="the recovery")


StartNode = Callable[..., "asyncio.Future[Node]"]


@pytest.fixture
async def start_node(own_server: Callable[..., Server], closing: AsyncExitStack) -> AsyncIterator[StartNode]:
    def start(on_redis_down: OnRedisDown = "deny") -> "asyncio.Future[Node]":
        async def open_node() -> Node:
            server = own_server()
            redis = await connect(server.url, timeout_ms=TIMEOUT_MS)
            closing.push_async_callback(redis.aclose)
            node = Node(server, redis, on_redis_down)
            await closing.enter_async_context(node.availability)
            return node

        return asyncio.ensure_future(open_node())

    yield start  # noqa: PT022  closing comes after it


@pytest.mark.parametrize("how", ["kill", "pause"])
async def test_redis_when_it_is_unavailable_then_requests_are_refused_at_once_and_served_within_a_second_of_its_return(
    start_node: StartNode, how: str
) -> None:
    node = await start_node()
    assert await node.outcome() == "ALLOWED"
    await node.lose_redis(how)
    began_s = time.monotonic()
    assert {await node.outcome() for _ in range(200)} == {"away"}
    assert time.monotonic() - began_s < TIMEOUT_MS / 1000, "each waited for Redis"
    node.bring_back(how)
    assert await node.is_back() < 1.5
    assert await node.outcome() == "ALLOWED"


async def test_redis_when_it_is_unavailable_then_a_balance_is_refused_at_once_too(start_node: StartNode) -> None:
    node = await start_node()
    await node.lose_redis("kill")
    with pytest.raises(RedisUnavailable):
        await WatchedLimiter(node.limiter, node.availability).balance(node.install_id, tier="core")


@pytest.mark.parametrize("how", ["kill", "pause"])
async def test_redis_when_it_becomes_unavailable_without_requests_then_the_probe_notices(
    start_node: StartNode, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("limiter.relay.metering.availability._IDLE_S", 0.05)
    node = await start_node()
    getattr(node.server, how)()
    await eventually(lambda: node.availability.state == "away", what="notice of it")
    node.bring_back(how)
    await node.is_back()


async def test_redis_when_its_availability_changes_then_each_change_is_logged_once(
    start_node: StartNode, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "limiter")
    node = await start_node()
    for how in ("kill", "pause"):
        caplog.clear()
        getattr(node.server, how)()
        await asyncio.gather(*(node.outcome() for _ in range(20)))
        await node.outcome()
        node.bring_back(how)
        await node.is_back()
        logged = [record.__dict__["event"] for record in caplog.records]
        assert logged == ["redis_unavailable", "redis_available"]


@pytest.mark.parametrize("on_redis_down", ["deny", "hardware"])
async def test_redis_when_it_is_unavailable_then_requests_are_unmetered_if_the_operator_enabled_that(
    start_node: StartNode, on_redis_down: OnRedisDown
) -> None:
    node = await start_node(on_redis_down)
    assert not node.availability.serves_unmetered
    await node.lose_redis("pause")
    assert node.availability.serves_unmetered == (on_redis_down == "hardware")
    node.bring_back("pause")
    await node.is_back()
    assert not node.availability.serves_unmetered


async def test_wait_until_available_when_redis_is_unavailable_then_it_waits_for_the_recovery(
    start_node: StartNode,
) -> None:
    node = await start_node()
    await node.availability.wait_until_available()
    await node.lose_redis("kill")
    waiting = asyncio.ensure_future(node.availability.wait_until_available())
    await asyncio.wait({waiting}, timeout=0.05)
    assert not waiting.done()
    node.bring_back("kill")
    await waiting
    assert node.availability.state == "ok"


async def test_redis_when_it_accepts_no_writes_then_it_is_unavailable_although_it_answers_a_balance(
    start_node: StartNode, own_server: Callable[..., Server]
) -> None:
    """As after a failover that left the relay on a replica: only the script of a decision shows it."""
    node = await start_node()
    primary = own_server()
    await node.redis.replicaof("127.0.0.1", str(primary.port))
    assert await node.outcome() == "unavailable"
    balance = await node.limiter.balance(node.install_id, tier="core")
    assert balance.remaining == 1000
    with pytest.raises(LimiterUnavailable):
        await node.availability._probe()
    assert node.availability.state == "away"
    await node.redis.replicaof("NO", "ONE")
    await node.is_back()


async def test_redis_when_it_is_restarted_under_load_then_no_client_waits_long_and_all_are_served_again(
    start_node: StartNode,
) -> None:
    node = await start_node()
    stop, outcomes, longest_s = asyncio.Event(), list[str](), 0.0

    async def load() -> None:
        nonlocal longest_s
        while not stop.is_set():
            began_s = time.monotonic()
            outcomes.append(await node.outcome())
            longest_s = max(longest_s, time.monotonic() - began_s)
            await asyncio.sleep(0.002)

    loads = [asyncio.ensure_future(load()) for _ in range(10)]
    await eventually(lambda: outcomes.count("ALLOWED") > 20)
    for how in ("kill", "pause"):
        getattr(node.server, how)()
        refused = outcomes.count("away")
        await eventually(lambda refused=refused: outcomes.count("away") > refused + 100, what="quick refusals")  # type: ignore[misc]
        node.bring_back(how)
        await node.is_back()
        served = outcomes.count("ALLOWED")
        await eventually(lambda served=served: outcomes.count("ALLOWED") > served + 20)  # type: ignore[misc]
    stop.set()
    await asyncio.gather(*loads)
    assert set(outcomes) <= {"ALLOWED", "away", "unavailable"}
    assert outcomes.count("unavailable") <= 40, "at most the requests that were under way waited for Redis"
    assert longest_s < 4 * DEADLINE_MS / 1000


# What does not show that Redis is unavailable


async def test_call_when_it_fails_alone_then_redis_counts_as_available_and_it_is_not_served_for_free(
    start_node: StartNode,
) -> None:
    """As when one of several servers is gone: the installs of the others are served."""
    node, gone = await start_node("hardware"), await start_node()
    gone.server.kill()
    watched = WatchedLimiter(gone.limiter, node.availability)
    failing = asyncio.ensure_future(watched.reserve("x", tier="core", has_hardware=True))
    await asyncio.sleep(0)
    assert await node.outcome() == "ALLOWED"
    with pytest.raises(LimiterUnavailable):
        await failing
    assert not await node.availability.serves_this_unmetered()
    assert await node.outcome() == "ALLOWED"
    assert node.availability.state == "ok"


@pytest.mark.parametrize("on_redis_down", ["deny", "hardware"])
async def test_call_when_it_fails_just_after_another_was_answered_then_a_check_decides_whether_redis_is_unavailable(
    start_node: StartNode, on_redis_down: OnRedisDown
) -> None:
    """As when Redis fails while requests overlap: the failure of the older one alone is not conclusive."""
    node, gone = await start_node(on_redis_down), await start_node()
    gone.server.kill()
    watched = WatchedLimiter(gone.limiter, node.availability)
    failing = asyncio.ensure_future(watched.reserve("x", tier="core", has_hardware=True))
    await asyncio.sleep(0)
    assert await node.outcome() == "ALLOWED"
    node.server.kill()
    with pytest.raises(LimiterUnavailable):
        await failing
    looks = await asyncio.gather(*(node.availability.serves_this_unmetered() for _ in range(5)))
    assert looks == [on_redis_down == "hardware"] * 5


@ONE_SERVER
async def test_row_when_it_is_broken_then_redis_counts_as_available(redis: Redis) -> None:
    limiter = CreditLimiter(redis, tiers(lifetime=10))
    await redis.hset(limiter.session.keys.install("x"), "lifetime_consumed", "many")
    async with RedisAvailability(limiter) as availability:
        with pytest.raises(BrokenRow):
            await WatchedLimiter(limiter, availability).reserve("x", tier="core", has_hardware=True)
        assert availability.state == "ok"


@ONE_SERVER
async def test_probe_when_it_runs_then_it_creates_no_row(redis: Redis) -> None:
    availability = RedisAvailability(CreditLimiter(redis, tiers(lifetime=10)))
    await availability._probe()
    assert await redis.keys("*") == []


@ONE_SERVER
async def test_probe_when_it_is_stopped_at_any_moment_then_it_ends(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In Python 3.11 a cancellation can get lost in redis-py: no shutdown may hang on that."""
    monkeypatch.setattr("limiter.relay.metering.availability._IDLE_S", 0)
    limiter = CreditLimiter(redis, tiers(lifetime=10))
    async with asyncio.timeout(20):
        for turns in range(400):
            async with RedisAvailability(limiter):
                for _ in range(turns % 40):
                    await asyncio.sleep(0)


@ONE_SERVER
async def test_reserve_when_redis_answers_then_it_is_timed_and_the_report_is_ok(redis: Redis) -> None:
    limiter, took_s = CreditLimiter(redis, tiers(lifetime=10)), list[float]()
    async with RedisAvailability(limiter, timed=took_s.append) as availability:
        await WatchedLimiter(limiter, availability).reserve("x", tier="core", has_hardware=True, hold_id="h")
        assert availability.report()["state"] == "ok"
    assert len(took_s) == 1
    assert 0 < took_s[0] < 1
    await limiter.release("x", "h")


async def test_node_when_too_many_decisions_wait_then_the_next_is_refused_at_once_and_redis_counts_as_available(
    own_server: Callable[..., Server], closing: AsyncExitStack
) -> None:
    server = own_server()
    redis = await connect(server.url)
    closing.push_async_callback(redis.aclose)
    redis.multiplexed._max_waiting = 1
    node = Node(server, redis, "deny")
    node.limiter = CreditLimiter(redis, tiers(lifetime=1000), timeout_ms=20_000, deadline_ms=20_000)
    server.pause()
    waiting = asyncio.ensure_future(node.ask())
    for _ in range(3):  # it is in the queue by then
        await asyncio.sleep(0)
    with pytest.raises(Overloaded) as refused:
        await node.ask()
    assert (node.availability.state, problem_from(refused.value).code) == ("ok", "limiter_overloaded")
    server.resume()
    assert (await waiting).allowed


async def test_commit_when_more_calls_wait_than_may_then_it_is_repeated_until_there_is_room(
    own_server: Callable[..., Server], closing: AsyncExitStack
) -> None:
    server = own_server()
    redis = await connect(server.url)
    closing.push_async_callback(redis.aclose)
    redis.multiplexed._max_waiting = 1
    limiter = CreditLimiter(redis, tiers(lifetime=1000))
    held = await limiter.reserve("i", tier="core", has_hardware=True)
    settled = await asyncio.gather(*(limiter.commit("i", held.hold_id) for _ in range(3)))
    assert sorted(settlement.status for settlement in settled) == ["COMMITTED", "GONE", "GONE"]


async def test_denial_when_it_is_cached_then_it_does_not_show_that_redis_is_available(
    own_server: Callable[..., Server], closing: AsyncExitStack
) -> None:
    server = own_server()
    redis = await connect(server.url, timeout_ms=TIMEOUT_MS)
    closing.push_async_callback(redis.aclose)
    node = Node(server, redis, "deny")
    node.limiter = CreditLimiter(redis, tiers(lifetime=0), deadline_ms=DEADLINE_MS, deny_cache_ms=60_000)
    node.availability = RedisAvailability(node.limiter, timed=node.took_s.append)
    assert not (await node.ask()).from_memory
    server.kill()
    lost = asyncio.ensure_future(WatchedLimiter(node.limiter, node.availability).balance(node.install_id, tier="core"))
    while not lost.done():
        assert (await node.ask()).from_memory
        await asyncio.sleep(0.01)
    assert isinstance(lost.exception(), LimiterUnavailable)
    assert (node.availability.state, len(node.took_s)) == ("away", 1)


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), Overloaded(1)], ids=["bug", "overloaded"])
async def test_probe_when_it_fails_at_once_then_it_pauses_before_the_next_one(
    start_node: StartNode, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Without a pause the event loop would do nothing else, for ever."""
    monkeypatch.setattr("limiter.relay.metering.availability._IDLE_S", 0.05)
    node = await start_node()
    probes = 0

    async def fail() -> None:
        nonlocal probes
        probes += 1
        assert probes < 100
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(node.availability, "_probe", fail)
        await asyncio.sleep(1)
        assert 1 <= probes < 20
        assert node.availability.state == ("ok" if isinstance(error, Overloaded) else "away")
    await node.is_back()
    assert await node.outcome() == "ALLOWED"
