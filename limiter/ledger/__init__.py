"""The file credits.json: read, write and verify it. It knows no Redis.

May import: credits.models, credits.keys, _util, errors.
"""
