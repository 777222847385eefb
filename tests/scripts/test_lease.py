"""lease.lua: one persister of the fleet at a time, and an epoch that only grows."""

import pytest
from redis.asyncio import Redis

from limiter import CreditLimiter
from limiter.backup.lease import Lease, LeaseStatus
from tests.support.credits import Clock, text_of

KEY = "credits:persister"


def lease(limiter: CreditLimiter, owner: str) -> Lease:
    return Lease(limiter.session, lease_s=30, owner=owner)


async def test_lease_when_it_is_free_then_the_first_to_come_has_it_and_others_stand_by(
    limiter: CreditLimiter, redis: Redis
) -> None:
    first = await lease(limiter, "a").take(checksum="sha256:1", good_at="2026-05-11T00:00:00.000Z")
    assert (first.status, first.epoch, first.owner, first.is_mine) == (LeaseStatus.LEASED, 1, "a", True)
    second = await lease(limiter, "b").take(checksum="sha256:2", good_at="2027-05-11T00:00:00.000Z")
    assert (second.status, second.epoch, second.owner) == (LeaseStatus.STANDBY, 1, "a")
    assert (second.checksum, second.good_at) == ("sha256:1", "2026-05-11T00:00:00.000Z")
    assert await redis.pttl(KEY) > 0


async def test_lease_when_it_is_kept_then_its_epoch_stays_and_others_wait_longer(
    limiter: CreditLimiter, clock: Clock
) -> None:
    for _ in range(3):
        assert (await lease(limiter, "a").take()).epoch == 1
        clock.now_ms += 29_999
        assert not (await lease(limiter, "b").take()).is_mine


async def test_lease_when_it_expires_then_another_takes_it_with_a_larger_epoch_and_the_first_learns_of_it(
    limiter: CreditLimiter, clock: Clock
) -> None:
    await lease(limiter, "a").take()
    clock.now_ms += 30_000
    assert (await lease(limiter, "b").take()).epoch == 2
    assert (await lease(limiter, "a").take()).status is LeaseStatus.STANDBY
    clock.now_ms += 30_000
    assert (await lease(limiter, "a").take()).epoch == 3


async def test_lease_when_it_expired_and_no_other_took_it_then_its_owner_goes_on_in_its_epoch(
    limiter: CreditLimiter, clock: Clock
) -> None:
    await lease(limiter, "a").take()
    clock.now_ms += 3_600_000
    assert (await lease(limiter, "a").take()).epoch == 1


async def test_lease_when_it_is_given_back_then_the_next_need_not_wait_and_what_was_noted_stays(
    limiter: CreditLimiter,
) -> None:
    await lease(limiter, "a").take(checksum="sha256:1", good_at="2026-05-11T00:00:00.000Z")
    assert (await lease(limiter, "a").release()).status is LeaseStatus.RETURNED
    taken = await lease(limiter, "b").take()
    assert (taken.epoch, taken.checksum, taken.good_at) == (2, "sha256:1", "2026-05-11T00:00:00.000Z")
    assert (await lease(limiter, "a").release()).status is LeaseStatus.STANDBY
    assert (await lease(limiter, "b").take()).is_mine


async def test_lease_when_it_was_never_taken_then_releasing_it_leaves_no_key(
    limiter: CreditLimiter, redis: Redis
) -> None:
    assert (await lease(limiter, "a").release()).status is LeaseStatus.RETURNED
    assert not await redis.exists(KEY)


@pytest.mark.parametrize(("least", "epoch"), [(0, 1), (7, 8), (2**53 - 2, 2**53 - 1)])
async def test_lease_when_redis_forgot_it_then_epochs_go_on_from_the_file(
    limiter: CreditLimiter, redis: Redis, least: int, epoch: int
) -> None:
    await lease(limiter, "a").take()
    await redis.delete(KEY)
    assert (await lease(limiter, "b").take(least_epoch=least)).epoch == epoch
    assert text_of(await redis.hget(KEY, "epoch") or b"") == str(epoch)


async def test_lease_when_a_file_of_a_later_epoch_is_brought_then_its_owners_epoch_passes_it(
    limiter: CreditLimiter,
) -> None:
    await lease(limiter, "a").take()
    assert (await lease(limiter, "a").take(least_epoch=1)).epoch == 1
    assert (await lease(limiter, "a").take(least_epoch=4)).epoch == 5
