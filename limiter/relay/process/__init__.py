"""A relay process, its supervisor and its workers.

May import: relay.app, relay.upstream, relay.telemetry, backup, bootstrap, config, redis, credits, errors.
"""
