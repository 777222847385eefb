"""The budgets of the answers that Redis keeps for repeats: one for each install, and one for all.

The budget of all is counted in Redis, and each process takes from it in portions, so that it asks for an answer in
hundreds. An install's answers are counted in Redis where a key names the request, and by each process where only an
SDK's retry could ask for them, as these are small and expire soon: a request without a key costs no call. A count in
Redis is in another slot than the claims, and may be off: by what is kept in the turn of a portion, and by what was
counted and then not kept.
"""

import asyncio
import time
from typing import Literal

from limiter.relay.metering.claims import Claims

Shortage = Literal["install_budget", "budget"]
_PORTION_B = 1 << 20
_PORTIONS = 64  # of a budget, at least: many processes share it
_FULL_S = 1.0  # after a budget had no room, it is not asked for that long
_MAX_INSTALLS = 10_000  # counted by this process


class KeptAnswers:
    """The budgets on one Redis, in bytes; Redis counts together with all other processes.

    Args:
        claims: count in Redis.
        per_install_b: for the answers of one install.
        in_all_b: for those of all installs.
    """

    def __init__(self, claims: Claims, *, per_install_b: int, in_all_b: int) -> None:
        self._claims = claims
        self._per_install_b, self._in_all_b = per_install_b, in_all_b
        self._portion_b = min(_PORTION_B, in_all_b // _PORTIONS)
        self._left_b: dict[int, int] = {}  # of this process's portions, by the time that answers are kept
        self._full_until_s = 0.0
        self._lock = asyncio.Lock()
        self._here_b: dict[str, int] = {}
        self._here_until_s = 0.0

    async def count(self, install_id: str, size_b: int, keep_ms: int, *, has_key: bool) -> Shortage | None:
        """Count an answer that is to be kept, or return the budget that has no room for it.

        Raises LimiterUnavailable, and then it may be counted.
        """
        if not await self._take(size_b, keep_ms):
            return "budget"
        if has_key:
            key = self._claims.keys.kept(install_id)
            fits = await self._claims.count_kept(key, size_b, budget_b=self._per_install_b, keep_ms=keep_ms)
        else:
            fits = self._count_here(install_id, size_b, keep_ms)
        if fits:
            return None
        self._left_b[keep_ms] += size_b
        return "install_budget"

    async def _take(self, size_b: int, keep_ms: int) -> bool:
        """Take an answer's size from this process's portion of the budget of all; if that is used up, get another."""
        async with self._lock:
            if self._left_b.get(keep_ms, 0) < size_b:
                if time.monotonic() < self._full_until_s:
                    return False
                portion_b = max(size_b, self._portion_b)
                if not await self._claims.count_kept(
                    self._claims.keys.kept(), portion_b, budget_b=self._in_all_b, keep_ms=keep_ms
                ):
                    self._full_until_s = time.monotonic() + _FULL_S
                    return False
                self._left_b[keep_ms] = self._left_b.get(keep_ms, 0) + portion_b
            self._left_b[keep_ms] -= size_b
            return True

    def _count_here(self, install_id: str, size_b: int, keep_ms: int) -> bool:
        """Count an answer of an install in this process, in spans as long as such answers are kept."""
        now_s = time.monotonic()
        if now_s >= self._here_until_s or len(self._here_b) >= _MAX_INSTALLS:
            self._here_b.clear()
            self._here_until_s = now_s + keep_ms / 1000
        counted_b = self._here_b.get(install_id, 0) + size_b
        if counted_b > self._per_install_b:
            return False
        self._here_b[install_id] = counted_b
        return True
