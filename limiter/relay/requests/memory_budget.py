"""How much of its clients' bodies this process holds in memory, all together. Each by itself has other limits."""

from types import TracebackType
from typing import Self

from limiter.relay.http.problems import Problem, ProblemRaised


class Reservation:
    """What is held for one request, in bytes, until its `with` block ends."""

    __slots__ = ("_bodies", "_has_ended", "size_b")

    def __init__(self, bodies: "MemoryBudget") -> None:
        self._bodies = bodies
        self._has_ended = False
        self.size_b = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def fits(self, size_b: int) -> bool:
        """Count so many bytes more, if there is room for them and the request is not over."""
        if self._has_ended or self._bodies.held_b + size_b > self._bodies.limit_b:
            return False
        self._bodies.held_b += size_b
        self.size_b += size_b
        return True

    def add(self, size_b: int) -> None:
        """Count so many bytes more. Raises ProblemRaised (503) when there is no room for them."""
        if not self.fits(size_b):
            detail = "The requests that this relay is serving fill the memory it has for them: send this one again."
            raise ProblemRaised(Problem(503, "relay_busy", "Relay busy", detail, retry_after_s=1))

    def give_back(self) -> None:
        """Hold nothing for now."""
        self._bodies.held_b -= self.size_b
        self.size_b = 0

    def end(self) -> None:
        """Hold nothing any more."""
        self.give_back()
        self._has_ended = True


class MemoryBudget:
    """The bodies of all requests under way. held_b: what they are together."""

    __slots__ = ("held_b", "limit_b")

    def __init__(self, limit_b: int) -> None:
        self.limit_b = limit_b
        self.held_b = 0

    def counting(self) -> Reservation:
        """Count what is held for one request, as `with bodies.counting() as reservation:`."""
        return Reservation(self)
