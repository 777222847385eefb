"""One connection to any Redis: single, TLS, Sentinel, Cluster or embedded.

Begin with `connect.connect`, `multiplexed.CommandChannel`, `errors.translate_error`, `scan.scan`.

May import: _util, errors, log_events.
"""
