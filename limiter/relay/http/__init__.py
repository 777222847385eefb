"""The error object, response headers and the handling of connections, without any logic of credits.

Begin with `problems.Problem`, `request_record.RequestRecord`, `connection.RelayRunner`.

May import: credits.models, _util, errors, log_events.
"""
