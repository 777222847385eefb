"""The metrics, for Prometheus.

Begin with `metrics.Metrics`.

May import: relay.upstream, relay.http, credits.models, _util, log_events.
"""
