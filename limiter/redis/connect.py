"""The one way to Redis: `connect` returns a checked client of a URL, with this package's timeouts and retries."""

import asyncio
import logging

from redis.asyncio import BlockingConnectionPool, Redis, SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError, ResponseError

from limiter.errors import ACL_HINT, Execution, LimiterUnavailable, SettingsError
from limiter.log_events import event
from limiter.redis import embedded
from limiter.redis.client import Client
from limiter.redis.cluster import ClusterClient, primaries_of
from limiter.redis.embedded_client import EmbeddedClient
from limiter.redis.errors import is_unknown_command
from limiter.redis.sentinel import PrimaryConnection, SentinelClient, Sentinels, TlsPrimaryConnection
from limiter.redis.server_checks import inspect, without_command
from limiter.redis.slot_map import SlotMap
from limiter.redis.url import Kind, invalid_url, parse_url, redacted

_LOG = logging.getLogger("limiter")
CLIENT_ERRORS = (RedisError, OSError)  # what a client raises if there is no answer


async def connect(
    url: str,
    *,
    timeout_ms: int = 1000,
    max_connections: int = 64,
    allow_eviction: bool = False,
    embedded_maxmemory_mb: int = embedded.MAXMEMORY_MB,
) -> Client:
    """Return a client of a server that has passed the checks; close it with `aclose()`.

    Args:
        url: `embedded:FOLDER`, `redis://`, `rediss://`, `unix://`, `redis+sentinel://` or `redis+cluster://`.
        timeout_ms: bounds connecting, and each reply.
        max_connections: to one server. Above it, calls wait for a free connection; decisions do not, they share one.
        allow_eviction: accept a server that may evict rows.
        embedded_maxmemory_mb: of the embedded server, if it is started here; 0 for no limit.

    Raises SettingsError for a URL or a server that cannot be used, LimiterUnavailable when there is no answer.
    """
    redis = await open_client(
        url,
        timeout_ms=timeout_ms,
        max_connections=max_connections,
        embedded_maxmemory_mb=embedded_maxmemory_mb,
    )
    try:
        await _check(redis, url, allow_eviction=allow_eviction)
    except BaseException:
        await redis.aclose()
        raise
    return redis


async def open_client(
    url: str,
    *,
    timeout_ms: int,
    max_connections: int = 64,
    embedded_maxmemory_mb: int = embedded.MAXMEMORY_MB,
) -> Client:
    """Return an unchecked client. Nothing is connected to yet, but an embedded server is started.

    Raises SettingsError for a text that is not a valid URL.
    """

    def single(one: str) -> Client:
        return Client(_pool(one, timeout_ms, max_connections))

    folder = embedded.folder_of(url)
    topology = None if folder is not None else parse_url(url)
    if folder is not None:
        lease = await asyncio.to_thread(embedded.start_or_join, folder, maxmemory_mb=embedded_maxmemory_mb)
        return EmbeddedClient(lease, _pool(f"unix://{lease.socket}", timeout_ms, max_connections))
    if topology is None:
        return single(url)
    if topology.kind == "cluster":
        slots = SlotMap(topology.seeds, lambda address: single(topology.url_of(address)))
        return ClusterClient(slots, topology.seeds[0])
    sentinels = Sentinels(topology.seeds, topology.name, lambda address: single(topology.sentinel_url_of(address)))
    pool = _pool(topology.url_of(topology.seeds[0]), timeout_ms, max_connections, sentinels=sentinels)
    return SentinelClient(sentinels, pool)


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
            # redis-py would repeat any command, EVALSHA too, after a lost reply, which would debit twice.
            retry=Retry(NoBackoff(), 0),
            client_name=embedded.CLIENT_NAME,
            driver_info=None,  # or CLIENT SETINFO would be sent, for which a user would need one more right
            protocol=2,  # RESP3 would add pushes that nothing here reads
        )
    except ValueError:  # its message may quote a part of the password
        raise invalid_url(url) from None
    if sentinels is not None:
        tls = issubclass(pool.connection_class, SSLConnection)
        pool.connection_class = TlsPrimaryConnection if tls else PrimaryConnection
        pool.connection_kwargs["sentinels"] = sentinels
    return pool


async def _check_commands(node: Redis, subject: str) -> None:
    """Refuse a server whose configuration took away what decisions are made with; what it denies a user comes later."""
    for command in (("SCRIPT", "LOAD", "return 1"), ("EVALSHA", "0" * 40, 0)):
        try:
            await node.execute_command(*command)  # type: ignore[no-untyped-call]  # redis-py 8.1
        except ResponseError as error:
            if is_unknown_command(error):
                finding = without_command(subject, command[0])
                raise SettingsError(str(finding)) from error


async def _check(redis: Client, url: str, *, allow_eviction: bool) -> None:
    """Refuse servers on which rows are not safe; warn where they could be safer."""
    subject = f"Redis at {redacted(url)}"
    kind: Kind = "cluster" if isinstance(redis, ClusterClient) else "single"
    try:
        nodes = await primaries_of(redis)
        infos = [await node.info() for node in nodes]
        findings = [
            finding
            for info in infos
            for finding in inspect(info, subject=subject, kind=kind, allow_eviction=allow_eviction)
        ]
        for finding in findings:
            if finding.level == "problem":
                raise SettingsError(str(finding))
        for node in nodes:
            await _check_commands(node, subject)
        await redis.open()
    except AuthenticationError as error:
        raise SettingsError(f"{subject} refuses this user or password: {error}") from error
    except NoPermissionError as error:
        raise SettingsError(f"{subject} does not permit a command that limiter needs: {error}; {ACL_HINT}") from error
    except CLIENT_ERRORS as error:
        if "cluster support disabled" in str(error):
            raise SettingsError(f"{subject} is not a cluster: give a redis:// URL") from error
        raise LimiterUnavailable(f"no {subject}: {error}", execution=Execution.NOT_EXECUTED) from error
    if not infos:
        raise LimiterUnavailable(f"the cluster at {redacted(url)} serves no slot", execution=Execution.NOT_EXECUTED)
    for warning in dict.fromkeys(str(each) for each in findings if each.level == "warning"):  # once for all nodes
        _LOG.warning("%s", warning, extra=event("redis_server_warning"))
