"""A limit on the memory that this process holds for all its clients together, with a share for each of them.

It is for request bodies, for answers that are held whole, and for what is recorded of others. Each of them has limits
of its own, too.
"""

from collections.abc import Callable
from types import TracebackType
from typing import Self

from limiter._util.fair_share import FairShare, Holders
from limiter.relay.http.problems import Problem, ProblemRaised

SMALL_B = 1 << 16  # of each request this much is always free, so that small requests always find room


class Reservation:
    """The memory reserved for one request, in bytes, until its `with` block ends."""

    __slots__ = ("_budget", "_has_ended", "_holders", "size_b")

    def __init__(self, budget: "MemoryBudget", holders: Holders) -> None:
        self._budget, self._holders = budget, holders
        self._has_ended = False
        self.size_b = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def try_add(self, size_b: int) -> bool:
        """Reserve size_b more bytes and return True, if the client's share allows it and the request has not ended."""
        if self._has_ended:
            return False
        shared_b = _shared(self.size_b + size_b) - _shared(self.size_b)
        if shared_b and not self._budget.share.try_take(self._holders, shared_b):
            self._budget.refused()
            return False
        self._budget.held_b += size_b
        self.size_b += size_b
        return True

    def add(self, size_b: int) -> None:
        """Reserve size_b more bytes. Raises ProblemRaised (503) if the client's share does not allow it."""
        if not self.try_add(size_b):
            detail = "The requests of this client fill its share of the memory of this relay: send this one again."
            raise ProblemRaised(Problem(503, "relay_busy", "Relay busy", detail, retry_after_s=1))

    def release(self) -> None:
        """Release the reserved memory; more can be reserved afterwards."""
        self._budget.held_b -= self.size_b
        if shared_b := _shared(self.size_b):
            self._budget.share.give_back(self._holders, shared_b)
        self.size_b = 0

    def end(self) -> None:
        """Release the reserved memory for good."""
        self.release()
        self._has_ended = True


class MemoryBudget:
    """The memory for all running requests, of which held_b bytes are reserved.

    limit_b: how many bytes there are beside what is free to each request. refused: called when a share is used up.
    """

    __slots__ = ("held_b", "refused", "share")

    def __init__(self, limit_b: int, refused: Callable[[], None]) -> None:
        self.share, self.refused = FairShare(limit_b), refused
        self.held_b = 0

    def reservation(self, holders: Holders = ()) -> Reservation:
        """Return the reservation of one request, for `with budget.reservation(…) as reservation:`."""
        return Reservation(self, holders)


def _shared(size_b: int) -> int:
    """Return how much of the memory of one request counts against the shares of its holders."""
    return max(0, size_b - SMALL_B)
