"""The names of log events: stable words to search for and to alert on. docs/reference/log-events.md explains each one.

A line about a single request has its id in `request_id`. Where this package is used as a library, the sentence of an
event is the message of a standard log record, and its name the record's attribute `event`.
"""

from typing import Literal

LogEvent = Literal[
    "relay_started",
    "relay_stopping",
    "worker_exited",
    "worker_start_failed",
    "accept_failed",
    "log_lines_left_out",
    "request_failed",
    "request_over_bound",
    "unexpected_error",
    "backend_failed",
    "backend_refuses_operator",
    "circuit_breaker_opened",
    "circuit_breaker_closed",
    "redis_unavailable",
    "redis_available",
    "redis_out_of_memory",
    "redis_has_memory",
    "redis_probe_failed",
    "revocations_not_read",
    "settlement_failed",
    "settlement_expired",
    "settlement_interrupted",
    "settlement_skipped",
    "redis_server_warning",
    "embedded_server_failed",
    "persister_role_changed",
    "persister_exited",
    "persister_start_failed",
    "dump_failed",
    "dump_incomplete",
    "dump_set_aside",
    "import_waiting",
    "restore_waiting",
    "lease_not_renewed",
    "lease_not_released",
    "redis_protocol_error",
]


def event(name: LogEvent, **fields: object) -> dict[str, object]:
    """Return what a log call takes as `extra`: the event's name and its fields."""
    return {"event": name, **fields}
