"""The requests that a process serves at a time, with a share for each client."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from limiter._util.fair_share import FairShare, Holders
from limiter.relay.http.problems import Problem, ProblemRaised

_LEAST = 4  # that an install or an address may run where there are few places


class Places:
    """The places of running requests.

    limit: how many there are; 0 for any number. refused: called for each request that has no place.
    """

    def __init__(self, limit: int, refused: Callable[[], None]) -> None:
        self._share = FairShare(limit, least=_LEAST) if limit else None
        self._refused = refused

    @property
    def taken(self) -> int:
        """How many places are taken."""
        return self._share.taken if self._share is not None else 0

    @contextmanager
    def take(self, holders: Holders) -> Iterator[None]:
        """Take a place within the block. Raises ProblemRaised (503)."""
        if self._share is None:
            yield
            return
        if not self._share.try_take(holders):
            self._refused()
            detail = "This client runs as many requests as its share of this relay: send this one again."
            raise ProblemRaised(Problem(503, "relay_busy", "Relay busy", detail, retry_after_s=1))
        try:
            yield
        finally:
            self._share.give_back(holders)
