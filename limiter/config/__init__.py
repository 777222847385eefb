"""The settings: what they are, where their values come from, and which are valid.

Begin with `settings.Settings`, `loader.load_settings`.

May import: credits.models, redis.url, errors.
"""
