"""Signed tiers: licence tokens, their keys, the seats of installs on them, and those that were revoked.

Begin with `tokens.Licences` (verifies), `keys.issue` (signs), `seats.Seats`, `revocations.Revocations`.

May import: credits, errors, log_events, _util.
"""
