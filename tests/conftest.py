"""Fixtures: real servers, a clean one for each test, and the promise that no key is left behind without a TTL."""

import json
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Protocol

import pytest
from redis.asyncio import Redis

from limiter import CreditLimiter, Tiers, connect
from tests.servers import Server, binaries

TIERS = Tiers.from_mapping(
    {
        "core": {"lifetime": 50, "gemini_cap": 20},
        "pro": {"monthly": 1000, "gemini_cap": 400},
        "max": {"monthly": None, "gemini_cap": 2000},
    }
)
Entry = dict[str, Any]  # one entry of a vector file, as JSON has it
Vectors = dict[str, list[Entry]]
Closing = AsyncExitStack
ELSEWHERE = "LIMITER_TEST_REDIS_URL"  # a URL here points the tests at a server that they do not start; it is flushed


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--vectors", type=Path, default=Path(__file__).parent / "vectors", help="folder of vector files")


@pytest.fixture(scope="session")
def vectors(request: pytest.FixtureRequest) -> Vectors:
    """What the old ledger answered, by file: renewals, ledgers, migrations."""
    folder: Path = request.config.getoption("--vectors")
    return {kind: json.loads((folder / f"{kind}.json").read_text()) for kind in ("renewals", "ledgers", "migrations")}


@pytest.fixture(scope="session", params=["elsewhere"] if ELSEWHERE in os.environ else ["valkey", "redis"])
def redis_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the matrix, for tests that leave it running."""
    if request.param == "elsewhere":
        yield os.environ[ELSEWHERE]
        return
    binary = binaries()[request.param]
    if binary is None:
        pytest.skip("Debian's redis-server is not installed (apt-get install redis-server)")
    server = Server(binary, tmp_path_factory.mktemp(request.param), "--appendfsync", "no").start()
    yield server.url
    server.stop()


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    """A client of an empty server. Afterwards every key must be a row, or have a TTL."""
    client = await connect(redis_url)
    await client.flushdb()
    yield client
    for key in await client.keys("*"):
        assert b":install:" in key or await client.pttl(key) != -1, f"{key!r} was left behind without a TTL"
    await client.aclose()


async def fields_of(redis: Redis, install_id: str) -> dict[str, str]:
    """Give a row's fields as they stand in Redis; none for an unknown install."""
    fields = await redis.hgetall(f"credits:install:{install_id}")
    return {text_of(name): text_of(value) for name, value in fields.items()}


def text_of(word: bytes | str) -> str:
    return word.decode() if isinstance(word, bytes) else word


class Clock:
    """A clock that the test sets: epoch milliseconds."""

    def __init__(self, now_ms: int) -> None:
        self.now_ms = now_ms

    def __call__(self) -> int:
        return self.now_ms


@pytest.fixture
def clock() -> Clock:
    """A clock that stands at 2026-05-11T23:02:57.123Z."""
    return Clock(1_778_540_577_123)


@pytest.fixture
def limiter(redis: Redis, clock: Clock) -> CreditLimiter:
    return CreditLimiter(redis, TIERS, clock=clock)


@pytest.fixture
def limiter_with(redis: Redis, clock: Clock) -> "LimiterWith":
    """Make limiters of other tiers on the same rows: `limiter_with(pro={"monthly": 3})`."""

    def make(**tiers: dict[str, int | None]) -> CreditLimiter:
        return CreditLimiter(redis, Tiers.from_mapping({"core": {"lifetime": 50}, **tiers}), clock=clock)

    return make


class LimiterWith(Protocol):
    def __call__(self, **tiers: dict[str, int | None]) -> CreditLimiter: ...


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
