"""Waiting until replicas have what a command wrote, so that a failover does not lose it. It only reads.

Redis' own WAIT covers only the writes of its own connection and blocks it: it would have to be sent on the channel,
where other calls would queue behind it. So INFO of each primary is polled: its offset once all is written, and then
what each of its replicas has acknowledged, which replicas report once a second. No connection is blocked, and the user
needs no further right.
"""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis

from limiter.errors import NotReplicated
from limiter.redis.cluster import primaries_of
from limiter.redis.connect import CLIENT_ERRORS
from limiter.redis.errors import translate_error

WITHIN_S = 30.0
_POLL_S = 0.1
_REPLICA = re.compile(r"slave\d+", re.ASCII)


@asynccontextmanager
async def wait_for_replicas(redis: "Redis", replicas: int) -> AsyncIterator[None]:
    """Wait, at the end of the block, until so many replicas of every primary have what it wrote; 0: do not wait.

    Raises NotReplicated when they do not have it within WITHIN_S, or another server took the place of a primary since
    the block began: the writes were made, but may be lost. Raises LimiterUnavailable before the block.
    """
    if not replicas:
        yield
        return
    try:
        before = {primary.run_id for primary in await _primaries(redis)}
    except CLIENT_ERRORS as error:
        raise translate_error(error, "INFO") from error
    yield
    await _wait(redis, before, replicas)


@dataclass(frozen=True, slots=True)
class _Primary:
    """The replication of one primary.

    Args:
        run_id: changes when the server restarts.
        port: by which errors name it.
        offset: of all that it wrote, in bytes.
        acknowledged: the offset of each replica, in bytes.
    """

    run_id: str
    port: int
    offset: int
    acknowledged: tuple[int, ...]

    def having(self, offset: int) -> int:
        """Count the replicas that have all up to an offset."""
        return sum(each >= offset for each in self.acknowledged)


async def _wait(redis: "Redis", before: set[str], replicas: int) -> None:
    loop = asyncio.get_running_loop()
    ends = loop.time() + WITHIN_S
    written: dict[str, int] = {}
    while True:
        try:
            primaries = await _primaries(redis)
        except CLIENT_ERRORS as error:
            problem = f"Redis did not report how many replicas have it: {error}"
        else:
            if not primaries or before - {primary.run_id for primary in primaries}:
                raise NotReplicated("another server took the place of a primary meanwhile")
            for primary in primaries:
                written.setdefault(primary.run_id, primary.offset)
            least = min(primaries, key=lambda each: each.having(written[each.run_id]))
            having = least.having(written[least.run_id])
            if having >= replicas:
                return
            problem = f"{having} replicas of the primary at port {least.port} have it, want {replicas}"
        if loop.time() > ends:
            raise NotReplicated(f"after {WITHIN_S:g} s {problem} (redis.wait_replicas)")
        await asyncio.sleep(_POLL_S)


async def _primaries(redis: "Redis") -> list[_Primary]:
    """Query all primaries that have slots, or the only one. Raises RedisError, OSError."""
    infos = await asyncio.gather(*(node.info("server", "replication") for node in await primaries_of(redis)))
    return [_primary(info) for info in infos if info["role"] == "master"]


def _primary(info: Any) -> _Primary:
    replicas = [info[name] for name in info if _REPLICA.fullmatch(name)]
    acknowledged = tuple(int(each["offset"]) for each in replicas if each["state"] == "online")
    return _Primary(str(info["run_id"]), int(info["tcp_port"]), int(info["master_repl_offset"]), acknowledged)
