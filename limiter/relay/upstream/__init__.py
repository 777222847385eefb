"""Calls to the backends: client, circuit breaker and transport.

Begin with `client.BackendClient`, `response.BackendResponse`, `circuit_breaker.CircuitBreaker`.

May import: relay.http, credits.models, _util, errors, log_events.
"""
