"""One module per group of routes.

May import: relay.http, relay.upstream, relay.telemetry, relay.requests, relay.metering, licences, credits, errors.
"""
