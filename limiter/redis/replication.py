"""Waiting until replicas have what a command wrote, so that a failover does not lose it. It only reads.

Redis' own WAIT speaks of the writes of its own connection and blocks it: it would have to be sent on the channel, where
others' decisions would queue behind it. So each primary is asked by INFO, as of when it had written all of it, how far
each of its replicas is. Replicas say so once a second; no connection is blocked, and a user needs no further right.
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
_ASK_S = 0.1
_REPLICA = re.compile(r"slave\d+", re.ASCII)


@asynccontextmanager
async def wait_for_replicas(redis: "Redis", replicas: int) -> AsyncIterator[None]:
    """Wait, when the block has done its work, until so many replicas of every primary have it; 0: do not.

    Raises NotReplicated when they have it not within WITHIN_S, or another server took the place of a primary since the
    block began: what it wrote is there, or was, but may be lost. LimiterUnavailable before the block.
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
    """One primary. run_id: another one after a restart. offset: of all that it wrote. acknowledged: by each replica."""

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
            problem = f"Redis did not say how many replicas have it: {error}"
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
        await asyncio.sleep(_ASK_S)


async def _primaries(redis: "Redis") -> list[_Primary]:
    """Query all primaries that have slots, or the only one. Raises RedisError, OSError."""
    infos = await asyncio.gather(*(node.info("server", "replication") for node in await primaries_of(redis)))
    return [_primary(info) for info in infos if info["role"] == "master"]


def _primary(info: Any) -> _Primary:
    replicas = [info[name] for name in info if _REPLICA.fullmatch(name)]
    acknowledged = tuple(int(each["offset"]) for each in replicas if each["state"] == "online")
    return _Primary(str(info["run_id"]), int(info["tcp_port"]), int(info["master_repl_offset"]), acknowledged)
