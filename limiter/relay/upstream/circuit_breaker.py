"""A circuit breaker: a backend that keeps failing gets no calls for a while, then one probe at a time.

Its caller decides which calls have failed. No I/O, no tasks.
"""

import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

State = Literal["closed", "open", "half_open"]
WINDOW_S = 30
MIN_INSTALLS = 3  # whose calls fail before it opens, or all where fewer use the relay
MAX_INSTALLS = 1000  # in memory: those that called last


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


class RecentInstalls:
    """The installs that used the relay within WINDOW_S: the last MIN_INSTALLS, as more do not matter."""

    def __init__(self) -> None:
        self._used_s: OrderedDict[str, float] = OrderedDict()

    def note(self, install_id: str, now_s: float) -> None:
        """Note that an install uses the relay."""
        self._used_s[install_id] = now_s
        self._used_s.move_to_end(install_id)
        if len(self._used_s) > MIN_INSTALLS:
            self._used_s.popitem(last=False)

    def count(self, now_s: float) -> int:
        """Return how many there are, up to MIN_INSTALLS."""
        return sum(used_s > now_s - WINDOW_S for used_s in self._used_s.values())


class CircuitBreaker:
    """Opens after `failures` failed calls within WINDOW_S seconds, if at least half of the calls within it failed.

    And if the latest call failed of at least half of the installs that called, and of MIN_INSTALLS of them, or as many
    as use the relay. So a busy backend that fails now and then stays in use, and one install that sends what a backend
    cannot serve does not take it from the others.

    Args:
        failures: how many failed calls open it; 0 for a breaker that never opens.
        reset_s: how long it stays open before a probe, in seconds.
        clock: returns seconds.
        users: those of the relay, which its breakers share.
    """

    def __init__(
        self,
        *,
        failures: int,
        reset_s: float,
        clock: Callable[[], float] = time.monotonic,
        users: "RecentInstalls | None" = None,
    ) -> None:
        self._users = RecentInstalls() if users is None else users
        self._failures, self._reset_s, self._clock = failures, reset_s, clock
        self._seconds: deque[_Second] = deque()  # at most one for each second of the window
        self._latest: OrderedDict[str, tuple[float, bool]] = (
            OrderedDict()
        )  # of an install: when, and whether it was good
        self._failing = 0  # how many of them are not good
        self._failed_probe: str | None = None  # the install of the last failed probe
        self._others_wait = False  # whether another one was refused since
        self._opens_until: float | None = None
        self._probe: Attempt | None = None
        self._period = 0  # attempts that began before the last change of state do not count

    @property
    def state(self) -> State:
        """The current state: `half_open` if the next call, or a running one, is the probe."""
        if self._opens_until is None:
            return "closed"
        return "half_open" if self._clock() >= self._opens_until else "open"

    def enter(self, install_id: str | None) -> "Attempt":
        """Begin a call. End it with `Attempt.end`, whatever happens. Raises CircuitOpen.

        install_id: None for a call of no install, which counts neither way and is no probe.
        """
        attempt = Attempt(self, self._period, install_id)
        if install_id is not None:
            self._users.note(install_id, self._clock())
        if self._opens_until is None:
            return attempt
        wait_s = self._opens_until - self._clock()
        if install_id is None and wait_s <= 0:
            return attempt
        if install_id == self._failed_probe and self._others_wait:
            wait_s += self._reset_s  # theirs is the next probe, or a bad request alone could keep it open
        if wait_s > 0 or self._probe is not None:
            self._others_wait = self._others_wait or install_id not in (None, self._failed_probe)
            raise CircuitOpen(max(1, math.ceil(wait_s)))
        self._probe = attempt
        return attempt

    def _count_late_failure(self, install_id: str | None) -> bool:
        """Count the failure of a call that had succeeded before, and return whether that opened the breaker."""
        return self.state == "closed" and self._record(Attempt(self, self._period, install_id), good=False)

    def _record(self, attempt: "Attempt", *, good: bool) -> bool:
        """Count a call and return whether that opened or closed the breaker; staying open does not count."""
        if attempt.period != self._period or attempt.install_id is None:
            return False
        if attempt is self._probe:
            self._failed_probe, self._others_wait = None if good else attempt.install_id, False
            self._change(None if good else self._clock() + self._reset_s)
            return good
        self._note(attempt.install_id, good=good)
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
        opens = (
            0 < self._failures <= bad
            and bad >= sum(second.good for second in self._seconds)
            and self._failing >= self._users.count(self._clock())
            and self._failing >= len(self._latest) / 2
        )
        if opens:
            self._change(self._clock() + self._reset_s)
        return opens

    def _note(self, install_id: str, *, good: bool) -> None:
        """Note the latest result of an install, and forget those from before the window."""
        now_s, latest = self._clock(), self._latest
        self._failing += (not good) - (install_id in latest and not latest[install_id][1])
        latest[install_id] = (now_s, good)
        latest.move_to_end(install_id)
        while len(latest) > MAX_INSTALLS or next(iter(latest.values()))[0] <= now_s - WINDOW_S:
            _, (_, was_good) = latest.popitem(last=False)
            self._failing -= not was_good

    def _change(self, opens_until: float | None) -> None:
        self._opens_until, self._probe = opens_until, None
        self._period += 1
        self._seconds.clear()
        self._latest.clear()
        self._failing = 0

    def _leave(self, attempt: "Attempt") -> None:
        if attempt is self._probe:
            self._probe = None  # without a result, as when its client left: the next call is the probe


class Attempt:
    """One call. Without `succeed` or `fail` it does not count."""

    __slots__ = ("_breaker", "_is_recorded", "install_id", "period")

    def __init__(self, breaker: CircuitBreaker, period: int, install_id: str | None) -> None:
        self._breaker, self.period, self.install_id, self._is_recorded = breaker, period, install_id, False

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
            return not good and self._breaker._count_late_failure(self.install_id)  # noqa: SLF001  one class in two parts
        self._is_recorded = True
        return self._breaker._record(self, good=good)  # noqa: SLF001  one class in two parts
