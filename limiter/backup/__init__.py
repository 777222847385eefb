"""Rows between Redis and the ledger: import, dump, restore and the persister.

Begin with `importer.import_file`, `dump.dump`, `restore.newest_good`, `persister.Persister`.

May import: ledger, config, credits, redis, bootstrap, log_config, log_events, _util, errors.
"""
