"""Sentinel: the primary is found, and another one takes its place under load without a double debit."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from redis.exceptions import RedisError

from limiter import CreditLimiter, LimiterUnavailable, SettingsError, connect
from tests.conftest import TIERS, Closing
from tests.servers import Server, binaries, free_port, wait_until
from tests.spending import RUNS, Spending, check
from tests.topologies import SentinelSetUp, told

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


async def limiter_on(url: str, closing: Closing) -> CreditLimiter:
    redis = await connect(url)
    closing.push_async_callback(redis.aclose)
    return CreditLimiter(redis, TIERS)


class Checkpoints:
    """What was committed before a moment at which both replicas had all that the primary had done."""

    def __init__(self, primary: Server, spending: Spending) -> None:
        self.safe: Counter[str] = Counter()
        self._primary, self._spending = primary, spending
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        client = await connect(self._primary.url)
        with suppress(RedisError, OSError):
            while True:
                told_so_far = self._spending.committed.copy()
                await client.set("checkpoint", 1, px=60_000)
                if await client.wait(2, 500) == 2:
                    self.safe = told_so_far
        await client.aclose()

    async def end(self) -> None:
        """Wait for its end, which comes with the primary's."""
        await self._task


@pytest.mark.parametrize("run", RUNS)
async def test_primary_when_it_is_killed_under_load_then_nothing_is_debited_twice_nor_a_replicated_commit_lost(
    set_up: MakeSetUp, closing: Closing, run: int
) -> None:
    servers = set_up()
    limiter = await limiter_on(servers.url, closing)
    old = servers.primary()
    async with Spending(limiter, INSTALLS) as spending:
        checkpoints = Checkpoints(old, spending)
        await spending.more(200)
        async with spending.recovery(f"run {run}: the kill of the primary", of=INSTALLS):
            old.kill()
            await checkpoints.end()
        await spending.more(200)
    assert checkpoints.safe.total() > 0
    check(await spending.consumed(), spending, safe=checkpoints.safe)
    assert servers.primary() is not old


@pytest.mark.skipif(len(RUNS) == 1, reason="takes 20 s: set LIMITER_TEST_RUNS to 2 or more")
@pytest.mark.parametrize("run", RUNS)
async def test_primary_when_it_stands_still_under_load_and_wakes_replaced_then_nothing_is_debited_twice(
    set_up: MakeSetUp, closing: Closing, run: int
) -> None:
    """What it was sent and did while nobody listened any more is not what counts: its successor's rows are."""
    servers = set_up()
    limiter = await limiter_on(servers.url, closing)
    old = servers.primary()
    async with Spending(limiter, INSTALLS) as spending:
        checkpoints = Checkpoints(old, spending)
        await spending.more(200)
        async with spending.recovery(f"run {run}: the stand-still of the primary", of=INSTALLS):
            old.pause()
            await checkpoints.end()
        old.resume()
        wait_until(lambda: told(old, "ROLE")[0] == "slave", within_s=30, what="the old primary's being a replica")
        await spending.more(200)
    check(await spending.consumed(), spending, safe=checkpoints.safe)


async def test_primary_when_it_turns_into_a_replica_under_its_clients_then_readonly_is_not_executed_and_it_is_left(
    set_up: MakeSetUp, closing: Closing
) -> None:
    """Demoted behind Sentinel's back, which would have closed its connections."""
    servers = set_up()
    limiter = await limiter_on(servers.url, closing)
    assert (await limiter.debit("a", tier="max", has_hardware=True)).allowed
    old, other = servers.primary(), servers.servers[1]
    told(old, "REPLICAOF", "127.0.0.1", other.port)
    with pytest.raises(LimiterUnavailable) as refused:
        await limiter.debit("b", tier="max", has_hardware=True)
    assert refused.value.executed is False
    told(old, "REPLICAOF", "NO", "ONE")
    assert (await limiter.debit("b", tier="max", has_hardware=True)).allowed


async def test_url_when_it_leads_to_the_wrong_server_then_the_error_says_what_to_give(
    set_up: MakeSetUp, closing: Closing
) -> None:
    servers = set_up()
    with pytest.raises(SettingsError, match="is a replica, which takes no writes"):
        await connect(servers.servers[1].url)
    with pytest.raises(SettingsError, match=r"is a Sentinel: give redis\+sentinel://"):
        await connect(servers.sentinels[0].url)
    with pytest.raises(LimiterUnavailable, match="watches no primary of that name"):
        await connect(servers.url.replace(servers.NAME, "other"))
    with pytest.raises(LimiterUnavailable, match="no Sentinel knows the primary mymaster"):
        await connect(f"redis+sentinel://127.0.0.1:{free_port()}/mymaster")
    servers.sentinels[0].kill()
    servers.sentinels[1].pause()
    limiter = await limiter_on(servers.url, closing)  # the third one is enough
    assert (await limiter.debit("a", tier="max", has_hardware=True)).allowed
