"""Rows between Redis and the ledger: import, dump, restore and the persister.

May import: ledger, config, credits, redis, bootstrap, log_config, _util, errors.
"""
