"""Exponential backoff: pauses between attempts, each twice as long as the one before, up to a maximum."""


class Backoff:
    """An exponential backoff; first_s and max_s are the first and the longest pause, in seconds."""

    __slots__ = ("_first_s", "_max_s", "_next_s")

    def __init__(self, *, first_s: float, max_s: float) -> None:
        self._first_s, self._max_s = first_s, max_s
        self._next_s = first_s

    def next_s(self) -> float:
        """Return the pause before the next attempt, in seconds."""
        pause_s = self._next_s
        self._next_s = min(pause_s * 2, self._max_s)
        return pause_s

    def reset(self) -> None:
        """Start over, after a successful attempt."""
        self._next_s = self._first_s
