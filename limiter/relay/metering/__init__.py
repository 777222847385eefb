"""The payment for requests: admission, idempotency, settlement and the availability of Redis.

Begin with `admission.Admission`, `idempotency.Idempotency`, `settlement.Settlements`,
`availability.RedisAvailability`.

May import: relay.http, relay.telemetry, licences, config, credits, _util, errors, log_events.
"""
