"""Signed tiers: licence tokens, their keys, and the seats of installs on them.

Begin with `tokens.Licences` (verifies), `keys.issue` (signs), `seats.Seats`.

May import: credits, errors.
"""
