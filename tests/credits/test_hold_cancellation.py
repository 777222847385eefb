"""`limiter.hold()` when its caller is cancelled, or its answer is lost, while Redis is still deciding."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack

import pytest

from limiter import CreditLimiter, LimiterUnavailable, connect
from tests.support.credits import TIERS
from tests.support.redis_proxy import proxy_of
from tests.support.redis_servers import Server


async def enter(limiter: CreditLimiter) -> None:
    async with limiter.hold("i", tier="core", has_hardware=False, hold_id="h"):
        await asyncio.get_running_loop().create_future()


async def test_hold_when_cancelled_while_it_is_reserved_then_nothing_stays_held(
    own_server: Callable[..., Server], closing: AsyncExitStack
) -> None:
    server = own_server()
    client = await connect(server.url)
    closing.push_async_callback(client.aclose)
    limiter = CreditLimiter(client, TIERS)
    await limiter.balance("i", tier="core")
    for turns in range(12):  # wherever in the reserve it is by then
        server.pause()
        task = asyncio.create_task(enter(limiter))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        server.resume()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await limiter.balance("i", tier="core")).held == 0, f"cancelled after {turns} turns"


async def test_hold_when_every_answer_of_its_reserve_is_lost_then_nothing_stays_held_and_the_error_has_its_id(
    own_server: Callable[..., Server], closing: AsyncExitStack
) -> None:
    server = own_server()
    direct = await connect(server.url)
    closing.push_async_callback(direct.aclose)
    proxy = await closing.enter_async_context(proxy_of(server.url))
    client = await connect(proxy.url)
    closing.push_async_callback(client.aclose)
    limiter = CreditLimiter(client, TIERS, timeout_ms=200, deadline_ms=150)
    await limiter.balance("i", tier="core")
    await limiter.release("i", "warm")
    await CreditLimiter(direct, TIERS).reserve("j", tier="core", has_hardware=False, hold_id="warm")
    proxy.lose_reply(0, "swallow")
    with pytest.raises(LimiterUnavailable) as lost:
        await enter(limiter)
    assert lost.value.hold_id == "h"
    assert (await CreditLimiter(direct, TIERS).balance("i", tier="core")).held == 0


@pytest.mark.parametrize("cost", [1.5, True, 0, -1, 10**7])
async def test_cost_when_it_is_not_a_number_of_credits_then_nothing_is_sent(limiter: CreditLimiter, cost: int) -> None:
    for call in (
        limiter.reserve("i", tier="core", has_hardware=False, cost=cost),
        limiter.debit("i", tier="core", has_hardware=False, cost=cost),
        limiter.commit("i", "h", cost=cost),
    ):
        with pytest.raises(ValueError, match="cost is"):
            await call
    assert await limiter.row("i") is None
