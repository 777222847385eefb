"""The metrics, for Prometheus.

Begin with `metrics.Metrics`.

May import: relay.upstream, credits.models, _util.
"""
