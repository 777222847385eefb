"""The access log: one line for each request at its end, and its metrics. It changes no response.

The line never contains text that a client wrote: no body, no header, no query string, and in place of the path the
pattern of the route.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping

from aiohttp import web

from limiter.relay.http.handler import Handler
from limiter.relay.http.problems import REQUEST_ID
from limiter.relay.http.request_record import REQUEST_RECORD, RequestRecord, request_record
from limiter.relay.telemetry.metrics import CLIENT_LEFT, METHODS, METRICS, Answered, Metrics

_LOG = logging.getLogger("limiter.request")
_UNKNOWN_ROUTE = "unknown"
_OF_EVERY_RECORD = logging.LogRecord(_LOG.name, logging.INFO, "", 0, "request", None, None).__dict__


def add_access_log(app: web.Application, metrics: Metrics, short_name: Callable[[str], str]) -> None:
    """Log and count the requests of an app, outside of all its other middleware.

    short_name: maps an install id to the name that the log may contain (`limiter.log_config.short_names`).
    """

    @web.middleware
    async def log_request(request: web.Request, handler: Handler) -> web.StreamResponse:
        began_s = time.monotonic()
        request[REQUEST_RECORD] = RequestRecord()
        status = 500  # of an error that no middleware handles
        metrics.under_way += 1
        try:
            response = await handler(request)
        except web.HTTPException as error:
            status = error.status
            raise
        except asyncio.CancelledError:
            status = CLIENT_LEFT
            raise
        else:
            status = response.status
            return response
        finally:
            metrics.under_way -= 1
            _record(request, status, began_s, metrics, short_name)

    async def record_first_byte(request: web.Request, _response: web.StreamResponse) -> None:
        request_record(request).first_byte_s = time.monotonic()

    app[METRICS] = metrics
    app.middlewares.insert(0, log_request)
    app.on_response_prepare.append(record_first_byte)


def _record(
    request: web.Request, status: int, began_s: float, metrics: Metrics, short_name: Callable[[str], str]
) -> None:
    record = request[REQUEST_RECORD]
    resource = request.match_info.route.resource
    # Complete answers are sent after all middleware: only a stream has begun by now.
    first_byte_s = None if record.first_byte_s is None else record.first_byte_s - began_s
    answered = Answered(
        method=request.method if request.method in METHODS else "other",
        route=resource.canonical if resource is not None else _UNKNOWN_ROUTE,
        status=status,
        total_s=time.monotonic() - began_s,
        first_byte_s=first_byte_s,
    )
    metrics.answered(answered)
    if record.status is not None:
        metrics.decided(record.status, record.reason, record.tier, from_memory=record.from_memory)
    if _LOG.isEnabledFor(logging.INFO):
        line = {
            "request_id": request.get(REQUEST_ID),
            "method": answered.method,
            "route": answered.route,
            "status": status,
            "install": short_name(record.install_id) if record.install_id is not None else None,
            "tier": record.tier,
            "decision": record.status,
            "reason": record.reason,
            "backend": record.backend,
            "fell_back": record.fell_back or None,
            "credits": record.cost,
            "duration_ms": _ms(answered.total_s),
            "first_byte_ms": _ms(first_byte_s) if first_byte_s is not None else None,
        }
        _LOG.handle(_log_record({name: value for name, value in line.items() if value is not None}))


def _log_record(fields: Mapping[str, object]) -> logging.LogRecord:
    """Return the record of a line, at half the cost of `Logger.info`: without its caller, which is always this."""
    record = logging.LogRecord.__new__(logging.LogRecord)
    now_s = time.time()
    record.__dict__.update(_OF_EVERY_RECORD, created=now_s, msecs=now_s % 1 * 1000)
    record.__dict__.update(fields)
    return record


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)
