"""The relay: an OpenAI-compatible aiohttp application that spends an install's credits.

`create_app` is its only door. Nothing here talks to Redis: `CreditLimiter` does.
"""

from limiter.relay.app import create_app

__all__ = ["create_app"]
