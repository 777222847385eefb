"""Sentinel: the primary is found, and another one takes its place under load without a double debit."""

from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from redis.asyncio import Redis

from limiter import CreditLimiter, LimiterUnavailable, SettingsError, connect
from tests.support.cli import shown_by_redis_cli
from tests.support.credits import TIERS
from tests.support.load import RUNS, Checkpoints, Spending, check
from tests.support.redis_servers import binaries, free_port
from tests.support.redis_topologies import SentinelSetUp, execute
from tests.support.wait import wait_until

pytestmark = pytest.mark.slow

INSTALLS = [f"install-{number}" for number in range(40)]
MakeSetUp = Callable[..., SentinelSetUp]


@pytest.fixture
def set_up(tmp_path: Path) -> Iterator[MakeSetUp]:
    made: list[SentinelSetUp] = []

    def make(*extra: str) -> SentinelSetUp:
        binary = binaries()["valkey"]
        assert binary
        made.append(SentinelSetUp(binary, tmp_path / "set-up", *extra, down_after_ms=1000))
        return made[0].start()

    yield make
    for each in made:
        each.kill()


async def limiter_on(url: str, closing: AsyncExitStack) -> CreditLimiter:
    return CreditLimiter(await connected(url, closing), TIERS)


async def connected(url: str, closing: AsyncExitStack) -> "Redis":
    redis = await connect(url)
    closing.push_async_callback(redis.aclose)
    return redis


@pytest.mark.parametrize("run", RUNS)
async def test_primary_when_it_is_killed_under_load_then_nothing_is_debited_twice_nor_a_replicated_commit_lost(
    set_up: MakeSetUp, closing: AsyncExitStack, run: int
) -> None:
    servers = set_up()
    limiter = await limiter_on(servers.url, closing)
    old = servers.primary()
    async with Spending(limiter, INSTALLS) as spending:
        checkpoints = Checkpoints(await connected(old.url, closing), spending, replicas=2)
        await spending.more(200)
        await checkpoints.reached()
        async with spending.recovery(f"run {run}: the kill of the primary", of=INSTALLS):
            old.kill()
            await checkpoints.end()
        await spending.more(200)
    check(await spending.consumed(), spending, safe=checkpoints.safe)
    assert servers.primary() is not old


@pytest.mark.skipif(len(RUNS) == 1, reason="takes 20 s: set LIMITER_TEST_RUNS to 2 or more")
@pytest.mark.parametrize("run", RUNS)
async def test_primary_when_it_hangs_under_load_and_resumes_as_a_replaced_one_then_nothing_is_debited_twice(
    set_up: MakeSetUp, closing: AsyncExitStack, run: int
) -> None:
    """What it executed after it was replaced does not count: the rows of the new primary do."""
    servers = set_up()
    limiter = await limiter_on(servers.url, closing)
    old = servers.primary()
    async with Spending(limiter, INSTALLS) as spending:
        checkpoints = Checkpoints(await connected(old.url, closing), spending, replicas=2)
        await spending.more(200)
        await checkpoints.reached()
        async with spending.recovery(f"run {run}: the stand-still of the primary", of=INSTALLS):
            old.pause()
            await checkpoints.end()
        old.resume()
        wait_until(lambda: execute(old, "ROLE")[0] == "slave", within_s=30, what="the old primary's being a replica")
        await spending.more(200)
    check(await spending.consumed(), spending, safe=checkpoints.safe)


async def test_primary_when_it_turns_into_a_replica_under_its_clients_then_nothing_is_debited_until_there_is_one(
    set_up: MakeSetUp, closing: AsyncExitStack
) -> None:
    """Demoted behind Sentinel's back, which would have closed its connections."""
    servers = set_up()
    limiter = await limiter_on(servers.url, closing)
    assert (await limiter.debit("a", tier="max", has_hardware=True)).allowed
    old, other = servers.primary(), servers.servers[1]
    execute(old, "REPLICAOF", "127.0.0.1", other.port)
    with pytest.raises(LimiterUnavailable):
        await limiter.debit("b", tier="max", has_hardware=True)
    execute(old, "REPLICAOF", "NO", "ONE")
    assert (await limiter.debit("b", tier="max", has_hardware=True)).allowed
    row = await limiter.row("b")
    assert row is not None
    assert row.monthly_consumed == 1


async def test_url_when_it_leads_to_the_wrong_server_then_the_error_says_what_to_give(
    set_up: MakeSetUp, closing: AsyncExitStack
) -> None:
    servers = set_up()
    with pytest.raises(SettingsError, match="is a replica, which takes no writes"):
        await connect(servers.servers[1].url)
    with pytest.raises(SettingsError, match=r"is a Sentinel: give redis\+sentinel://"):
        await connect(servers.sentinels[0].url)
    with pytest.raises(LimiterUnavailable, match="monitors no primary of that name"):
        await connect(servers.url.replace(servers.NAME, "other"))
    with pytest.raises(LimiterUnavailable, match="no Sentinel knows the primary mymaster"):
        await connect(f"redis+sentinel://127.0.0.1:{free_port()}/mymaster")
    servers.sentinels[0].kill()
    servers.sentinels[1].pause()
    limiter = await limiter_on(servers.url, closing)  # the third one is enough
    assert (await limiter.debit("a", tier="max", has_hardware=True)).allowed
    servers.sentinels[1].resume()
    url = servers.url.replace(f"127.0.0.1:{servers.sentinels[0].port},", "")
    assert "monthly_consumed" in await shown_by_redis_cli(url, "credits:install:a")
