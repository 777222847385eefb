"""The rate limit for requests of one address, in this process alone: whatever they ask, also what is refused."""

import math
import time
from collections import OrderedDict
from collections.abc import Callable

from aiohttp import web

from limiter.relay.http.client_address import ClientAddresses
from limiter.relay.http.problems import Problem, ProblemRaised

_MAX_NETWORKS = 65_536  # remembered


class AddressRateLimit:
    """Limits the rate of requests by GCRA: after a pause, an address can make a minute's requests at once.

    Args:
        per_min: requests a minute of one IPv4 address or IPv6 /56; 0 for any number.
        addresses: of clients, and which of them are exempt; by default none is.
        on_limited: called for each refused request.
    """

    def __init__(
        self,
        per_min: int,
        *,
        addresses: ClientAddresses | None = None,
        on_limited: Callable[[], None] = lambda: None,
    ) -> None:
        self._interval_s = 60 / per_min if per_min else 0.0
        self._burst_s = 60 - self._interval_s
        self._addresses, self._on_limited = addresses or ClientAddresses(), on_limited
        self._busy_until_s: OrderedDict[str, float] = OrderedDict()  # the longest unused first

    def count(self, request: web.Request) -> None:
        """Count a request. Raises ProblemRaised (429)."""
        if not self._interval_s:
            return
        network = self._addresses.limited(request)
        if network is not None and (wait_s := self._wait_s(network, time.monotonic())):
            self._on_limited()
            problem = Problem(
                429,
                "rate_limited",
                "Too many requests",
                "There are too many requests from your network.",
                retry_after_s=math.ceil(wait_s),
            )
            raise ProblemRaised(problem)

    def _wait_s(self, network: str, now_s: float) -> float:
        """Count a request of a network, unless it has to wait: return for how long."""
        busy_until_s = max(self._busy_until_s.get(network, now_s), now_s)
        if (wait_s := busy_until_s - now_s - self._burst_s) > 0:
            return wait_s
        self._busy_until_s[network] = busy_until_s + self._interval_s
        self._busy_until_s.move_to_end(network)
        if len(self._busy_until_s) > _MAX_NETWORKS:
            self._busy_until_s.popitem(last=False)
        return 0.0
