"""The product: reserve, commit, release, debit and balance, each one atomic script.

Begin with `limiter.CreditLimiter`, `session.Session`, `models.Decision`, `scripts.Scripts`, `keys.Keys`.

May import: redis, _util, errors.
"""
