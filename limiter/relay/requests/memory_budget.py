"""A limit on the memory that all request bodies of this process take together. Each body has limits of its own, too."""

from types import TracebackType
from typing import Self

from limiter.relay.http.problems import Problem, ProblemRaised


class Reservation:
    """The memory reserved for one request, in bytes, until its `with` block ends."""

    __slots__ = ("_budget", "_has_ended", "size_b")

    def __init__(self, budget: "MemoryBudget") -> None:
        self._budget = budget
        self._has_ended = False
        self.size_b = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def try_add(self, size_b: int) -> bool:
        """Reserve size_b more bytes and return True, if the budget allows it and the request has not ended."""
        if self._has_ended or self._budget.held_b + size_b > self._budget.limit_b:
            return False
        self._budget.held_b += size_b
        self.size_b += size_b
        return True

    def add(self, size_b: int) -> None:
        """Reserve size_b more bytes. Raises ProblemRaised (503) if the budget does not allow it."""
        if not self.try_add(size_b):
            detail = "The requests that this relay is serving fill the memory for their bodies: send this one again."
            raise ProblemRaised(Problem(503, "relay_busy", "Relay busy", detail, retry_after_s=1))

    def release(self) -> None:
        """Release the reserved memory; more can be reserved afterwards."""
        self._budget.held_b -= self.size_b
        self.size_b = 0

    def end(self) -> None:
        """Release the reserved memory for good."""
        self.release()
        self._has_ended = True


class MemoryBudget:
    """The memory for the bodies of all running requests: limit_b bytes, of which held_b are reserved."""

    __slots__ = ("held_b", "limit_b")

    def __init__(self, limit_b: int) -> None:
        self.limit_b = limit_b
        self.held_b = 0

    def reservation(self) -> Reservation:
        """Return the reservation of one request, for `with budget.reservation() as reservation:`."""
        return Reservation(self)
