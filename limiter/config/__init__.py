"""The settings: what they are, where their values come from, and which are valid.

May import: credits.models, redis.url, errors.
"""
