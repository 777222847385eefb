"""A circuit breaker: a backend that keeps failing is left alone for a while, then tried with one request at a time.

It only counts and remembers; what a failure is, its caller says. No I/O, no tasks.
"""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

State = Literal["closed", "open", "half_open"]
WINDOW_S = 30


class CircuitOpen(Exception):  # noqa: N818  reads as what is the case
    """The backend is left alone. retry_after_s: whole seconds until it may be worth trying."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"not before {retry_after_s} s")
        self.retry_after_s = retry_after_s


@dataclass(slots=True)
class _Second:
    at: int
    good: int = 0
    bad: int = 0


class CircuitBreaker:
    """Opens after `failures` failed calls within WINDOW_S seconds, if they are no fewer than the good ones in it.

    A busy backend that fails now and then stays in use. `failures` of 0: never opens. clock: `() -> seconds`.
    """

    def __init__(self, *, failures: int, reset_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._failures, self._reset_s, self._clock = failures, reset_s, clock
        self._seconds: deque[_Second] = deque()  # at most one for each second of the window
        self._opens_until: float | None = None
        self._probe: Attempt | None = None
        self._period = 0  # attempts from before the last change say nothing about now

    @property
    def state(self) -> State:
        """The state now: `half_open` when the next request, or one that runs, is the probe."""
        if self._opens_until is None:
            return "closed"
        return "half_open" if self._clock() >= self._opens_until else "open"

    def enter(self) -> "Attempt":
        """Begin a call. End it with `Attempt.end`, whatever happens. Raises CircuitOpen."""
        if self._opens_until is None:
            return Attempt(self, self._period)
        wait_s = self._opens_until - self._clock()
        if wait_s > 0 or self._probe is not None:
            raise CircuitOpen(max(1, math.ceil(wait_s)))
        self._probe = Attempt(self, self._period)
        return self._probe

    def _tell(self, attempt: "Attempt", *, good: bool) -> bool:
        """Count a call; tell whether the breaker opened or closed by it, and not whether it stays open."""
        if attempt.period != self._period:
            return False
        if attempt is self._probe:
            self._change(None if good else self._clock() + self._reset_s)
            return good
        now = int(self._clock())
        while self._seconds and self._seconds[0].at <= now - WINDOW_S:
            self._seconds.popleft()
        if not self._seconds or self._seconds[-1].at != now:
            self._seconds.append(_Second(now))
        if good:
            self._seconds[-1].good += 1
            return False
        self._seconds[-1].bad += 1
        bad = sum(second.bad for second in self._seconds)
        opens = 0 < self._failures <= bad and bad >= sum(second.good for second in self._seconds)
        if opens:
            self._change(self._clock() + self._reset_s)
        return opens

    def _change(self, opens_until: float | None) -> None:
        self._opens_until, self._probe = opens_until, None
        self._period += 1
        self._seconds.clear()

    def _leave(self, attempt: "Attempt") -> None:
        if attempt is self._probe:
            self._probe = None  # it told nothing, as when its client left: the next request is the probe


class Attempt:
    """One call. Without `succeed` or `fail` it says nothing about the backend."""

    __slots__ = ("_breaker", "_told", "period")

    def __init__(self, breaker: CircuitBreaker, period: int) -> None:
        self._breaker, self.period, self._told = breaker, period, False

    def succeed(self) -> bool:
        """Tell that the backend works. Gives whether that closed the breaker."""
        return self._tell(good=True)

    def fail(self) -> bool:
        """Tell that the backend failed. Gives whether that opened the breaker."""
        return self._tell(good=False)

    def end(self) -> None:
        """Give the probe's place free, if this was the probe."""
        self._breaker._leave(self)  # noqa: SLF001  one class in two parts

    def _tell(self, *, good: bool) -> bool:
        if self._told:
            return False
        self._told = True
        return self._breaker._tell(self, good=good)  # noqa: SLF001  one class in two parts
