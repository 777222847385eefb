"""Around every handler: errors, the access log, CORS.

May import: relay.http, relay.metering, relay.telemetry, credits, errors.
"""
