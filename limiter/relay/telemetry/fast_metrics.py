"""Counters and histograms that are very cheap to increment; prometheus-client collects them at each scrape.

Its own take a lock and half a dozen calls for each event (0.26), of which a request has eight. These have no lock: only
one thread increments and reads them.
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
    """A counter for each combination of label values."""

    def __init__(self, name: str, help_text: str, labels: Sequence[str], *, registry: CollectorRegistry) -> None:
        self._name, self._help_text, self._labels = name, help_text, labels
        self._counts: defaultdict[tuple[str, ...], float] = defaultdict(float)
        registry.register(self)

    def add(self, *values: str, count: float = 1) -> None:
        """Increment the counter. values: those of the labels, in their order."""
        self._counts[values] += count

    def collect(self) -> Iterable[Metric]:
        """Yield the metric to prometheus-client."""
        family = CounterMetricFamily(self._name, self._help_text, labels=self._labels)
        for values, count in self._counts.items():
            family.add_metric(values, count)
        yield family


class FastHistogram:
    """A histogram of seconds for each combination of label values. bounds_s: those of its buckets, ascending."""

    def __init__(
        self,
        name: str,
        help_text: str,
        labels: Sequence[str],
        bounds_s: Sequence[float],
        *,
        registry: CollectorRegistry,
    ) -> None:
        self._name, self._help_text, self._labels, self._bounds_s = name, help_text, labels, bounds_s
        self._counts: defaultdict[tuple[str, ...], list[int]] = defaultdict(lambda: [0] * (len(bounds_s) + 1))
        self._sums_s: defaultdict[tuple[str, ...], float] = defaultdict(float)
        if not labels:
            self._counts[()]  # so that it is shown before the first event
        registry.register(self)

    def observe(self, seconds: float, *values: str) -> None:
        """Record one duration. values: those of the labels, in their order."""
        self._counts[values][bisect_left(self._bounds_s, seconds)] += 1
        self._sums_s[values] += seconds

    def collect(self) -> Iterable[Metric]:
        """Yield the metric to prometheus-client."""
        names = [floatToGoString(bound_s) for bound_s in (*self._bounds_s, inf)]  # type: ignore[no-untyped-call]  # 0.26
        family = HistogramMetricFamily(self._name, self._help_text, labels=self._labels)
        for values, counts in self._counts.items():
            buckets = [*zip(names, map(float, accumulate(counts)), strict=True)]
            family.add_metric(values, buckets, self._sums_s[values])
        yield family
