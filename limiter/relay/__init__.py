"""The relay: an OpenAI-compatible aiohttp application whose requests cost an install credits.

Begin with `app.create_app`. Each package names what it may import; only `process` knows how the application is run.
"""
