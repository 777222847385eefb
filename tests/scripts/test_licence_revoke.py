"""licence_revoke.lua: the list of revoked licences, its versions and its bounds."""

import asyncio

import pytest
from redis.asyncio import Redis

from limiter import CreditLimiter
from limiter.credits.keys import Keys
from limiter.errors import LimiterError
from limiter.licences.revocations import Revocation, Revocations, RevocationStatus
from tests.support.credits import Clock

KEY = Keys().revoked()
REVOKED, RESTORED, GONE, FULL = RevocationStatus
DAY_S = 86_400


@pytest.fixture
def revocations(limiter: CreditLimiter) -> Revocations:
    return Revocations(limiter.session)


async def names(revocations: Revocations) -> list[str]:
    return [entry.name for entry in await revocations.list()]


async def test_list_when_names_are_revoked_and_restored_then_it_has_the_revoked_ones_the_last_first(
    revocations: Revocations, clock: Clock
) -> None:
    began_ms = clock.now_ms
    assert await revocations.revoke("alice") is REVOKED
    clock.now_ms += 1000
    assert await revocations.revoke("bob", expires_s=clock.now_ms // 1000 + DAY_S) is REVOKED
    assert await revocations.list() == [
        Revocation("bob", began_ms + 1000, (clock.now_ms // 1000 + 2 * DAY_S) * 1000),
        Revocation("alice", began_ms, None),
    ]
    clock.now_ms += 1000
    assert await revocations.revoke("alice") is REVOKED  # again: the time of the first stays
    assert (await revocations.list())[1] == Revocation("alice", began_ms, None)
    assert [await revocations.restore(name) for name in ("bob", "bob", "carol")] == [RESTORED, GONE, GONE]
    assert await names(revocations) == ["alice"]


async def test_version_when_the_list_changes_then_so_does_it_and_only_then(revocations: Revocations) -> None:
    versions = [await revocations.version()]
    for change in (
        revocations.revoke("a"),
        revocations.revoke("b"),
        revocations.restore("a"),
        revocations.restore("b"),
    ):
        await change
        versions.append(await revocations.version())
    assert (versions[0], versions[-1]) == (None, None)
    assert len(set(versions)) == 4
    await revocations.revoke("a")
    before = await revocations.version()
    await revocations.restore("nobody")
    assert await revocations.version() == before


async def test_list_when_nothing_is_revoked_any_more_then_the_key_is_gone(
    revocations: Revocations, redis: Redis
) -> None:
    await revocations.revoke("a")
    assert await redis.pttl(KEY) > 0
    await revocations.restore("a")
    assert not await redis.exists(KEY)


async def test_entry_when_its_licence_has_expired_then_it_is_dropped_with_the_next_change(
    revocations: Revocations, redis: Redis, clock: Clock
) -> None:
    await revocations.revoke("alice")
    await revocations.revoke("0123", expires_s=clock.now_ms // 1000 + 60)
    clock.now_ms += (DAY_S + 61) * 1000
    assert await names(revocations) == ["alice"]
    assert await redis.hlen(KEY) == 3
    await revocations.revoke("bob")
    assert await redis.hlen(KEY) == 3  # alice, bob and the version


async def test_list_when_it_is_full_then_no_more_but_what_is_on_it_can_be_revoked_again(
    revocations: Revocations,
) -> None:
    later_ms = 4_000_000_000_000
    answers = await asyncio.gather(*(revocations.change(f"name {n}", later_ms, limit=3) for n in range(9)))
    assert answers.count(REVOKED) == 3
    assert answers.count(FULL) == 6
    known = (await names(revocations))[0]
    assert await revocations.change(known, later_ms, limit=3) is REVOKED


async def test_name_when_it_is_very_long_then_it_is_not_revoked(revocations: Revocations) -> None:
    with pytest.raises(LimiterError, match="512 bytes"):
        await revocations.revoke("é" * 257)
    assert await revocations.revoke("é" * 256) is REVOKED
