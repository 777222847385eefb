"""One module per group of routes.

Begin with `metered.serve_json`, `context.Relay`.

May import: relay.http, relay.upstream, relay.telemetry, relay.requests, relay.metering, licences, credits, errors,
_util, log_events.
"""
