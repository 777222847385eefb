"""The error object, headers and the handling of connections. It knows no credits logic.

Begin with `problems.Problem`, `request_record.RequestRecord`, `connection.RelayRunner`.

May import: credits.models, _util, errors.
"""
