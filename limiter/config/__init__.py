"""The settings: their schema, the sources of their values, and their validation.

Begin with `settings.Settings`, `loader.load_settings`.

May import: credits.models, redis.url, errors.
"""
