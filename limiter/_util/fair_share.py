"""Divides what many clients share, so that none of them takes what another one needs. No I/O.

A client may have no more than what is free: the dynamic threshold by which switches divide their buffers (Choudhury and
Hahne, 1998). A single one has up to half; n of them up to 1/(n+1) each, and as much is left for whoever comes next.
"""

import asyncio
from collections import deque
from collections.abc import Collection

Holders = tuple[str, ...]  # of one request: each of its names, as its install and its address, has a share


class FairShare:
    """A number of units, of which `taken` are in use.

    Args:
        limit: how many there are.
        least: how many a holder may have where they are free, however few that leaves.
    """

    __slots__ = ("_held", "_least", "limit", "taken")

    def __init__(self, limit: int, *, least: int = 0) -> None:
        self.limit, self.taken = limit, 0
        self._least = least
        self._held: dict[str, int] = {}

    def try_take(self, holders: Collection[str], amount: int = 1) -> bool:
        """Take some units and return True, if each holder may have them."""
        taken = self.taken + amount
        most = max(self._least, self.limit - taken)
        if taken > self.limit or any(self._held.get(holder, 0) + amount > most for holder in holders):
            return False
        self.taken = taken
        for holder in holders:
            self._held[holder] = self._held.get(holder, 0) + amount
        return True

    def give_back(self, holders: Collection[str], amount: int = 1) -> None:
        """Give units back that were taken by the same holders."""
        self.taken -= amount
        for holder in holders:
            left = self._held[holder] - amount
            if left:
                self._held[holder] = left
            else:
                del self._held[holder]


class FairSlots:
    """Slots that are waited for. Each holder has its turn, however many requests of another one wait longer."""

    __slots__ = ("_share", "_waiting")

    def __init__(self, limit: int) -> None:
        self._share = FairShare(limit, least=1)
        self._waiting: dict[Holders, deque[asyncio.Future[None]]] = {}  # whose turn is next, is first

    @property
    def taken(self) -> int:
        """How many slots are taken."""
        return self._share.taken

    async def take(self, holders: Holders, ends_s: float) -> None:
        """Take a slot, waiting for one until a time of the loop. Raises TimeoutError."""
        if self._share.try_take(holders):  # who waits may have none of those that are free
            return
        loop = asyncio.get_running_loop()
        turn = loop.create_future()
        queue = self._waiting.setdefault(holders, deque())
        queue.append(turn)
        try:
            async with asyncio.timeout_at(ends_s):
                await turn
        except BaseException:
            if turn.done() and not turn.cancelled():
                self.give_back(holders)
            raise
        finally:
            if turn in queue:
                queue.remove(turn)
            if not queue and self._waiting.get(holders) is queue:
                del self._waiting[holders]

    def give_back(self, holders: Holders) -> None:
        """Give a slot back, to whoever's turn it is."""
        self._share.give_back(holders)
        for waiting in list(self._waiting):
            queue = self._waiting[waiting]
            while queue and queue[0].done():  # it has left
                queue.popleft()
            if queue and self._share.try_take(waiting):
                queue.popleft().set_result(None)
                self._waiting[waiting] = self._waiting.pop(waiting)  # the others come first now
