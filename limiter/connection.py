"""The only door to Redis: `connect` turns a URL into a client whose timeouts and retries are ours, and checks it."""

import asyncio
import logging
import re
from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, RedisError
from redis.exceptions import ConnectionError as RedisConnectionError

from limiter import embedded
from limiter.errors import LimiterError, LimiterUnavailable, SettingsError
from limiter.wire import ServerWire, Wire

_LOG = logging.getLogger("limiter")
_LATER = {"redis+sentinel": "Sentinel", "redis+cluster": "Cluster"}
_SINGLE = ("redis", "rediss", "unix")
_OLDEST_MAJOR = 7  # scripts with a shebang line


async def connect(
    url: str, *, timeout_ms: int = 1000, max_connections: int = 64, allow_eviction: bool = False
) -> "Client":
    """Open a checked client; close it with `aclose()`.

    url: `embedded:FOLDER`, `redis://`, `rediss://` or `unix://`. timeout_ms bounds connecting, and each reply.
    max_connections: above it, calls other than decisions, which
    share one connection, wait for a free one. allow_eviction: accept a server that may evict rows.
    Raises SettingsError for a URL or a server that cannot be used, LimiterUnavailable when there is no answer.
    """
    scheme = url.partition(":")[0]
    if scheme in _LATER:
        raise SettingsError(
            f"{scheme}:// ({_LATER[scheme]}) is not supported yet: give a redis://, rediss:// or unix:// URL"
        )
    folder = embedded.folder_of(url)
    if folder is not None:
        seat = await asyncio.to_thread(embedded.start_or_join, folder)
        redis: Client = _EmbeddedClient(seat, _pool(f"unix://{seat.socket}", timeout_ms, max_connections))
    elif scheme in _SINGLE:
        redis = Client(_pool(url, timeout_ms, max_connections))
    else:
        raise SettingsError(f"{redacted(url)!r} is no Redis URL: give redis://, rediss://, unix:// or embedded:FOLDER")
    try:
        await _check(redis, url, allow_eviction=allow_eviction)
    except BaseException:
        await redis.aclose()
        raise
    return redis


def redacted(url: str) -> str:
    """Give the URL without its password, for logs and errors; it need not be a URL that can be parsed."""
    scheme, separator, rest = url.partition("://")
    login, at, place = rest.rpartition("@")
    user = login.partition(":")[0] + ":***" if ":" in login else login
    return scheme + separator + user + at + re.sub(r"(password=)[^&]*", r"\1***", place)


class Client(Redis):
    """A redis-py client, and beside its pool the wire that carries the scripts."""

    def __init__(self, pool: BlockingConnectionPool) -> None:
        super().__init__(connection_pool=pool)
        self.auto_close_connection_pool = True
        self._server = ServerWire(self._dial)
        self.wire: Wire = self._server

    async def open(self) -> None:
        """Connect the wire now. Raises RedisError, OSError."""
        await self._server.open()

    async def _dial(self) -> AbstractConnection:
        """Connect and greet the server as the pool's connections do: address, TLS, user, database."""
        connection: AbstractConnection = self.connection_pool.make_connection()  # type: ignore[no-untyped-call]  # redis-py 8.1
        await connection.connect()  # type: ignore[no-untyped-call]
        return connection

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        """Close the wire and the pool."""
        await self.wire.aclose()
        await super().aclose(close_connection_pool)


class _EmbeddedClient(Client):
    """A client of the embedded server, which stops with its last client."""

    def __init__(self, seat: embedded.Seat, pool: BlockingConnectionPool) -> None:
        super().__init__(pool)
        self._seat = seat
        self._reviving: asyncio.Task[None] | None = None

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        """Run a command; when nobody answers, see to it that somebody does the next time."""
        try:
            return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]  # redis-py 8.1
        except RedisConnectionError:
            self._start_reviving()
            raise

    async def _dial(self) -> AbstractConnection:
        try:
            return await super()._dial()
        except RedisConnectionError:
            self._start_reviving()
            raise

    def _start_reviving(self) -> None:
        if self._reviving is None or self._reviving.done():
            self._reviving = asyncio.create_task(self._revive())

    async def _revive(self) -> None:
        try:
            await asyncio.to_thread(embedded.revive, self._seat)
        except (LimiterError, OSError) as error:
            _LOG.error("the embedded server is gone: %s", error)

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        if self._reviving is not None:
            await self._reviving
        await super().aclose(close_connection_pool)
        await asyncio.to_thread(embedded.stop_if_last, self._seat)


def _pool(url: str, timeout_ms: int, max_connections: int) -> BlockingConnectionPool:
    timeout_s = timeout_ms / 1000
    try:
        return BlockingConnectionPool.from_url(
            url,
            max_connections=max_connections,
            timeout=timeout_s,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            # redis-py repeats any command, EVALSHA too, after a lost reply, which would debit twice.
            retry=Retry(NoBackoff(), 0),
            client_name=embedded.CLIENT_NAME,
            protocol=2,  # RESP3 would add pushes that nothing here reads
        )
    except ValueError:  # its text may quote a part of the password
        raise SettingsError(
            f"{redacted(url)!r} is no Redis URL: give redis://USER:PASSWORD@HOST:PORT/DB or unix://PATH, "
            "with / : @ # ? of a password percent-encoded"
        ) from None


async def _check(redis: Client, url: str, *, allow_eviction: bool) -> None:
    """Refuse a server on which rows are not safe; warn where they could be safer."""
    try:
        info = await redis.info()
        await redis.open()
    except AuthenticationError as error:
        raise SettingsError(f"Redis at {redacted(url)} refuses this user or password: {error}") from error
    except (RedisError, OSError) as error:
        raise LimiterUnavailable(f"no Redis at {redacted(url)}: {error}", executed=False) from error
    version = str(info["redis_version"])
    if int(version.partition(".")[0]) < _OLDEST_MAJOR:
        raise SettingsError(f"Redis {version} at {redacted(url)} is too old: use Redis 7 or later, or Valkey")
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction" and not allow_eviction:
        raise SettingsError(
            f"Redis at {redacted(url)} may evict rows (maxmemory-policy {policy}): "
            "set it to noeviction, or [redis] allow_eviction = true to accept that"
        )
    if not info.get("aof_enabled"):
        _LOG.warning(
            "Redis at %s runs without AOF: a crash loses what was debited since its last snapshot", redacted(url)
        )
