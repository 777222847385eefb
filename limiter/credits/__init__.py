"""The product: reserve, commit, release, debit and balance, each one atomic script.

May import: redis, _util, errors.
"""
