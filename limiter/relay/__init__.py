"""The relay: an OpenAI-compatible aiohttp application that spends an install's credits.

`create_app` is its door, and `make_runner` runs it. Nothing here talks to Redis: `CreditLimiter` and `stores` do.
"""

from limiter.relay.app import create_app, make_runner

__all__ = ["create_app", "make_runner"]
