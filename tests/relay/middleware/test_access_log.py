"""One log line and the metrics of each request, on an app of the tests' own on a real port."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from io import StringIO
from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp import web
from prometheus_client.parser import text_string_to_metric_families

from limiter._util.timestamps import iso_from_ms
from limiter.log_config import set_up_logging, short_names
from limiter.relay.http.handler import Handler
from limiter.relay.http.problems import REQUEST_ID
from limiter.relay.http.request_record import request_record
from limiter.relay.middleware.access_log import add_access_log
from limiter.relay.telemetry.metrics import UNMETERED, Metrics, show_metrics
from tests.support.relay import new_install
from tests.support.wait import eventually

INSTALL = new_install()
SHORT_NAME = short_names("test")
TIERS = ["core", "pro"]
ROUTES = ["/served", "/streamed", "/refused", "/broken", "/slow", "/of/{name}", "/metrics"]


async def served(request: web.Request) -> web.Response:
    facts = request_record(request)
    facts.install_id, facts.tier, facts.status, facts.backend, facts.cost = INSTALL, "core", "ALLOWED", "gemini", 2
    facts.model = "a-model-that-the-client-made-up"
    await request.read()
    return web.Response(text="an answer's body")


async def streamed(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    await asyncio.sleep(0.02)
    await response.write(b"data: 1\n\n")
    return response


async def refused(request: web.Request) -> web.Response:
    facts = request_record(request)
    facts.install_id, facts.tier, facts.status, facts.reason = INSTALL, "gone", "DENIED", "out_of_credits"
    return web.Response(status=402)


async def broken(_request: web.Request) -> web.Response:
    raise ValueError("broken")


async def slow(request: web.Request) -> web.Response:
    request.app[ARRIVED].set()
    await asyncio.Event().wait()
    raise AssertionError


@web.middleware
async def name_request(request: web.Request, handler: Handler) -> web.StreamResponse:
    request[REQUEST_ID] = "request-1"
    return await handler(request)


ARRIVED = web.AppKey("arrived", asyncio.Event)


class Watched:
    """The app on its port, what it has logged, and what it counts."""

    def __init__(self, url: str, log: StringIO, metrics: Metrics, arrived: asyncio.Event) -> None:
        self.url, self.log, self.metrics, self.arrived = url, log, metrics, arrived

    async def get(self, path: str, method: str = "GET", **options: Any) -> str:
        async with aiohttp.ClientSession() as session, session.request(method, self.url + path, **options) as response:
            return await response.text()

    async def line(self) -> dict[str, Any]:
        """Wait for the line of the one request that was made."""
        await eventually(lambda: bool(self.lines()), what="the log line")
        (line,) = self.lines()
        return line

    def lines(self) -> list[dict[str, Any]]:
        return [orjson.loads(line) for line in self.log.getvalue().splitlines() if '"limiter.request"' in line]

    def value(self, name: str, **labels: str) -> float | None:
        """Return the value of a sample, or None if it does not exist."""
        for family in text_string_to_metric_families(self.metrics.render().decode()):
            for sample in family.samples:
                if sample.name == name and sample.labels == labels:
                    return sample.value
        return None


@pytest.fixture
def log() -> Iterator[StringIO]:
    root = logging.getLogger()
    handlers, level, stream = list(root.handlers), root.level, StringIO()
    set_up_logging(stream=stream)
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
async def app(log: StringIO) -> AsyncIterator[Watched]:
    app = web.Application(middlewares=[name_request])
    app[ARRIVED] = asyncio.Event()
    metrics = Metrics(tiers=TIERS, routes=ROUTES)
    for path, handler in zip(ROUTES, (served, streamed, refused, broken, slow, served, show_metrics), strict=True):
        app.router.add_route("GET", path, handler)
    app.router.add_route("POST", "/served", served)
    add_access_log(app, metrics, SHORT_NAME)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield Watched(f"http://127.0.0.1:{runner.addresses[0][1]}", log, metrics, app[ARRIVED])
    await runner.cleanup()


# The line


async def test_request_when_it_has_ended_then_one_line_records_it(app: Watched) -> None:
    await app.get("/served")
    line = await app.line()
    assert line.pop("duration_ms") >= 0
    del line["time"]
    assert line == {
        "level": "info",
        "event": "request",
        "logger": "limiter.request",
        "request_id": "request-1",
        "method": "GET",
        "route": "/served",
        "status": 200,
        "install": SHORT_NAME(INSTALL),
        "tier": "core",
        "decision": "ALLOWED",
        "backend": "gemini",
        "credits": 2,
    }


async def test_request_when_it_is_refused_then_the_line_has_the_reason(app: Watched) -> None:
    await app.get("/refused")
    line = await app.line()
    assert (line["status"], line["decision"], line["reason"]) == (402, "DENIED", "out_of_credits")


async def test_request_when_it_is_logged_then_nothing_that_the_client_wrote_is_in_the_line(app: Watched) -> None:
    headers = {"Authorization": "Bearer secret-licence", "X-Install-Id": INSTALL, "User-Agent": "secret-agent"}
    await app.get("/served?secret=query", "POST", headers=headers, data="secret body")
    await app.line()
    said = app.log.getvalue()
    assert "secret" not in said
    assert INSTALL not in said
    assert "made-up" not in said
    assert "answer's body" not in said


@pytest.mark.parametrize(
    ("method", "path", "route", "status", "logged_method"),
    [
        ("GET", "/secret/path", "unknown", 404, "GET"),
        ("PUT", "/served", "unknown", 405, "PUT"),
        ("GET", "/of/secret", "/of/{name}", 200, "GET"),
        ("PROPFIND", "/served", "unknown", 405, "other"),
    ],
)
async def test_route_when_it_is_logged_then_it_is_the_pattern_and_never_the_path(
    app: Watched, method: str, path: str, route: str, status: int, logged_method: str
) -> None:
    await app.get(path, method)
    line = await app.line()
    assert (line["method"], line["route"], line["status"]) == (logged_method, route, status)
    assert "secret" not in app.log.getvalue().lower()


async def test_stream_when_it_has_ended_then_the_time_of_its_first_byte_is_recorded_separately(app: Watched) -> None:
    await app.get("/streamed")
    line = await app.line()
    assert 0 <= line["first_byte_ms"] < line["duration_ms"]
    assert line["duration_ms"] >= 20


async def test_handler_when_it_breaks_then_its_line_says_500(app: Watched) -> None:
    await app.get("/broken")
    assert (await app.line())["status"] == 500


async def test_client_when_it_leaves_before_the_answer_then_its_line_says_499_and_nothing_is_under_way(
    app: Watched,
) -> None:
    leaving = asyncio.ensure_future(app.get("/slow"))
    await app.arrived.wait()
    assert app.value("limiter_requests_in_flight") == 1
    leaving.cancel()
    assert (await app.line())["status"] == 499
    assert app.value("limiter_requests_in_flight") == 0
    assert app.value("limiter_requests_total", route="/slow", method="GET", status="499") == 1


# The metrics


async def test_requests_when_they_have_ended_then_they_are_counted_and_timed_by_route_and_status(
    app: Watched,
) -> None:
    for path in ("/served", "/served", "/refused", "/streamed"):
        await app.get(path)
    assert app.value("limiter_requests_total", route="/served", method="GET", status="200") == 2
    assert app.value("limiter_requests_total", route="/refused", method="GET", status="402") == 1
    assert app.value("limiter_request_seconds_count", route="/served") == 2
    assert app.value("limiter_first_byte_seconds_count", route="/streamed") == 1
    assert app.value("limiter_first_byte_seconds_count", route="/served") is None


async def test_decisions_when_they_are_made_then_they_are_counted_by_status_reason_and_configured_tier(
    app: Watched,
) -> None:
    await app.get("/served")
    await app.get("/refused")
    app.metrics.decided(UNMETERED, None, "pro")
    assert app.value("limiter_decisions_total", status="ALLOWED", reason="", tier="core") == 1
    assert app.value("limiter_decisions_total", status="DENIED", reason="out_of_credits", tier="other") == 1
    app.metrics.decided("DENIED", "out_of_credits", "core", from_memory=True)
    assert app.value("limiter_decisions_total", status=UNMETERED, reason="", tier="pro") == 1
    assert app.value("limiter_decisions_total", status="DENIED", reason="out_of_credits", tier="core") == 1
    assert app.value("limiter_decisions_from_memory_total") == 1


async def test_labels_when_values_are_unknown_then_they_are_one_series(app: Watched) -> None:
    before = len(app.metrics.render().splitlines())
    for number in range(20):
        await app.get(f"/made/up/{number}", "PROPFIND")
        app.metrics.decided(f"S{number}", f"R{number}", f"T{number}")
        app.metrics.settled("commit", f"O{number}")
    added = len(app.metrics.render().splitlines()) - before
    assert app.value("limiter_requests_total", route="other", method="other", status="404") == 20
    assert app.value("limiter_decisions_total", status="other", reason="other", tier="other") == 20
    assert added < 25, "one histogram's buckets, and a line each"


async def test_metrics_when_requested_then_they_are_in_the_text_format_whatever_is_accepted(
    app: Watched,
) -> None:
    for accept in ("*/*", "text/plain;version=x", "application/openmetrics-text; version=x"):
        async with (
            aiohttp.ClientSession() as session,
            session.get(app.url + "/metrics", headers={"Accept": accept}) as answer,
        ):
            assert answer.status == 200
            assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
            families = {family.name for family in text_string_to_metric_families(await answer.text())}
    assert {"limiter_requests", "limiter_redis_up", "limiter_build_info"} <= families


def test_metrics_when_events_are_recorded_then_they_are_counted() -> None:
    metrics = Metrics(tiers=TIERS, routes=ROUTES)
    app = Watched("", StringIO(), metrics, asyncio.Event())
    metrics.settled("commit", "COMMITTED", backend="gemini", credits_=3)
    metrics.settled("release", "RELEASED")
    metrics.backend_called("hardware", "timeout")
    metrics.decision_took(0.002)
    assert app.value("limiter_settlements_total", kind="commit", outcome="COMMITTED") == 1
    assert app.value("limiter_settlements_total", kind="release", outcome="RELEASED") == 1
    assert app.value("limiter_credits_debited_total", backend="gemini") == 3
    assert app.value("limiter_backend_calls_total", backend="hardware", outcome="timeout") == 1
    assert app.value("limiter_decision_seconds_bucket", le="0.0025") == 1
    assert app.value("limiter_decision_seconds_bucket", le="0.001") == 0


def test_metrics_when_a_state_is_watched_then_each_scrape_shows_it_as_it_is() -> None:
    metrics = Metrics(tiers=TIERS, routes=ROUTES)
    app = Watched("", StringIO(), metrics, asyncio.Event())
    state: dict[str, Any] = {"breaker": "open", "redis": "out_of_memory", "settling": 2, "dumped": None}
    metrics.watch_breaker("gemini", lambda: state["breaker"])
    metrics.watch_redis(lambda: state["redis"])
    metrics.watch_settlements(lambda: state["settling"])
    metrics.watch_dumps(lambda: state["dumped"])
    assert app.value("limiter_breaker_state", backend="gemini", state="open") == 1
    assert app.value("limiter_breaker_state", backend="gemini", state="closed") == 0
    assert (app.value("limiter_redis_up"), app.value("limiter_settlements_in_flight")) == (0, 2)
    assert app.value("limiter_redis_out_of_memory") == 1
    assert (age_s := app.value("limiter_dump_age_seconds")) != age_s, "none yet is NaN"
    state |= {"breaker": "closed", "redis": "ok", "settling": 0, "dumped": iso_from_ms(0)}
    assert app.value("limiter_breaker_state", backend="gemini", state="closed") == 1
    assert (app.value("limiter_redis_up"), app.value("limiter_settlements_in_flight")) == (1, 0)
    assert app.value("limiter_redis_out_of_memory") == 0
    assert (app.value("limiter_dump_age_seconds") or 0) > 1e9
