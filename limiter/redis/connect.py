"""The only door to Redis: `connect` turns a URL into a client whose timeouts and retries are ours, and checks it."""

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from redis.asyncio import BlockingConnectionPool, SSLConnection
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError
from redis.exceptions import ConnectionError as RedisConnectionError

from limiter.errors import ACL_HINT, LimiterError, LimiterUnavailable, SettingsError
from limiter.redis import embedded
from limiter.redis.client import Client
from limiter.redis.cluster import ClusterClient, primaries_of
from limiter.redis.sentinel import PrimaryConnection, SentinelClient, Sentinels, TlsPrimaryConnection
from limiter.redis.slot_map import SlotMap
from limiter.redis.url import invalid_url, parse_url, redacted

__all__ = ["connect", "redacted"]
_LOG = logging.getLogger("limiter")
OLDEST_MAJOR = 7  # scripts with a shebang line
AWAY = (RedisError, OSError)  # what a client raises when there is no answer


async def connect(
    url: str, *, timeout_ms: int = 1000, max_connections: int = 64, allow_eviction: bool = False
) -> Client:
    """Open a checked client; close it with `aclose()`.

    url: `embedded:FOLDER`, `redis://`, `rediss://`, `unix://`, `redis+sentinel://` or `redis+cluster://`. timeout_ms
    bounds connecting, and each reply. max_connections: to one server; above it, calls other than decisions, which
    share one connection, wait for a free one. allow_eviction: accept a server that may evict rows.
    Raises SettingsError for a URL or a server that cannot be used, LimiterUnavailable when there is no answer.
    """
    redis = await open_client(url, timeout_ms=timeout_ms, max_connections=max_connections)
    try:
        await _check(redis, url, allow_eviction=allow_eviction)
    except BaseException:
        await redis.aclose()
        raise
    return redis


async def open_client(url: str, *, timeout_ms: int, max_connections: int = 64) -> Client:
    """Make a client of whatever is there, unchecked; but for an embedded server, nothing is connected to yet.

    Raises SettingsError for a text that is no URL.
    """

    def single(one: str) -> Client:
        return Client(_pool(one, timeout_ms, max_connections))

    folder = embedded.folder_of(url)
    topology = None if folder is not None else parse_url(url)
    if folder is not None:
        lease = await asyncio.to_thread(embedded.start_or_join, folder)
        return _EmbeddedClient(lease, _pool(f"unix://{lease.socket}", timeout_ms, max_connections))
    if topology is None:
        return single(url)
    if topology.kind == "cluster":
        slots = SlotMap(topology.seeds, lambda address: single(topology.url_of(address)))
        return ClusterClient(slots, topology.seeds[0])
    sentinels = Sentinels(topology.seeds, topology.name, lambda address: single(topology.sentinel_url_of(address)))
    pool = _pool(topology.url_of(topology.seeds[0]), timeout_ms, max_connections, sentinels=sentinels)
    return SentinelClient(sentinels, pool)


class _EmbeddedClient(Client):
    """A client of the embedded server, which stops with its last client."""

    def __init__(self, lease: embedded.ServerLease, pool: BlockingConnectionPool) -> None:
        super().__init__(pool)
        self._lease = lease
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
            await asyncio.to_thread(embedded.revive, self._lease)
        except (LimiterError, OSError) as error:
            _LOG.error("the embedded server is gone: %s", error)

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        if self._reviving is not None:
            await self._reviving
        await super().aclose(close_connection_pool)
        await asyncio.to_thread(embedded.stop_if_last, self._lease)


def _pool(
    url: str, timeout_ms: int, max_connections: int, *, sentinels: Sentinels | None = None
) -> BlockingConnectionPool:
    timeout_s = timeout_ms / 1000
    try:
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=max_connections,
            timeout=timeout_s,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            # redis-py repeats any command, EVALSHA too, after a lost reply, which would debit twice.
            retry=Retry(NoBackoff(), 0),
            client_name=embedded.CLIENT_NAME,
            driver_info=None,  # or CLIENT SETINFO is sent, which a user would need one more right for
            protocol=2,  # RESP3 would add pushes that nothing here reads
        )
    except ValueError:  # its text may quote a part of the password
        raise invalid_url(url) from None
    if sentinels is not None:
        tls = issubclass(pool.connection_class, SSLConnection)
        pool.connection_class = TlsPrimaryConnection if tls else PrimaryConnection
        pool.connection_kwargs["sentinels"] = sentinels
    return pool


async def _check(redis: Client, url: str, *, allow_eviction: bool) -> None:
    """Refuse servers on which rows are not safe; warn where they could be safer."""
    shown = redacted(url)
    try:
        nodes = await primaries_of(redis)
        infos = [await node.info() for node in nodes]
        await redis.open()
    except AuthenticationError as error:
        raise SettingsError(f"Redis at {shown} refuses this user or password: {error}") from error
    except NoPermissionError as error:
        raise SettingsError(f"Redis at {shown} does not let this user do what it must: {error}; {ACL_HINT}") from error
    except (RedisError, OSError) as error:
        if "cluster support disabled" in str(error):
            raise SettingsError(f"Redis at {shown} is no cluster: give a redis:// URL") from error
        raise LimiterUnavailable(f"no Redis at {shown}: {error}", executed=False) from error
    if not infos:
        raise LimiterUnavailable(f"the cluster at {shown} serves no slot", executed=False)
    for info in infos:
        _check_mode(info, url, clustered=isinstance(redis, ClusterClient))
        version = str(info["redis_version"])
        if int(version.partition(".")[0]) < OLDEST_MAJOR:
            raise SettingsError(f"Redis {version} at {shown} is too old: use Redis 7 or later, or Valkey")
        policy = info.get("maxmemory_policy", "noeviction")
        if policy != "noeviction" and not allow_eviction:
            raise SettingsError(
                f"Redis at {shown} may evict rows (maxmemory-policy {policy}): "
                "set it to noeviction, or [redis] allow_eviction = true to accept that"
            )
    if not all(info.get("aof_enabled") for info in infos):
        _LOG.warning("Redis at %s runs without AOF: a crash loses what was debited since its last snapshot", shown)


def _check_mode(info: Mapping[str, Any], url: str, *, clustered: bool) -> None:
    """Refuse a server of another kind than the URL says, which would fail later and less clearly."""
    mode = info.get("redis_mode") or info.get("server_mode")  # Redis, Valkey
    if mode == "sentinel":
        raise SettingsError(f"{redacted(url)} is a Sentinel: give redis+sentinel://HOST:PORT,HOST:PORT/NAME")
    if mode == "cluster" and not clustered:
        raise SettingsError(f"{redacted(url)} is a node of a cluster: give redis+cluster://HOST:PORT,HOST:PORT")
    if info.get("role") == "slave" and not clustered:
        raise SettingsError(
            f"{redacted(url)} is a replica, which takes no writes: give its primary, or redis+sentinel://…/NAME"
        )
