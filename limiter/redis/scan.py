"""Finding every key of a pattern, on one server or all primaries of a cluster, while servers and slots move.

It only reads. A cursor of SCAN is not valid on another server, nor on the same one after a restart; and a key that is
moved from a node not yet read to one already read is missed. So the servers and their slots are compared before and
after a pass: if they changed, there is another one.
"""

from collections.abc import AsyncIterator
from typing import Any, cast

from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from limiter._util.fingerprint_set import FingerprintSet
from limiter.redis.cluster import ClusterClient, primaries_of

# Also how many rows a dump reads at once, while decisions wait. Measured at 250,000 rows on two cores: with 40 the p99
# of decisions is 1.3 times what it is without a dump, with 500 it is 3.9 times; 500 would dump half as fast again.
_SCAN_COUNT = 40
_MAX_PASSES = 20


async def scan(redis: "Redis", pattern: str) -> AsyncIterator[list[bytes]]:
    """Yield every key of the pattern, once each and in no order, as many at a time as SCAN returns.

    A key that is created or deleted meanwhile may be among them or not. It takes 12 to 24 bytes of memory a key, to
    recognise one that SCAN returns twice. Raises RedisError, also if servers and slots change in every pass.
    """
    seen = FingerprintSet()
    before = await _state(redis)
    for number in range(_MAX_PASSES):
        for node in await primaries_of(redis):
            cursor = 0
            while True:
                cursor, found = await node.scan(cursor, match=pattern, count=_SCAN_COUNT)
                yield [name for name in cast("list[bytes]", found) if seen.add(name)]
                if cursor == 0:
                    break
        after = await _state(redis)
        # While a slot is being moved it takes two passes: the second finds the keys that the first one missed.
        if after == before and (number > 0 or not _moves(after)):
            return
        before = after
    raise RedisConnectionError(f"servers and slots changed in each of {_MAX_PASSES} passes over all rows")


async def _state(redis: "Redis") -> tuple[str, ...]:
    """Return each server's run id, and a cluster node's slots: its own, importing and migrating ones."""
    state = []
    for node in await primaries_of(redis):
        info = await node.info("server")
        state.append(str(info["run_id"]))
        if isinstance(redis, ClusterClient):
            lines: Any = await node.execute_command("CLUSTER", "NODES")  # type: ignore[no-untyped-call]  # redis-py 8.1
            own = next(line for line in lines.decode().splitlines() if "myself" in line)
            state.append(" ".join(own.split(" ")[8:]))
    return tuple(sorted(state))


def _moves(state: tuple[str, ...]) -> bool:
    return any("[" in part for part in state)
