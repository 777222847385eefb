"""Fast counters and histograms show the same as prometheus-client's own."""

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest

from limiter.relay.telemetry.fast_metrics import FastCounter, FastHistogram

BOUNDS_S = (0.01, 0.5, 1, 30)
SECONDS = (0.0, 0.01, 0.010001, 0.4, 1, 29.9, 30, 31, 1e9)


def pages(*, empty: bool) -> tuple[bytes, bytes]:
    """Count the same on both, and show both."""
    disable_created_metrics()  # type: ignore[no-untyped-call]  # it has no hints (0.26)
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    tally = FastCounter("calls", "Calls.", ["backend", "outcome"], registry=ours)
    counter = Counter("calls", "Calls.", ["backend", "outcome"], registry=theirs)
    times = FastHistogram("of_route_seconds", "Time.", ["route"], BOUNDS_S, registry=ours)
    histogram = Histogram("of_route_seconds", "Time.", ["route"], registry=theirs, buckets=BOUNDS_S)
    all_times = FastHistogram("all_seconds", "Time.", [], BOUNDS_S, registry=ours)
    all_histogram = Histogram("all_seconds", "Time.", registry=theirs, buckets=BOUNDS_S)
    for seconds in () if empty else SECONDS:
        for route in ("/a", '/"odd"\\'):
            times.observe(seconds, route)
            histogram.labels(route).observe(seconds)
        all_times.observe(seconds)
        all_histogram.observe(seconds)
        tally.add("gemini", "served")
        counter.labels("gemini", "served").inc()
        tally.add("hardware", "failed", count=3)
        counter.labels("hardware", "failed").inc(3)
    return generate_latest(ours), generate_latest(theirs)


def test_page_when_nothing_was_counted_then_it_is_the_same_as_prometheus_clients() -> None:
    ours, theirs = pages(empty=True)
    assert ours == theirs


def test_page_when_something_was_counted_then_it_is_the_same_as_prometheus_clients() -> None:
    ours, theirs = pages(empty=False)
    assert b'of_route_seconds_bucket{le="0.01",route="/a"} 2.0\n' in ours
    assert ours == theirs
