"""Fixtures: real servers, a clean one for each test, and the promise that no key is left behind without a TTL."""

import json
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from redis.asyncio import Redis

from limiter import CreditLimiter, Tiers, connect
from tests.support.credits import PATIENCE_MS, TIERS, Clock, LimiterWith
from tests.support.processes import left_processes
from tests.support.redis_matrix import ELSEWHERE, MATRIX, TOPOLOGY
from tests.support.redis_servers import Server, binaries
from tests.support.redis_topologies import ClusterSetUp, SentinelSetUp
from tests.support.vectors import Vectors

SYSTEM = Path(__file__).parent / "system"  # whole deployments, other programs, minutes of load
ON_EVERY_TOPOLOGY = ("test_licence_seat", "test_licence_revoke", "test_install_mint", "test_dump", "test_prune")


QUICK = "--quick"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(QUICK, action="store_true", help="skip what takes long (`make check`); `make test` runs all of it")
    parser.addoption("--vectors", type=Path, default=Path(__file__).parent / "vectors", help="folder of vector files")


def pytest_configure(config: pytest.Config) -> None:
    """Let the processes that the tests start have their Ctrl-C, whatever this one was started with.

    A shell starts a job in the background (`nohup make test &` in a script) with SIGINT ignored, which children
    inherit; a handler they do not. This one does nothing, so pytest itself goes on as it was told to.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: None)
    if ELSEWHERE in os.environ and config.getoption("numprocesses", None):
        raise pytest.UsageError(
            f"{ELSEWHERE} names one server, which two workers would flush: leave out --numprocesses"
        )


@pytest.fixture(scope="session", autouse=True)
def no_process_is_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """At the end of the session every process that a test started must have ended; those that have not are ended."""
    yield
    left = left_processes(tmp_path_factory.getbasetemp())
    for process in left:
        process.end()
    assert not left, "these processes were left running:\n" + "\n".join(map(str, left))


@pytest.fixture(scope="session")
def vectors(request: pytest.FixtureRequest) -> Vectors:
    """What the old ledger answered, by file: renewals, ledgers, migrations."""
    folder: Path = request.config.getoption("--vectors")
    return {kind: json.loads((folder / f"{kind}.json").read_text()) for kind in ("renewals", "ledgers", "migrations")}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(SYSTEM):
            item.add_marker(pytest.mark.system)
        if config.getoption(QUICK):
            for name in ("slow", "system"):
                if item.get_closest_marker(name):
                    item.add_marker(pytest.mark.skip(reason=f"{name}: `make test` runs it"))
    if TOPOLOGY not in os.environ:
        _leave_out_topologies(config, items)


def _leave_out_topologies(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what runs on Sentinel and Cluster only when they are asked for, to keep the suite short."""
    left_out = [item for item in items if _on_topology(item) and item.path.stem not in ON_EVERY_TOPOLOGY]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


def _on_topology(item: pytest.Item) -> bool:
    return isinstance(item, pytest.Function) and (
        hasattr(item, "callspec") and item.callspec.params.get("redis_url") in {"sentinel", "cluster"}
    )


@pytest.fixture(scope="session", params=MATRIX)
def redis_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the matrix, or several that are one, for tests that leave them running."""
    if request.param == "elsewhere":
        yield os.environ[ELSEWHERE]
        return
    name, _, kind = request.param.rpartition("-") if "-" in request.param else ("", "", request.param)
    binary = binaries()["redis" if "redis" in {name, kind} else "valkey"]
    if binary is None:
        pytest.skip("Debian's redis-server is not installed (apt-get install redis-server)")
    kinds: dict[str, Callable[..., Server | SentinelSetUp | ClusterSetUp]]
    kinds = {"sentinel": SentinelSetUp, "cluster": ClusterSetUp}
    server = kinds.get(kind, Server)(binary, tmp_path_factory.mktemp(request.param), "--appendfsync", "no").start()
    yield server.url
    server.kill()


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    """A client of an empty server. Afterwards every key must be a row, or have a TTL."""
    client = await connect(redis_url, timeout_ms=PATIENCE_MS)
    await client.flushdb()
    yield client
    for key in await client.keys("*"):
        assert b":install:" in key or await client.pttl(key) != -1, f"{key!r} was left behind without a TTL"
    await client.aclose()


@pytest.fixture
def clock() -> Clock:
    """A clock that stands at 2026-05-11T23:02:57.123Z."""
    return Clock(1_778_540_577_123)


@pytest.fixture
def limiter(redis: Redis, clock: Clock) -> CreditLimiter:
    return CreditLimiter(redis, TIERS, clock=clock, timeout_ms=PATIENCE_MS, deadline_ms=PATIENCE_MS)


@pytest.fixture
def limiter_with(redis: Redis, clock: Clock) -> LimiterWith:
    """Make limiters of other tiers on the same rows: `limiter_with(pro={"monthly": 3})`."""

    def make(**tiers: dict[str, int | None]) -> CreditLimiter:
        read = Tiers.from_mapping({"core": {"lifetime": 50}, **tiers})
        return CreditLimiter(redis, read, clock=clock, timeout_ms=PATIENCE_MS, deadline_ms=PATIENCE_MS)

    return make


@pytest.fixture
async def own_server(tmp_path: Path) -> AsyncIterator[Callable[..., Server]]:
    """Make servers that the test may stop, kill and pause."""
    servers: list[Server] = []

    def make(name: str = "valkey", *extra: str) -> Server:
        binary = binaries()[name]
        if binary is None:
            pytest.skip("Debian's redis-server is not installed (apt-get install redis-server)")
        server = Server(binary, tmp_path / f"server-{len(servers)}", *extra).start()
        servers.append(server)
        return server

    yield make
    for server in servers:
        server.kill()


@pytest.fixture
async def closing() -> AsyncIterator[AsyncExitStack]:
    """Closes what the test opens."""
    async with AsyncExitStack() as stack:
        yield stack
