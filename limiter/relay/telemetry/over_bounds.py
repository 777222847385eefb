"""Requests over a bound: counted, and logged if bounds are not enforced."""

import logging
from typing import Literal

from limiter.log_events import event
from limiter.relay.telemetry.metrics import Metrics

_LOG = logging.getLogger("limiter.relay")
BoundName = Literal["models", "max_n", "max_inputs", "max_output_tokens", "rate", "leaves"]


class OverBounds:
    """Counts the requests that are over a bound, and logs those that are served all the same.

    enforces: whether the bounds are enforced.
    """

    __slots__ = ("_metrics", "enforces")

    def __init__(self, metrics: Metrics, *, enforces: bool) -> None:
        self._metrics, self.enforces = metrics, enforces

    def note(self, bound: BoundName, request_id: str) -> None:
        """Count a request that is over a bound, and log it unless the bound is enforced."""
        self._metrics.over_bound(bound)
        if not self.enforces:
            _LOG.info(
                "A request is over the bound %s, which is not enforced",
                bound,
                extra=event("request_over_bound", request_id=request_id, bound=bound),
            )
