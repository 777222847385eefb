"""The relay: an OpenAI-compatible aiohttp application that spends an install's credits.

Begin with `app.create_app`. Its packages name what they may import; only `process` knows how the application is run.
"""
