"""redis.wait_replicas: a command that changed something waits until replicas have it, or reports that they do not."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from redis.asyncio import Redis

from limiter import CreditLimiter, connect
from limiter.backup.dump import dump
from limiter.credits.session import Session
from limiter.errors import LimiterUnavailable, NotReplicated
from limiter.licences.seats import Seats
from limiter.redis import replication
from limiter.redis.replication import wait_for_replicas
from tests.support.cli import environment
from tests.support.credits import TIERS
from tests.support.redis_servers import Server, binaries
from tests.support.redis_topologies import ClusterSetUp, SentinelSetUp, execute
from tests.support.wait import wait_until

pytestmark = pytest.mark.slow

MakeServer = Callable[..., Server]
SERVERS = pytest.mark.parametrize("binary", ["valkey", "redis"])
SUBJECT, INSTALL = "alice@example.org", "0a0f3b4e-6a3e-4f0e-8f54-2f6a3f6f0b11"
WRITTEN = 60  # rows: each of three primaries has some
NEVER_S = 1.0  # the wait for a replica that stands still
# The command itself, but that it does not wait for half a minute for what does not come.
IMPATIENT = (
    f"from limiter import cli; from limiter.redis import replication; replication.WITHIN_S = {NEVER_S}; cli.main()"
)


async def connected(url: str, closing: AsyncExitStack) -> "Redis":
    redis = await connect(url)
    closing.push_async_callback(redis.aclose)
    return redis


def pair(own_server: MakeServer, binary: str) -> tuple[Server, Server]:
    """Start a primary, and a replica that listens to it."""
    primary = own_server(binary)
    place = ("--replicaof", f"127.0.0.1 {primary.port}")
    execute(primary, "CONFIG", "SET", "repl-diskless-sync-delay", "0")
    replica = own_server(binary, *place)
    wait_until(lambda: execute(replica, "ROLE")[3] == "connected", what="the replica's listening")
    return primary, replica


async def command(primary: Server, folder: Path, *words: str, main: str = "from limiter import cli; cli.main()") -> str:
    """Run a command that wants one replica to have what it does; return its exit code and the end of what it says."""
    settings = {"LIMITER_REDIS__WAIT_REPLICAS": "1", "LIMITER_REDIS__URL": primary.url}
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", main, *words],
        cwd=folder,
        env=environment(settings),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return f"{done.returncode} {done.stderr.rpartition('limiter: ')[2].strip()}".strip()


@SERVERS
async def test_commands_when_a_replica_listens_then_it_has_what_they_did(
    own_server: MakeServer, tmp_path: Path, closing: AsyncExitStack, binary: str
) -> None:
    primary, replica = pair(own_server, binary)
    redis = await connected(primary.url, closing)
    file = await ledger_of_three(redis, tmp_path)
    assert await command(primary, tmp_path, "import", str(file)) == "0 writing rows"
    assert sorted(execute(replica, "KEYS", "credits:install:*")) == [f"credits:install:{name}" for name in "abc"]
    execute(primary, "FLUSHALL")
    assert (await command(primary, tmp_path, "restore", str(file), "--yes")).startswith("0 ")
    assert sorted(execute(replica, "KEYS", "credits:install:*")) == [f"credits:install:{name}" for name in "abc"]
    await seat(redis)
    assert await command(primary, tmp_path, "licence", "seats", SUBJECT, "--free", INSTALL) == "0"
    assert execute(replica, "KEYS", "*seats*") == []


@SERVERS
async def test_commands_when_the_replica_hangs_then_they_report_how_many_have_it_and_that_it_may_be_lost(
    own_server: MakeServer, tmp_path: Path, closing: AsyncExitStack, binary: str
) -> None:
    primary, replica = pair(own_server, binary)
    redis = await connected(primary.url, closing)
    file = await ledger_of_three(redis, tmp_path)
    await seat(redis)
    replica.pause()
    why = (
        f"the operation is done, but a failover may lose it: after {NEVER_S:g} s 0 replicas of the primary at "
        f"port {primary.port} have it, want 1 (redis.wait_replicas)"
    )
    for words in (["import", str(file)], ["restore", str(file), "--yes"]):
        assert await command(primary, tmp_path, *words, main=IMPATIENT) == f"1 {why}"
        assert len(await redis.keys("credits:install:*")) == 3
    assert (
        await command(primary, tmp_path, "licence", "seats", SUBJECT, "--free", INSTALL, main=IMPATIENT) == f"1 {why}"
    )
    assert await redis.keys("*seats*") == []
    # A command that changes nothing does not wait.
    assert (await command(primary, tmp_path, "import", str(file), "--dry-run", main=IMPATIENT)).startswith("0 ")
    assert await command(primary, tmp_path, "licence", "seats", SUBJECT, main=IMPATIENT) == "0"


async def test_wait_when_one_of_two_replicas_hangs_then_the_other_is_enough_for_one(
    tmp_path: Path, closing: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    binary = binaries()["valkey"]
    assert binary
    servers = SentinelSetUp(binary, tmp_path)
    closing.callback(servers.kill)
    redis = await connected(servers.start().url, closing)
    primary, listening, still = servers.servers
    still.pause()
    await written(redis, replicas=1)
    assert execute(listening, "DBSIZE") == WRITTEN
    with monkeypatch.context() as patch:
        patch.setattr(replication, "WITHIN_S", NEVER_S)
        with pytest.raises(NotReplicated, match=f" at port {primary.port} have it, want 2"):
            await written(redis, replicas=2)
    still.resume()
    await written(redis, replicas=2)
    assert execute(still, "DBSIZE") == WRITTEN


async def test_wait_when_a_replica_of_a_cluster_hangs_then_the_error_names_its_primary_and_later_the_failover(
    tmp_path: Path, closing: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    binary = binaries()["valkey"]
    assert binary
    servers = ClusterSetUp(binary, tmp_path)
    closing.callback(servers.kill)
    redis = await connected(servers.start().url, closing)
    owner, replica = servers.servers[1], servers.servers[4]
    replica.pause()
    with monkeypatch.context() as patch:
        patch.setattr(replication, "WITHIN_S", NEVER_S)
        with pytest.raises(NotReplicated, match=f"0 .* at port {owner.port} have it, want 1"):
            await written(redis, replicas=1)
    replica.resume()
    await written(redis, replicas=1)
    assert sum(execute(server, "DBSIZE") for server in servers.servers[3:]) == WRITTEN

    def fail_over() -> None:
        execute(replica, "CLUSTER", "FAILOVER")
        wait_until(lambda: replica in servers.primaries(), what="the failover")

    with pytest.raises(NotReplicated, match="another server took the place of a primary meanwhile"):
        await written(redis, replicas=1, then=fail_over)


async def test_wait_when_redis_is_unavailable_or_the_block_fails_then_that_is_the_error(
    own_server: MakeServer, closing: AsyncExitStack
) -> None:
    server = own_server()
    redis = await connected(server.url, closing)
    with pytest.raises(LookupError):
        async with wait_for_replicas(redis, 1):
            raise LookupError
    server.kill()
    with pytest.raises(LimiterUnavailable, match="Redis is not reachable"):
        async with wait_for_replicas(redis, 1):
            raise AssertionError("the block began")
    async with wait_for_replicas(redis, 0):
        pass  # no server is queried


async def ledger_of_three(redis: "Redis", folder: Path) -> Path:
    """Write a credits.json of three rows, which Redis then has no more."""
    credit_limiter = CreditLimiter(redis, TIERS)
    for name in "abc":
        assert (await credit_limiter.debit(name, tier="pro", has_hardware=True)).allowed
    await dump(credit_limiter.session, folder / "credits.json")
    await redis.flushdb()
    return folder / "credits.json"


async def seat(redis: "Redis") -> None:
    seats = Seats(Session(redis))
    await seats.take(SUBJECT, INSTALL, seats=3, expires_s=round(time.time()) + 3600)


async def written(redis: "Redis", *, replicas: int, then: Callable[[], None] = lambda: None) -> None:
    """Write rows, and wait for replicas to have them. then: what happens after the last write."""
    async with wait_for_replicas(redis, replicas):
        for number in range(WRITTEN):
            await redis.hset(f"credits:install:{number}", "field", "value")
        then()
