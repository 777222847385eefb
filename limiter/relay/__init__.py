"""The relay: an OpenAI-compatible aiohttp application that spends an install's credits.

`create_app` is its door, and `runner_of` runs it. Nothing here talks to Redis: `CreditLimiter` and `stores` do.
"""

from limiter.relay.app import create_app, runner_of

__all__ = ["create_app", "runner_of"]
