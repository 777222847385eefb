"""The file credits.json: read, write and verify it. It does not use Redis.

Begin with `file.LedgerFile`, `writer.LedgerWriter`, `verify.verify`, `rotation.generations`.

May import: credits.models, credits.keys, _util, errors.
"""
