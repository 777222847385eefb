"""Middleware around every handler: errors, the access log, CORS.

Begin with `errors.error_middleware`, `access_log.add_access_log`, `cors.add_cors`.

May import: relay.http, relay.metering, relay.telemetry, _util, errors, log_events.
"""
