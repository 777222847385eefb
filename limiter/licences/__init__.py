"""Signed tiers: licence tokens, their keys, and the seats of installs on them.

May import: credits, errors.
"""
