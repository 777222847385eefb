"""The backends: client, circuit breaker and transport.

May import: relay.http, credits.models, errors.
"""
