"""A relay process, its supervisor and its workers.

Begin with `relay_process.serve`, `supervisor.supervise`.

May import: relay.app, relay.upstream, relay.telemetry, backup, bootstrap, config, credits, _util, errors, log_events.
"""
