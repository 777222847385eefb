"""Requests over a bound that Redis keeps, the rate or the free leaves: counted, and logged if not enforced."""

import logging
from typing import Literal

from limiter.log_events import event
from limiter.relay.telemetry.metrics import Metrics

_LOG = logging.getLogger("limiter.relay")


class OverBounds:
    """Counts the requests that are over a bound, and logs those that are served all the same.

    enforces: whether the bounds are enforced.
    """

    __slots__ = ("_enforces", "_metrics")

    def __init__(self, metrics: Metrics, *, enforces: bool) -> None:
        self._metrics, self._enforces = metrics, enforces

    def note(self, bound: Literal["rate", "leaves"], request_id: str) -> None:
        """Count a request that is over a bound, and log it unless the bound is enforced."""
        self._metrics.over_bound(bound)
        if not self._enforces:
            _LOG.info(
                "A request is over the bound %s, which is not enforced",
                bound,
                extra=event("request_over_bound", request_id=request_id, bound=bound),
            )
