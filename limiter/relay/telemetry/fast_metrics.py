"""Counters and histograms that cost next to nothing to count up; prometheus-client reads them when it is asked.

Its own take a lock and half a dozen calls for each event (0.26), of which a request has eight. These have no lock: they
are counted up, and read, by one thread.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import accumulate
from math import inf

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.utils import floatToGoString


class FastCounter:
    """A counter for each combination of its labels' values."""

    def __init__(self, name: str, says: str, labels: Sequence[str], *, registry: CollectorRegistry) -> None:
        self._name, self._says, self._labels = name, says, labels
        self._counts: defaultdict[tuple[str, ...], float] = defaultdict(float)
        registry.register(self)

    def add(self, *values: str, count: float = 1) -> None:
        """Count up. values: of the labels, in their order."""
        self._counts[values] += count

    def collect(self) -> Iterable[Metric]:
        """Show it to prometheus-client."""
        family = CounterMetricFamily(self._name, self._says, labels=self._labels)
        for values, count in self._counts.items():
            family.add_metric(values, count)
        yield family


class FastHistogram:
    """A histogram of seconds for each combination of its labels' values. bounds_s: of its buckets, in order."""

    def __init__(
        self, name: str, says: str, labels: Sequence[str], bounds_s: Sequence[float], *, registry: CollectorRegistry
    ) -> None:
        self._name, self._says, self._labels, self._bounds_s = name, says, labels, bounds_s
        self._counts: defaultdict[tuple[str, ...], list[int]] = defaultdict(lambda: [0] * (len(bounds_s) + 1))
        self._sums_s: defaultdict[tuple[str, ...], float] = defaultdict(float)
        if not labels:
            self._counts[()]  # it is there before the first event
        registry.register(self)

    def observe(self, seconds: float, *values: str) -> None:
        """Count one duration. values: of the labels, in their order."""
        self._counts[values][bisect_left(self._bounds_s, seconds)] += 1
        self._sums_s[values] += seconds

    def collect(self) -> Iterable[Metric]:
        """Show it to prometheus-client."""
        names = [floatToGoString(bound_s) for bound_s in (*self._bounds_s, inf)]  # type: ignore[no-untyped-call]  # 0.26
        family = HistogramMetricFamily(self._name, self._says, labels=self._labels)
        for values, counts in self._counts.items():
            buckets = [*zip(names, map(float, accumulate(counts)), strict=True)]
            family.add_metric(values, buckets, self._sums_s[values])
        yield family
