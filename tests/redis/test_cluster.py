"""Cluster: decisions find their node, while slots move, nodes come and a primary dies under load."""

from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from itertools import count
from pathlib import Path

import pytest
from redis.asyncio import Redis

from limiter import CreditLimiter, LimiterUnavailable, SettingsError, connect
from limiter.backup.dump import dump
from limiter.backup.importer import import_file
from limiter.redis.cluster import primaries_of
from limiter.redis.slot_map import slot_of
from tests.support.cli import shown_by_redis_cli
from tests.support.credits import TIERS
from tests.support.load import RUNS, Checkpoints, Spending, check
from tests.support.redis_servers import Server, binaries, free_port
from tests.support.redis_topologies import ClusterSetUp, execute
from tests.support.wait import wait_until

pytestmark = pytest.mark.slow

INSTALLS = [f"install-{number}" for number in range(60)]
MakeSetUp = Callable[..., ClusterSetUp]


@pytest.fixture
def set_up(tmp_path: Path) -> Iterator[MakeSetUp]:
    made: list[ClusterSetUp] = []

    def make(*extra: str, replicas: int = 0, node_timeout_ms: int = 60_000) -> ClusterSetUp:
        binary = binaries()["valkey"]
        assert binary
        folder = tmp_path / "set-up"
        made.append(ClusterSetUp(binary, folder, *extra, replicas=replicas, node_timeout_ms=node_timeout_ms))
        return made[0].start()

    yield make
    for each in made:
        each.kill()


async def limiter_on(url: str, closing: AsyncExitStack) -> CreditLimiter:
    redis = await connect(url)
    closing.push_async_callback(redis.aclose)
    return CreditLimiter(redis, TIERS)


def slot_of_install(install_id: str) -> int:
    return slot_of(f"credits:install:{install_id}")


def installs_of(slot: int, number: int) -> list[str]:
    """Make ids whose rows are in one slot."""
    ids = (f"other-{each}" for each in count())
    return [next(each for each in ids if slot_of_install(each) == slot) for _ in range(number)]


class MovingSlot:
    """A slot on its way from one node to another, as `redis-cli --cluster reshard` does it."""

    def __init__(self, cluster: ClusterSetUp, slot: int, target: Server) -> None:
        self.source = cluster.owner_of(slot)
        self._cluster, self._slot, self._target = cluster, slot, target
        execute(target, "CLUSTER", "SETSLOT", slot, "IMPORTING", cluster.id_of(self.source))
        execute(self.source, "CLUSTER", "SETSLOT", slot, "MIGRATING", cluster.id_of(target))

    def move_keys(self, most: int) -> int:
        """Move so many keys, and return how many there were."""
        keys = execute(self.source, "CLUSTER", "GETKEYSINSLOT", self._slot, most)
        for key in keys:
            execute(self.source, "MIGRATE", "127.0.0.1", self._target.port, key, 0, 5000)
        return len(keys)

    def end(self) -> None:
        while self.move_keys(100):
            pass
        for server in (self._target, self.source):
            execute(server, "CLUSTER", "SETSLOT", self._slot, "NODE", self._cluster.id_of(self._target))


@pytest.mark.parametrize("run", RUNS)
async def test_slots_when_they_move_to_a_new_node_under_load_then_every_commit_is_in_the_rows_once(
    set_up: MakeSetUp, closing: AsyncExitStack, run: int
) -> None:
    """The new node has no slots and no scripts when it gets its first ASK."""
    del run
    cluster = set_up()
    limiter = await limiter_on(cluster.url, closing)
    slot = slot_of_install(INSTALLS[0])
    late = installs_of(slot, 3)  # they get their first row while their slot moves: on the new node
    moved = {slot_of_install(install) for install in INSTALLS[:12]}
    async with Spending(limiter, INSTALLS) as spending:
        target = cluster.add_node()
        for each in moved:
            on_its_way = MovingSlot(cluster, each, target)
            if each == slot:
                for install in late:
                    spent = await limiter.debit(install, tier="max", has_hardware=True)
                    assert spent.allowed
                assert execute(target, "DBSIZE") >= len(late)
            await spending.more(30)
            on_its_way.move_keys(1)
            await spending.more(30)
            on_its_way.end()
        await spending.more(200)
    assert await spending.consumed() == spending.committed
    assert not spending.unsure
    assert {cluster.owner_of(each) for each in moved} == {target}


@pytest.mark.parametrize("run", RUNS)
async def test_primary_when_it_is_killed_under_load_then_its_replica_goes_on_and_nothing_is_debited_twice(
    set_up: MakeSetUp, closing: AsyncExitStack, run: int
) -> None:
    cluster = set_up(replicas=3, node_timeout_ms=2000)
    limiter = await limiter_on(cluster.url, closing)
    victim = cluster.owner_of(slot_of_install(INSTALLS[0]))
    hit = [install for install in INSTALLS if cluster.owner_of(slot_of_install(install)) is victim]
    unhit = set(INSTALLS) - set(hit)
    async with Spending(limiter, INSTALLS) as spending:
        key = f"checkpoint:{{credits:install:{INSTALLS[0]}}}"
        checkpoints = Checkpoints(await node_of(victim, limiter), spending, replicas=1, key=key)
        await spending.more(300)
        await checkpoints.reached()
        async with spending.recovery(f"run {run}: the kill of a primary", of=hit):
            victim.kill()
            await checkpoints.end()
            await spending.more(200, of=unhit)
    rows = await spending.consumed()
    safe = checkpoints.safe
    for install in unhit:
        safe[install] = spending.committed[install]
    check(rows, spending, safe=safe)

    victim.start()
    wait_until(lambda: execute(victim, "ROLE")[0] == "slave", within_s=30, what="the old primary's being a replica")
    for install in INSTALLS:
        assert (await limiter.debit(install, tier="max", has_hardware=True)).allowed


async def node_of(server: Server, limiter: CreditLimiter) -> "Redis":
    """Return the limiter's own plain client of one node."""
    nodes = await primaries_of(limiter.session.redis)
    return next(node for node in nodes if node.connection_pool.connection_kwargs["port"] == server.port)


async def test_primary_when_it_hangs_then_the_others_serve_and_it_is_queried_again_when_it_resumes(
    set_up: MakeSetUp, closing: AsyncExitStack
) -> None:
    cluster = set_up()
    limiter = await limiter_on(cluster.url, closing)
    still = cluster.owner_of(slot_of_install("a"))
    other = next(install for install in INSTALLS if cluster.owner_of(slot_of_install(install)) is not still)
    assert (await limiter.reserve("a", tier="pro", has_hardware=True, hold_id="h")).allowed
    still.pause()
    with pytest.raises(LimiterUnavailable):
        await limiter.commit("a", "h")
    assert (await limiter.debit(other, tier="pro", has_hardware=True)).allowed
    still.resume()
    await limiter.commit("a", "h")
    row = await limiter.row("a")
    assert row is not None
    assert row.monthly_consumed == 1


async def test_ledger_when_a_slot_is_between_two_nodes_then_import_and_dump_miss_nothing(
    set_up: MakeSetUp, closing: AsyncExitStack, tmp_path: Path
) -> None:
    cluster = set_up()
    limiter = await limiter_on(cluster.url, closing)
    slot = slot_of_install(INSTALLS[0])
    installs = INSTALLS + installs_of(slot, 4)
    for install in installs:
        assert (await limiter.debit(install, tier="max", has_hardware=True)).allowed
    owner = cluster.owner_of(slot)
    on_its_way = MovingSlot(cluster, slot, next(server for server in cluster.servers if server is not owner))
    on_its_way.move_keys(2)

    assert (await dump(limiter.session, tmp_path / "credits.json")).rows == len(installs)
    report = await import_file(limiter.session, tmp_path / "credits.json", mode="create")
    assert (report.same, report.rejected) == (len(installs), 0)
    for server in cluster.primaries():
        execute(server, "FLUSHALL")
        execute(server, "SCRIPT", "FLUSH")
    report = await import_file(limiter.session, tmp_path / "credits.json", mode="create")
    assert (report.new, report.rejected) == (len(installs), 0)
    on_its_way.end()
    assert (await dump(limiter.session, tmp_path / "credits.json")).rows == len(installs)


async def test_url_when_it_is_wrongly_of_a_cluster_or_not_then_the_error_says_what_to_give(
    set_up: MakeSetUp, own_server: Callable[..., Server], closing: AsyncExitStack
) -> None:
    cluster = set_up()
    with pytest.raises(SettingsError, match=r"is a node of a cluster: give redis\+cluster://"):
        await connect(cluster.servers[0].url)
    single = own_server()
    with pytest.raises(SettingsError, match="is not a cluster: give a redis:// URL"):
        await connect(f"redis+cluster://127.0.0.1:{single.port}")
    with pytest.raises(LimiterUnavailable, match="no node of the cluster answers"):
        await connect(f"redis+cluster://127.0.0.1:{free_port()}")
    # One seed that is unavailable costs no time.
    limiter = await limiter_on(f"redis+cluster://127.0.0.1:{free_port()},127.0.0.1:{cluster.servers[2].port}", closing)
    for install in INSTALLS[:3]:
        assert (await limiter.debit(install, tier="max", has_hardware=True)).allowed
        assert "monthly_consumed" in await shown_by_redis_cli(cluster.url, f"credits:install:{install}")
