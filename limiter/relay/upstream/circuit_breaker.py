"""A circuit breaker: a backend that keeps failing gets no calls for a while, then one probe at a time.

Its caller decides which calls have failed. No I/O, no tasks.
"""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

State = Literal["closed", "open", "half_open"]
WINDOW_S = 30


class CircuitOpen(Exception):  # noqa: N818  names the state
    """The breaker is open: no call was made. retry_after_s: whole seconds until the next probe may be allowed."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"not before {retry_after_s} s")
        self.retry_after_s = retry_after_s


@dataclass(slots=True)
class _Second:
    at: int
    good: int = 0
    bad: int = 0


class CircuitBreaker:
    """Opens after `failures` failed calls within WINDOW_S seconds, if at least half of the calls within it failed.

    So a busy backend that fails now and then stays in use.

    Args:
        failures: how many failed calls open it; 0 for a breaker that never opens.
        reset_s: how long it stays open before a probe, in seconds.
        clock: returns seconds.
    """

    def __init__(self, *, failures: int, reset_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._failures, self._reset_s, self._clock = failures, reset_s, clock
        self._seconds: deque[_Second] = deque()  # at most one for each second of the window
        self._opens_until: float | None = None
        self._probe: Attempt | None = None
        self._period = 0  # attempts that began before the last change of state do not count

    @property
    def state(self) -> State:
        """The current state: `half_open` if the next call, or a running one, is the probe."""
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

    def count_failure(self) -> bool:
        """Count the failure of a call that had succeeded before, and return whether that opened the breaker."""
        return self.state == "closed" and self._record(Attempt(self, self._period), good=False)

    def _record(self, attempt: "Attempt", *, good: bool) -> bool:
        """Count a call and return whether that opened or closed the breaker; staying open does not count."""
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
            self._probe = None  # without a result, as when its client left: the next call is the probe


class Attempt:
    """One call. Without `succeed` or `fail` it does not count."""

    __slots__ = ("_breaker", "_is_recorded", "period")

    def __init__(self, breaker: CircuitBreaker, period: int) -> None:
        self._breaker, self.period, self._is_recorded = breaker, period, False

    def succeed(self) -> bool:
        """Record that the call succeeded, and return whether that closed the breaker."""
        return self._record(good=True)

    def fail(self) -> bool:
        """Record that the call failed, be it after it had succeeded, and return whether that opened the breaker."""
        return self._record(good=False)

    def end(self) -> None:
        """End the call: if it was the probe and has no result, the next call is the probe."""
        self._breaker._leave(self)  # noqa: SLF001  one class in two parts

    def _record(self, *, good: bool) -> bool:
        if self._is_recorded:  # it broke off after it had succeeded, maybe long ago
            return not good and self._breaker.count_failure()
        self._is_recorded = True
        return self._breaker._record(self, good=good)  # noqa: SLF001  one class in two parts
