"""Which primary of a cluster has which slot: the map, fetched again when it may be out of date.

It queries all known nodes at once, so that one that hangs costs no time. It sends no command that concerns rows.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from redis.crc import key_slot
from redis.exceptions import AskError, ClusterDownError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError

from limiter.redis.client import Client
from limiter.redis.fan_out import FanOut
from limiter.redis.url import Address

SLOTS = 16384


class SlotMap:
    """Which primary has which slot. make_client: opens a plain client of the node at an address."""

    def __init__(self, seeds: tuple[Address, ...], make_client: Callable[[Address], Client]) -> None:
        self._seeds, self._make_client = seeds, make_client
        self._clients: dict[Address, Client] = {}
        self._fan_out = FanOut(self._slots_by)
        self._owners: list[Address | None] = [None] * SLOTS
        self._refreshing: asyncio.Task[None] | None = None
        self._is_stale = True

    def client(self, address: Address) -> Client:
        """Return the client of a node, which stays open for as long as the cluster has the node."""
        if address not in self._clients:
            self._clients[address] = self._make_client(address)
        return self._clients[address]

    def invalidate(self) -> None:
        """Note that the map may be out of date: the next use fetches a new one."""
        self._is_stale = True

    def moved(self, slot: int, owner: Address) -> None:
        """Note a slot's new owner, from a redirection; the other slots may have moved as well."""
        self._owners[slot] = owner
        self._is_stale = True

    def known_owner(self, slot: int) -> Address | None:
        """Return the primary of a slot, if it is known and not invalidated."""
        return None if self._is_stale else self._owners[slot]

    async def owner(self, slot: int) -> Address:
        """Return the primary of a slot. Raises RedisConnectionError if no node can be reached, or none serves it."""
        if self._is_stale or self._owners[slot] is None:
            await self.refresh()
        owner = self._owners[slot]
        if owner is None:
            raise ClusterDownError(f"no node serves slot {slot}")
        return owner

    async def primaries(self) -> list[Address]:
        """Return the primaries that own slots, as they are now."""
        await self.refresh()
        return list(dict.fromkeys(owner for owner in self._owners if owner is not None))

    async def refresh(self) -> None:
        """Fetch the map, or wait for the fetch that is under way."""
        if not self._is_refreshing():
            self._refreshing = asyncio.create_task(self._refresh())
        assert self._refreshing is not None  # noqa: S101  for mypy
        await asyncio.shield(self._refreshing)

    async def aclose(self) -> None:
        """Close the connections to all nodes."""
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.gather(self._refreshing, return_exceptions=True)
        await self._fan_out.aclose()
        for client in self._clients.values():
            await client.aclose()

    def _is_refreshing(self) -> bool:
        return self._refreshing is not None and not self._refreshing.done()

    async def _refresh(self) -> None:
        """Query every known node at once: the first answer counts, so that one that hangs costs no time."""
        failures: list[BaseException] = []
        async for answer in self._fan_out.answers({*self._clients, *self._seeds}):
            if not isinstance(answer, BaseException):
                self._take(answer)
                return
            failures.append(answer)
        for failure in failures:
            if isinstance(failure, ResponseError):
                raise failure
        raise RedisConnectionError(f"no node of the cluster answers: {'; '.join(map(str, failures))}")

    async def _slots_by(self, address: Address) -> tuple[Address, list[Any]]:
        client = self.client(address)
        return address, await client.execute_command("CLUSTER", "SLOTS")  # type: ignore[no-untyped-call]  # redis-py 8.1

    def _take(self, answer: tuple[Address, list[Any]]) -> None:
        source, table = answer
        owners: list[Address | None] = [None] * SLOTS
        known = set(self._seeds)
        for first, last, *nodes in table:
            addresses = [_address(node, source) for node in nodes]
            known.update(addresses)
            owners[first : last + 1] = [addresses[0]] * (last + 1 - first)
        self._owners = owners
        self._is_stale = False
        for address in set(self._clients) - known:
            asyncio.create_task(self._clients.pop(address).aclose())  # noqa: RUF006  its end is not awaited


def slot_of(key: object) -> int:
    """Return the slot of a key, which may be text, bytes or a number."""
    return key_slot(key if isinstance(key, bytes) else str(key).encode())


def redirect_target(source: Address, redirection: AskError) -> Address:
    """Return the target of a redirection; without a host, it is on that of the node that sent it."""
    return Address(redirection.host or source.host, redirection.port)


def _address(node: list[Any], source: Address) -> Address:
    host, port = node[0], int(node[1])
    return Address(host.decode() if host else source.host, port)
