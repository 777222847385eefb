"""A server that forgets its scripts, dies, comes back, or stands still; and blocks that end in the middle."""

import asyncio
import time
from collections.abc import Callable
from contextlib import AsyncExitStack

import pytest
from redis.asyncio import Redis

from limiter import CreditLimiter, DecisionStatus, Execution, Hold, LimiterUnavailable, SettlementStatus, connect
from tests.support.credits import TIERS, fields_of
from tests.support.redis_servers import Server
from tests.support.wait import eventually

SERVERS = pytest.mark.parametrize("binary", ["valkey", "redis"])
MakeServer = Callable[..., Server]


async def limiter_on(server: Server, closing: AsyncExitStack, *, deadline_ms: int = 1000) -> CreditLimiter:
    client = await connect(server.url, timeout_ms=200)
    closing.push_async_callback(client.aclose)
    return CreditLimiter(client, TIERS, timeout_ms=200, deadline_ms=deadline_ms)


async def test_scripts_when_flushed_in_mid_traffic_then_every_request_is_counted_once(
    redis: Redis, limiter: CreditLimiter
) -> None:
    async def request(number: int) -> None:
        if number % 10 == 0:
            await redis.script_flush()
        decision = await limiter.reserve("a", tier="pro", has_hardware=False)
        assert (await limiter.commit("a", decision.hold_id)).status is SettlementStatus.COMMITTED
        assert (await limiter.debit("a", tier="pro", has_hardware=False)).allowed

    await asyncio.gather(*(request(number) for number in range(100)))
    fields = await fields_of(redis, "a")
    assert (fields["monthly_consumed"], "held" in fields) == ("200", False)


@SERVERS
async def test_server_when_killed_and_started_again_then_rows_and_holds_are_there_and_the_client_goes_on(
    own_server: MakeServer, closing: AsyncExitStack, binary: str
) -> None:
    server = own_server(binary)
    limiter = await limiter_on(server, closing, deadline_ms=5000)
    await limiter.debit("a", tier="pro", has_hardware=False, cost=3)
    await limiter.reserve("a", tier="pro", has_hardware=False, cost=2, hold_id="h1")
    before = await fields_of(limiter.session.redis, "a")
    server.kill()
    server.start()
    assert (await limiter.reserve("b", tier="pro", has_hardware=False)).allowed
    assert await fields_of(limiter.session.redis, "a") == before
    assert (await limiter.commit("a", "h1")).status is SettlementStatus.COMMITTED
    assert (await fields_of(limiter.session.redis, "a"))["monthly_consumed"] == "5"


@pytest.mark.slow
async def test_server_when_unavailable_then_each_call_fails_within_its_deadline_and_works_again_after(
    own_server: MakeServer, closing: AsyncExitStack
) -> None:
    server = own_server()
    limiter = await limiter_on(server, closing, deadline_ms=300)
    await limiter.reserve("a", tier="pro", has_hardware=False, hold_id="h1")
    server.stop()
    for call in (
        limiter.reserve("a", tier="pro", has_hardware=False),
        limiter.commit("a", "h1"),
        limiter.release("a", "h1"),
        limiter.debit("a", tier="pro", has_hardware=False),
        limiter.balance("a", tier="pro"),
        limiter.row("a"),
    ):
        began = time.monotonic()
        with pytest.raises(LimiterUnavailable):
            await call
        assert time.monotonic() - began < 2, "the deadline is 0.3 s"
    server.start()
    assert (await limiter.commit("a", "h1")).status is SettlementStatus.COMMITTED


async def test_server_when_it_comes_back_within_the_deadline_then_the_caller_does_not_notice(
    own_server: MakeServer, closing: AsyncExitStack
) -> None:
    server = own_server()
    limiter = await limiter_on(server, closing, deadline_ms=20_000)
    server.stop()
    waiting = asyncio.create_task(limiter.reserve("a", tier="pro", has_hardware=False))
    await asyncio.to_thread(server.start)
    assert (await waiting).status is DecisionStatus.ALLOWED


@pytest.mark.slow
async def test_server_when_it_hangs_then_calls_end_in_time_and_count_once_when_it_resumes(
    own_server: MakeServer, closing: AsyncExitStack
) -> None:
    """What was sent to it is still executed then; what is called for later is not even sent."""
    server = own_server()
    limiter = await limiter_on(server, closing)
    server.pause()
    for call, may_be_executed in (
        (limiter.reserve("a", tier="pro", has_hardware=False, cost=2, hold_id="h1"), True),
        (limiter.debit("b", tier="pro", has_hardware=False, cost=2), False),
    ):
        began = time.monotonic()
        with pytest.raises(LimiterUnavailable) as unknown:
            await call
        assert time.monotonic() - began < 3
        assert unknown.value.execution is Execution.UNKNOWN or not may_be_executed
    server.resume()
    again = await limiter.reserve("a", tier="pro", has_hardware=False, cost=2, hold_id="h1")
    assert (again.allowed, again.balance.held) == (True, 2)
    await limiter.commit("a", "h1")
    assert (await fields_of(limiter.session.redis, "a"))["monthly_consumed"] == "2"
    assert await fields_of(limiter.session.redis, "b") == {}


async def test_calls_when_more_than_there_are_connections_then_they_wait_for_one(
    own_server: MakeServer, closing: AsyncExitStack
) -> None:
    client = await connect(own_server().url, max_connections=3)
    closing.push_async_callback(client.aclose)
    limiter = CreditLimiter(client, TIERS)
    answers = await asyncio.gather(*(limiter.debit("a", tier="pro", has_hardware=False) for _ in range(200)))
    assert all(answer.allowed for answer in answers)
    assert (await fields_of(client, "a"))["monthly_consumed"] == "200"


async def test_hold_when_its_block_ends_then_it_is_committed_as_planned(redis: Redis, limiter: CreditLimiter) -> None:
    async with limiter.hold("a", tier="pro", has_hardware=False, cost=2) as hold:
        assert (hold.allowed, hold.backend) == (True, "gemini")
        assert (await limiter.balance("a", tier="pro")).held == 2
    fields = await fields_of(redis, "a")
    assert (fields["monthly_consumed"], fields["monthly_gemini_consumed"], "held" in fields) == ("2", "2", False)


async def test_hold_when_charged_otherwise_then_that_is_committed(redis: Redis, limiter: CreditLimiter) -> None:
    async with limiter.hold("a", tier="pro", has_hardware=True) as hold:
        hold.charge(backend="hardware", cost=5)
    fields = await fields_of(redis, "a")
    assert (fields["monthly_consumed"], fields["monthly_gemini_consumed"]) == ("5", "0")


async def test_hold_when_its_block_raises_then_it_is_released_and_the_error_goes_on(
    redis: Redis, limiter: CreditLimiter
) -> None:
    with pytest.raises(ZeroDivisionError):
        async with limiter.hold("a", tier="pro", has_hardware=False):
            raise ZeroDivisionError
    fields = await fields_of(redis, "a")
    assert (fields["monthly_consumed"], "held" in fields) == ("0", False)


async def test_hold_when_denied_then_the_block_runs_and_there_is_nothing_to_settle(
    redis: Redis, limiter: CreditLimiter
) -> None:
    await limiter.debit("a", tier="core", has_hardware=True, cost=20)
    before = await fields_of(redis, "a")
    async with limiter.hold("a", tier="core", has_hardware=False, cost=31) as hold:
        assert (hold.allowed, hold.backend) == (False, None)
    with pytest.raises(ZeroDivisionError):
        async with limiter.hold("a", tier="core", has_hardware=False, cost=31):
            raise ZeroDivisionError
    assert await fields_of(redis, "a") == before


async def block_for_ever(limiter: CreditLimiter, held: "asyncio.Future[Hold]") -> None:
    async with limiter.hold("a", tier="pro", has_hardware=False) as hold:
        held.set_result(hold)
        await asyncio.get_running_loop().create_future()


async def test_hold_when_its_block_is_cancelled_then_it_is_released(redis: Redis, limiter: CreditLimiter) -> None:
    held = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(block_for_ever(limiter, held))
    await held
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert "held" not in await fields_of(redis, "a")


async def test_hold_when_cancelled_again_while_it_is_being_released_then_that_still_comes_to_its_end(
    own_server: MakeServer, closing: AsyncExitStack
) -> None:
    server = own_server()
    limiter = await limiter_on(server, closing, deadline_ms=20_000)
    held = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(block_for_ever(limiter, held))
    await held
    server.pause()
    for _ in range(3):  # the first ends the block; the others come while the release waits for the server
        task.cancel()
        done, _ = await asyncio.wait({task}, timeout=0.05)
        assert not done
    server.resume()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert "held" not in await fields_of(limiter.session.redis, "a")


async def test_hold_when_cancelled_while_it_is_being_committed_then_it_is_committed_and_the_cancellation_goes_on(
    own_server: MakeServer, closing: AsyncExitStack
) -> None:
    server = own_server()
    limiter = await limiter_on(server, closing, deadline_ms=20_000)

    async def block() -> None:
        async with limiter.hold("a", tier="pro", has_hardware=False):
            server.pause()

    task = asyncio.create_task(block())
    for _ in range(3):
        done, _ = await asyncio.wait({task}, timeout=0.1)
        assert not done
        task.cancel()
    server.resume()
    with pytest.raises(asyncio.CancelledError):
        await task
    fields = await fields_of(limiter.session.redis, "a")
    assert (fields["monthly_consumed"], "held" in fields) == ("1", False)


@pytest.mark.parametrize("end", [ZeroDivisionError, asyncio.CancelledError])
async def test_hold_when_the_server_is_unavailable_at_its_release_then_the_reason_of_its_end_is_not_hidden(
    own_server: MakeServer, closing: AsyncExitStack, end: type[BaseException]
) -> None:
    server = own_server()
    limiter = await limiter_on(server, closing, deadline_ms=100)

    async def block() -> None:
        async with limiter.hold("a", tier="pro", has_hardware=False):
            server.stop()
            raise end

    with pytest.raises(end) as ended:
        await block()
    assert "will expire by itself" in ended.value.__notes__[0]


async def test_hold_when_the_server_is_unavailable_at_its_commit_then_the_error_is_raised(
    own_server: MakeServer, closing: AsyncExitStack
) -> None:
    server = own_server()
    limiter = await limiter_on(server, closing, deadline_ms=100)
    with pytest.raises(LimiterUnavailable):
        async with limiter.hold("a", tier="pro", has_hardware=False):
            server.stop()


async def test_callers_when_cancelled_at_any_moment_then_each_of_them_ends(limiter: CreditLimiter) -> None:
    """A cancellation that comes as a command has just been sent must not get lost below us."""

    async def call_for_ever() -> None:
        while True:
            await limiter.balance("a", tier="core")

    for _ in range(5):
        tasks = [asyncio.create_task(call_for_ever()) for _ in range(64)]
        await asyncio.wait(tasks, timeout=0.05)
        for task in tasks:
            task.cancel()
        _, deaf = await asyncio.wait(tasks, timeout=5)
        for task in deaf:  # so that the test ends all the same
            while not task.done():
                task.cancel()
                await asyncio.wait({task}, timeout=0.01)
        assert not deaf, f"{len(deaf)} of {len(tasks)} callers did not notice their cancellation"


async def test_client_when_closed_then_the_server_has_no_connection_of_it_left(
    own_server: MakeServer, closing: AsyncExitStack
) -> None:
    server = own_server()
    watcher = await connect(server.url, max_connections=1)
    closing.push_async_callback(watcher.aclose)
    before = len(await watcher.client_list())
    client = await connect(server.url)
    await asyncio.gather(*(client.ping() for _ in range(10)))
    await client.aclose()

    async def watcher_is_alone() -> bool:
        return len(await watcher.client_list()) == before

    await eventually(watcher_is_alone, what="the end of the other connections")
