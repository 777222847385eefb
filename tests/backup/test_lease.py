"""A lease that is kept: it is renewed while the block runs, and its keeper knows when another has had it."""

import asyncio

import pytest
from redis.asyncio import Redis

from limiter import CreditLimiter, Execution, LimiterUnavailable
from limiter.backup.lease import Lease, LeaseLost, LeaseState
from tests.support.credits import Clock
from tests.support.wait import eventually

LEASE_S = 0.4
KEY = "credits:persister"


def lease(limiter: CreditLimiter, owner: str) -> Lease:
    return Lease(limiter.session, lease_s=LEASE_S, owner=owner)


def pass_time(clock: Clock) -> None:
    """Let the time that a lease lasts pass."""
    clock.now_ms += 1000


async def test_lease_when_it_is_kept_then_it_is_renewed_until_the_block_ends(
    limiter: CreditLimiter, clock: Clock, redis: Redis
) -> None:
    ours, other = lease(limiter, "a"), lease(limiter, "b")
    since = await ours.take()

    async def renewed() -> bool:
        return await redis.hget(KEY, "lapses_ms") != before

    async with ours.kept(renew_every_s=0.01, since=since) as keeper:
        for _ in range(3):
            before = await redis.hget(KEY, "lapses_ms")
            clock.now_ms += 200
            await eventually(renewed)
        assert not (await other.take()).is_mine
        await keeper.check()
    pass_time(clock)
    assert (await other.take()).is_mine


@pytest.mark.parametrize(("is_over", "lost_to"), [(False, "b"), (True, "")])
async def test_check_when_another_has_had_the_lease_then_it_raises_and_keeps_raising(
    limiter: CreditLimiter, clock: Clock, *, is_over: bool, lost_to: str
) -> None:
    ours, other = lease(limiter, "a"), lease(limiter, "b")
    since = await ours.take()
    async with ours.kept(renew_every_s=60, since=since) as keeper:
        pass_time(clock)
        assert (await other.take()).is_mine
        if is_over:
            await other.release()
        await asyncio.sleep(LEASE_S / 2)  # as after a pause of this process: the check looks for itself
        for _ in range(2):
            with pytest.raises(LeaseLost) as lost:
                await keeper.check()
            assert lost.value.owner == lost_to


async def test_keeper_when_it_does_not_know_since_when_then_it_takes_the_lease_again(
    limiter: CreditLimiter, clock: Clock, redis: Redis
) -> None:
    ours = lease(limiter, "a")
    await ours.take()

    async def is_ours() -> bool:
        return await redis.hget(KEY, "owner") == b"a"

    async with ours.kept(renew_every_s=0.01) as keeper:
        await redis.hset(KEY, "owner", "b")
        pass_time(clock)
        await eventually(is_ours)
        await keeper.check()


async def test_keeper_when_a_renewal_fails_then_it_goes_on_and_the_next_check_asks_for_itself(
    limiter: CreditLimiter,
) -> None:
    attempts = 0

    async def fail() -> LeaseState | None:
        nonlocal attempts
        attempts += 1
        raise LimiterUnavailable("no answer", execution=Execution.UNKNOWN)

    ours = lease(limiter, "a")
    async with ours.kept(renew_every_s=0.01, since=await ours.take(), renew=fail) as keeper:
        await eventually(lambda: attempts > 2)
        await asyncio.sleep(LEASE_S / 2)
        with pytest.raises(LimiterUnavailable, match="no answer"):
            await keeper.check()
