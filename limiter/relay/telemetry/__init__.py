"""What is counted and timed, for Prometheus.

May import: relay.upstream, credits.models, _util.
"""
