"""The error object, headers and the handling of connections. It knows no credits logic.

May import: credits.models, errors.
"""
