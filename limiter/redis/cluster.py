"""A client of a cluster: each command goes to the primary that has its key, by plain clients of the nodes.

redis-py's own asyncio cluster client (8.1) sends ASKING and the command that it is for on two connections, cannot
follow an ASK to a node without slots, and repeats commands that may have been executed. So the routing is done here:
MOVED and ASK are followed, as they mean that nothing was executed; nothing else is repeated.
"""

import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.exceptions import AskError, ClusterDownError, MovedError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from limiter.errors import Execution, LimiterUnavailable, Overloaded
from limiter.redis.client import Client
from limiter.redis.resp import script_load
from limiter.redis.slot_map import SlotMap, redirect_target, slot_of
from limiter.redis.url import Address

_MAX_REDIRECTIONS = 8
_SCRIPT_CALLS = ("EVAL", "EVALSHA", "EVAL_RO", "EVALSHA_RO")
_KEY_IS_THIRD = ("OBJECT", "MEMORY USAGE", "OBJECT ENCODING", "DEBUG")
# Commands that go to every primary, by how the replies are combined.
_SUMS = ("DBSIZE",)
_JOINS = ("KEYS",)
_ANY = (
    *("FLUSHDB", "FLUSHALL", "SCRIPT LOAD", "SCRIPT FLUSH"),
    *("CONFIG SET", "CONFIG RESETSTAT", "CLIENT PAUSE", "CLIENT UNPAUSE"),
)
# Commands that any primary can answer. Not SCAN: a cursor belongs to one node, see `primaries`.
_KEYLESS = ("PING", "ECHO", "INFO", "TIME", "CONFIG GET", "CLUSTER", "CLUSTER SLOTS", "ACL WHOAMI")


class ClusterClient(Client):
    """A client of all primaries. A command is routed by its first key; without a key, by the tables above."""

    def __init__(self, slots: SlotMap, seed: Address) -> None:
        super().__init__(slots.client(seed).connection_pool)
        self.channel = ClusterChannel(slots)
        self._slots = slots

    async def open(self) -> None:
        """Connect to all primaries."""
        await asyncio.gather(*(node.open() for node in await self.primaries()))

    async def primaries(self) -> list[Client]:
        """Return clients of the primaries, for commands about all keys. Raises RedisError."""
        return [self._slots.client(address) for address in await self._slots.primaries()]

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        """Run a command where its key is, following redirections; without a key, on each primary that it concerns."""
        name = str(args[0]).upper()
        if name in (*_SUMS, *_JOINS, *_ANY):
            nodes = await self.primaries()
            answers = await asyncio.gather(*(node.execute_command(*args, **options) for node in nodes))  # type: ignore[no-untyped-call]  # redis-py 8.1
            if name in _JOINS:
                return [key for answer in answers for key in answer]
            return sum(answers) if name in _SUMS else answers[0]
        slot = 0 if name in _KEYLESS else self._slot_of(args)
        return await self._at(slot, args, options)

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> "ClusterPipeline":
        """Return a pipeline; its commands are sent as one write to each primary."""
        return ClusterPipeline(self, transaction, shard_hint)

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        """Close the connections to all nodes."""
        await self._slots.aclose()
        await self.multiplexed.aclose()
        await super().aclose(close_connection_pool)

    def invalidate(self) -> None:
        """Note that the cluster may have changed."""
        self._slots.invalidate()

    async def by_node(self, commands: Mapping[int, tuple[Any, ...]]) -> dict[Client, list[int]]:
        """Group commands, given by their positions in a pipeline, by the node that each goes to."""
        groups: dict[Client, list[int]] = defaultdict(list)
        for place, args in commands.items():
            slot = 0 if args[0] in _KEYLESS else self._slot_of(args)
            groups[self._slots.client(await self._slots.owner(slot))].append(place)
        return groups

    async def _at(self, slot: int, args: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
        asking = False
        address = await self._slots.owner(slot)
        for _ in range(_MAX_REDIRECTIONS):
            node = self._slots.client(address)
            try:
                if asking:  # both in one write on one connection, or another command would use up the permission
                    pipeline = node.pipeline(transaction=False)
                    pipeline.execute_command("ASKING")
                    pipeline.execute_command(*args, **options)
                    return (await pipeline.execute())[1]
                return await node.execute_command(*args, **options)  # type: ignore[no-untyped-call]  # redis-py 8.1
            except MovedError as moved:
                address = redirect_target(address, moved)
                self._slots.moved(moved.slot_id, address)
                asking = False
            except AskError as ask:
                address = redirect_target(address, ask)
                asking = True
            except (RedisConnectionError, RedisTimeoutError, ClusterDownError, OSError):
                self._slots.invalidate()
                raise
        raise ClusterDownError(f"slot {slot} was redirected {_MAX_REDIRECTIONS} times")

    @staticmethod
    def _slot_of(args: tuple[Any, ...]) -> int:
        name = str(args[0]).upper()
        place = 3 if name in _SCRIPT_CALLS else 2 if name in _KEY_IS_THIRD else 1
        return slot_of(args[place]) if len(args) > place else 0


class ClusterChannel:
    """The channel to all primaries: each call goes to the one that has its key, following MOVED and ASK."""

    def __init__(self, slots: SlotMap) -> None:
        self._slots = slots
        self._loop = asyncio.get_running_loop()
        self._importing: dict[int, Address] = {}  # where a slot's new keys go while it is moved

    async def send(self, key: str, command: bytes, timeout_s: float) -> Any:
        """Send an encoded command. See `CommandChannel`."""
        slot, ends = slot_of(key), self._loop.time() + timeout_s
        address, asking = await self._owner(slot, timeout_s), False
        for _ in range(_MAX_REDIRECTIONS):
            channel = self._slots.client(address).multiplexed
            try:
                return await channel.send(key, command, ends - self._loop.time(), asking=asking)
            except MovedError as moved:
                address, asking = redirect_target(address, moved), False
                self._slots.moved(slot, address)
                self._importing.pop(slot, None)
            except AskError as ask:
                address, asking = redirect_target(address, ask), True
                self._importing[slot] = address
            except Overloaded:
                raise
            except (LimiterUnavailable, ClusterDownError):
                self._slots.invalidate()
                raise
        raise ClusterDownError(f"slot {slot} was redirected {_MAX_REDIRECTIONS} times")

    async def load_script(self, key: str, text: str, timeout_s: float) -> Any:
        """Load a script at the key's primary, and while its slot is moved also at the target. See `CommandChannel`."""
        if (moves_to := self._importing.get(slot_of(key))) is not None:
            await self._slots.client(moves_to).multiplexed.load_script(key, text, timeout_s)
        return await self.send(key, script_load(text), timeout_s)

    async def aclose(self) -> None:
        """Do nothing: the nodes' clients own the connections."""

    async def _owner(self, slot: int, timeout_s: float) -> Address:
        if (owner := self._slots.known_owner(slot)) is not None:
            return owner
        try:
            async with asyncio.timeout(timeout_s):
                return await self._slots.owner(slot)
        except (RedisConnectionError, RedisTimeoutError, OSError, TimeoutError) as error:
            raise LimiterUnavailable(f"Redis is not reachable: {error}", execution=Execution.NOT_EXECUTED) from error


class ClusterPipeline(Pipeline):
    """Commands for any number of primaries: one write to each, and the replies in the order of the commands."""

    def __init__(self, cluster: ClusterClient, transaction: bool, shard_hint: str | None) -> None:
        super().__init__(cluster.connection_pool, cluster.response_callbacks, transaction, shard_hint)
        self._cluster = cluster

    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        """Send all; a command that is redirected is sent again, by itself. SCRIPT LOAD goes to each node first."""
        stack, self.command_stack = self.command_stack, []
        replies: list[Any] = [None] * len(stack)
        first = [place for place, (args, _) in enumerate(stack) if args[0] in _ANY]
        groups = await self._cluster.by_node({n: args for n, (args, _) in enumerate(stack) if n not in first})
        if self.is_transaction and len(groups) > 1:
            raise RedisError("the keys of a transaction must be of one slot")

        async def send(node: Client, places: list[int]) -> None:
            pipeline = node.pipeline(transaction=self.is_transaction)
            for place in (*first, *places):
                args, options = stack[place]
                pipeline.execute_command(*args, **options)
            for place, reply in zip((*first, *places), await pipeline.execute(raise_on_error=False), strict=True):
                replies[place] = reply

        sent = await asyncio.gather(*(send(node, places) for node, places in groups.items()), return_exceptions=True)
        for failure in sent:
            if isinstance(failure, BaseException):
                self._cluster.invalidate()
                raise failure
        for place, reply in enumerate(replies):
            if isinstance(reply, AskError):  # MOVED as well
                replies[place] = await self._redirected(*stack[place])
            if raise_on_error and isinstance(replies[place], ResponseError):
                raise replies[place]
        return replies

    async def _redirected(self, args: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
        try:
            return await self._cluster.execute_command(*args, **options)
        except ResponseError as error:
            return error


async def primaries_of(redis: "Redis") -> "Sequence[Redis]":
    """Return plain clients of every server that has rows, for commands about all keys. Raises RedisError."""
    return await redis.primaries() if isinstance(redis, ClusterClient) else [redis]
