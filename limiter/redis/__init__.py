"""One connection to any Redis: single, TLS, Sentinel, Cluster or embedded.

May import: _util, errors.
"""
