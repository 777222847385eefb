"""Who pays: admission, idempotency, settlement and the availability of Redis.

May import: relay.http, relay.telemetry, licences, config, credits, redis, _util, errors.
"""
