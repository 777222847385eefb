"""The only door to Redis: `connect` turns a URL into a client whose timeouts and retries are ours, and checks it."""

import asyncio
import logging
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, RedisError

from limiter import embedded
from limiter.errors import LimiterUnavailable, SettingsError

_LOG = logging.getLogger("limiter")
_LATER = {"redis+sentinel": "Sentinel", "redis+cluster": "Cluster"}
_SINGLE = ("redis", "rediss", "unix")
_OLDEST_MAJOR = 7  # scripts with a shebang line


async def connect(
    url: str, *, timeout_ms: int = 1000, max_connections: int = 64, allow_eviction: bool = False
) -> "Redis":
    """Open a checked client; close it with `aclose()`.

    url: `embedded:FOLDER`, `redis://`, `rediss://` or `unix://`. timeout_ms bounds connecting, and each reply.
    max_connections: above it, calls wait for a free one. allow_eviction: accept a server that may evict rows.
    Raises SettingsError for a URL or a server that cannot be used, LimiterUnavailable when there is no answer.
    """
    scheme = url.partition(":")[0]
    if scheme in _LATER:
        raise SettingsError(
            f"{scheme}:// ({_LATER[scheme]}) is not supported yet: give a redis://, rediss:// or unix:// URL"
        )
    if scheme == "embedded":
        folder = Path(url.partition(":")[2] or "data")
        path = await asyncio.to_thread(embedded.start_or_join, folder)
        redis: Redis = _EmbeddedRedis(folder, _pool(f"unix://{path}", timeout_ms, max_connections))
    elif scheme in _SINGLE:
        redis = Redis(connection_pool=_pool(url, timeout_ms, max_connections))
    else:
        raise SettingsError(f"{redacted(url)!r} is no Redis URL: give redis://, rediss://, unix:// or embedded:FOLDER")
    try:
        await _check(redis, url, allow_eviction=allow_eviction)
    except BaseException:
        await redis.aclose()
        raise
    return redis


def redacted(url: str) -> str:
    """Give the URL without its password, for logs and errors."""
    parts = urlsplit(url)
    if parts.password is None and "password=" not in parts.query:
        return url
    host = parts.netloc.rpartition("@")[2]
    user = f"{parts.username or ''}:***@" if parts.password is not None else ""
    return urlunsplit(parts._replace(netloc=user + host, query="***" if "password=" in parts.query else parts.query))


class _EmbeddedRedis(Redis):
    """A client of the embedded server, which stops with its last client."""

    def __init__(self, folder: Path, pool: BlockingConnectionPool) -> None:
        super().__init__(connection_pool=pool)
        self._folder = folder

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        await super().aclose(close_connection_pool)
        await self.connection_pool.aclose()
        await asyncio.to_thread(embedded.stop_if_last, self._folder)


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
    except ValueError as error:
        raise SettingsError(f"{redacted(url)!r} is no Redis URL: {error}") from error


async def _check(redis: "Redis", url: str, *, allow_eviction: bool) -> None:
    """Refuse a server on which rows are not safe; warn where they could be safer."""
    try:
        info = await redis.info()
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
