"""The metrics of a relay process. They decide nothing.

Every label has a bounded set of values: any value that a client or a backend makes up is counted as "other".
"""

import time
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from http import HTTPStatus
from typing import Literal, NamedTuple, get_args

from aiohttp import web
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from limiter import __version__
from limiter._util.timestamps import ms_from_iso
from limiter.credits.models import Backend, DecisionStatus, Reason, SettlementStatus
from limiter.relay.http.acceptor import Limit
from limiter.relay.telemetry.fast_metrics import FastCounter, FastHistogram
from limiter.relay.upstream.circuit_breaker import State as BreakerState
from limiter.relay.upstream.response import Outcome

# leave: the release, or debit, of a hold whose client left; undo: the release of one whose reserve was not answered
SettlementKind = Literal["commit", "release", "leave", "undo"]
# refused: by the backend; left: by the client, while a backend worked for it; unsent: by the client, before that
ReleaseCause = Literal["refused", "failed", "left", "unsent"]
FAILED, GAVE_UP = "FAILED", "GAVE_UP"  # a settlement that failed, or that was not made before its hold expired
UNMETERED = "UNMETERED"  # served from hardware while Redis is unavailable
UNAVAILABLE = "UNAVAILABLE"  # not decided, as Redis is unavailable
OUT_OF_MEMORY = "OUT_OF_MEMORY"  # not decided, as Redis is out of memory
# What became of an answer that was to be kept: too large or broken off, over a budget, or without memory in Redis.
KeepOutcome = Literal["kept", "not_kept", "install_budget", "budget", "out_of_memory"]
METHODS = frozenset({"GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE"})  # any other is counted as "other"
CLIENT_LEFT = 499  # nginx' status for a request whose client did not wait for the answer
_OTHER = "other"
_DECISIONS = frozenset({*DecisionStatus, UNMETERED, UNAVAILABLE, OUT_OF_MEMORY})
_REASONS = frozenset({*Reason, ""})
_OUTCOMES = frozenset({*SettlementStatus, FAILED, GAVE_UP})
_STATUSES = frozenset({*(int(status) for status in HTTPStatus), CLIENT_LEFT})
_BREAKER_STATES: tuple[BreakerState, ...] = get_args(BreakerState)
_DECISION_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 3)
_FIRST_BYTE_BUCKETS_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOTAL_BUCKETS_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Answered(NamedTuple):
    """One finished request. first_byte_s: of a streamed answer, the seconds until its head was sent."""

    method: str
    route: str
    status: int
    total_s: float
    first_byte_s: float | None = None


class Metrics:
    """The metrics of one relay process. `under_way`, the number of running requests, is kept by the access log.

    tiers, routes: the configured names and the patterns of the routes; any other is counted as "other".
    """

    def __init__(self, *, tiers: Iterable[str], routes: Iterable[str]) -> None:
        # Otherwise each counter would have a second series for the time of its creation.
        disable_created_metrics()  # type: ignore[no-untyped-call]  # it has no hints (0.26)
        self._tiers, self._routes = frozenset(tiers), frozenset(routes)
        self.under_way = 0
        self._registry = registry = CollectorRegistry()
        ProcessCollector(namespace="limiter", registry=registry)
        self._requests = FastCounter(
            "limiter_requests", "Finished requests.", ["route", "method", "status"], registry=registry
        )
        in_flight = Gauge("limiter_requests_in_flight", "Requests under way.", registry=registry)
        in_flight.set_function(lambda: self.under_way)
        self._decisions = FastCounter(
            "limiter_decisions", "Decisions on credits.", ["status", "reason", "tier"], registry=registry
        )
        self._from_memory = Counter(
            "limiter_decisions_from_memory", "Decisions made without a call to Redis.", registry=registry
        )
        self._settlements = FastCounter(
            "limiter_settlements", "Finished commits and releases.", ["kind", "outcome"], registry=registry
        )
        self._releases = FastCounter(
            "limiter_releases", "Requests that ended without a commit.", ["cause"], registry=registry
        )
        self._debited = FastCounter("limiter_credits_debited", "Credits debited.", ["backend"], registry=registry)
        self._recorded = FastCounter(
            "limiter_recorded_answers", "Answers that were to be kept for repeats.", ["outcome"], registry=registry
        )
        self._over_bound = FastCounter(
            "limiter_requests_over_bound",
            "Requests over a bound, refused or, with relay.bounds set to log, only counted.",
            ["bound"],
            registry=registry,
        )
        self._shares_used_up = FastCounter(
            "limiter_shares_used_up",
            "Times that a client's share of a relay was used up.",
            ["share"],
            registry=registry,
        )
        self._memory = Gauge(
            "limiter_memory_reserved_bytes", "Memory reserved for bodies and answers.", registry=registry
        )
        self._settling = Gauge(
            "limiter_settlements_in_flight",
            "Commits and releases under way, including those that wait for Redis.",
            registry=registry,
        )
        self._calls = FastCounter(
            "limiter_backend_calls", "Finished calls to a backend.", ["backend", "outcome"], registry=registry
        )
        self._breakers = Gauge(
            "limiter_breaker_state",
            "1 for the current state of a backend's circuit breaker, 0 for the others.",
            ["backend", "state"],
            registry=registry,
        )
        self._clients = Gauge("limiter_client_connections", "Open connections of clients.", registry=registry)
        self._refused_connections = FastCounter(
            "limiter_connections_refused",
            "Connections of clients that exceeded a limit.",
            ["limit"],
            registry=registry,
        )
        self._address_limited = Counter(
            "limiter_address_rate_limited",
            "Requests that were refused as their address made too many.",
            registry=registry,
        )
        self._to_backends = Gauge(
            "limiter_backend_connections", "Open connections to a backend.", ["backend"], registry=registry
        )
        self._redis_up = Gauge(
            "limiter_redis_up", "1 while Redis is available for decisions, else 0.", registry=registry
        )
        self._redis_out_of_memory = Gauge(
            "limiter_redis_out_of_memory",
            "1 while Redis refuses decisions for want of memory, else 0.",
            registry=registry,
        )
        self._dump_age_s = Gauge(
            "limiter_dump_age_seconds", "Age of the last good credits.json; NaN before the first.", registry=registry
        )
        self._decision_s = FastHistogram(
            "limiter_decision_seconds",
            "Duration of a decision, including the round trip to Redis.",
            [],
            _DECISION_BUCKETS_S,
            registry=registry,
        )
        self._first_byte_s = FastHistogram(
            "limiter_first_byte_seconds",
            "Time to the first byte of a streamed answer.",
            ["route"],
            _FIRST_BYTE_BUCKETS_S,
            registry=registry,
        )
        self._total_s = FastHistogram(
            "limiter_request_seconds",
            "Duration of a request, to the end of its answer.",
            ["route"],
            _TOTAL_BUCKETS_S,
            registry=registry,
        )
        Gauge("limiter_build_info", "1, with the version.", ["version"], registry=registry).labels(__version__).set(1)

    def answered(self, request: Answered) -> None:
        """Count a finished request."""
        route = request.route if request.route in self._routes else _OTHER
        method = request.method if request.method in METHODS else _OTHER
        status = str(request.status) if request.status in _STATUSES else f"{request.status // 100}xx"
        self._requests.add(route, method, status)
        self._total_s.observe(request.total_s, route)
        if request.first_byte_s is not None:
            self._first_byte_s.observe(request.first_byte_s, route)

    def decided(self, status: str, reason: str | None, tier: str | None, *, from_memory: bool = False) -> None:
        """Count a decision: a `DecisionStatus`, UNMETERED, UNAVAILABLE or OUT_OF_MEMORY."""
        if from_memory:
            self._from_memory.inc()
        self._decisions.add(
            status if status in _DECISIONS else _OTHER,
            known if (known := reason or "") in _REASONS else _OTHER,
            tier if tier in self._tiers else _OTHER,
        )

    def decision_took(self, seconds: float) -> None:
        """Record the duration of a decision that Redis made."""
        self._decision_s.observe(seconds)

    def settled(self, kind: SettlementKind, outcome: str, *, backend: Backend | None = None, credits_: int = 0) -> None:
        """Count a settlement.

        Args:
            kind: commit, release, leave or undo.
            outcome: a `DecisionStatus`, FAILED or GAVE_UP.
            backend: the one that a commit debited.
            credits_: how many credits a commit debited.
        """
        self._settlements.add(kind, outcome if outcome in _OUTCOMES else _OTHER)
        if backend is not None:
            self._debited.add(backend, count=credits_)

    def recorded(self, outcome: KeepOutcome) -> None:
        """Count an answer that was to be kept for repeats."""
        self._recorded.add(outcome)

    def over_bound(self, bound: str) -> None:
        """Count a request that is over a bound."""
        self._over_bound.add(bound)

    def released(self, cause: ReleaseCause) -> None:
        """Count a request that ended without a commit. Of those that were left some are debited all the same."""
        self._releases.add(cause)

    def share_used_up(self, share: Literal["memory", "requests"]) -> None:
        """Count a request that its client's share has no room for."""
        self._shares_used_up.add(share)

    def watch_memory(self, reserved_b: Callable[[], int]) -> None:
        """Show how much memory is reserved for bodies and answers."""
        self._memory.set_function(reserved_b)

    def backend_called(self, backend: Backend, outcome: Outcome) -> None:
        """Count a call to a backend; `refused` is an error answer that is passed to the client."""
        self._calls.add(backend, outcome)

    def watch_settlements(self, under_way: Callable[[], int]) -> None:
        """Show the number of settlements under way, which a function returns."""
        self._settling.set_function(under_way)

    def watch_breaker(self, backend: Backend, state: Callable[[], BreakerState]) -> None:
        """Show the state of a backend's circuit breaker."""

        def is_in(one: BreakerState) -> float:
            return float(state() == one)

        for one in _BREAKER_STATES:
            self._breakers.labels(backend, one).set_function(partial(is_in, one))

    def watch_clients(self, connections: Callable[[], int]) -> None:
        """Show how many connections clients have open."""
        self._clients.set_function(connections)

    def connection_refused(self, limit: Limit) -> None:
        """Count a connection that was refused."""
        self._refused_connections.add(limit)

    def address_limited(self) -> None:
        """Count a request of an address that made too many."""
        self._address_limited.inc()

    def watch_connections(self, backend: Backend, connections: Callable[[], int]) -> None:
        """Show how many connections to a backend are open."""
        self._to_backends.labels(backend).set_function(connections)

    def watch_redis(self, state: Callable[[], str]) -> None:
        """Show whether Redis is available for decisions, or out of memory: a function returns its state."""
        self._redis_up.set_function(lambda: float(state() == "ok"))
        self._redis_out_of_memory.set_function(lambda: float(state() == "out_of_memory"))

    def watch_dumps(self, last_good_at: Callable[[], str | None]) -> None:
        """Show the age of the last good dump, whose time a function returns as ISO text."""

        def age_s() -> float:
            at = last_good_at()
            return float("nan") if at is None else time.time() - ms_from_iso(at) / 1000

        self._dump_age_s.set_function(age_s)

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format 0.0.4."""
        return generate_latest(self._registry)


Page = Callable[[], Awaitable[bytes]]
METRICS = web.AppKey("metrics", Metrics)
METRICS_PAGE: web.AppKey[Callable[[], Awaitable[bytes]]] = web.AppKey(
    "metrics_page"
)  # the metrics of all workers, if there are several


async def show_metrics(request: web.Request) -> web.Response:
    """Serve the metrics, always in one format: the library fails on an unusual `Accept` header (0.26)."""
    page = request.app.get(METRICS_PAGE)
    body = request.app[METRICS].render() if page is None else await page()
    return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})
