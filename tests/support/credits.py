"""What a test of credits says: the tiers of the examples, a clock that the test sets, a row as it stands in Redis."""

from typing import Protocol

from redis.asyncio import Redis

from limiter import CreditLimiter, Tiers

TIERS = Tiers.from_mapping(
    {
        "core": {"lifetime": 50, "gemini_cap": 20},
        "pro": {"monthly": 1000, "gemini_cap": 400},
        "max": {"monthly": None, "gemini_cap": 2000},
    }
)
PATIENCE_MS = 60_000  # for a reply: a busy machine stands still for seconds, and then a repeat would be a REPLAY


class Clock:
    """A clock that the test sets: epoch milliseconds."""

    def __init__(self, now_ms: int) -> None:
        self.now_ms = now_ms

    def __call__(self) -> int:
        return self.now_ms


class LimiterWith(Protocol):
    """The type of the fixture `limiter_with`."""

    def __call__(self, **tiers: dict[str, int | None]) -> CreditLimiter: ...


async def fields_of(redis: Redis, install_id: str) -> dict[str, str]:
    """Return a row's fields as they stand in Redis; none for an unknown install."""
    fields = await redis.hgetall(f"credits:install:{install_id}")
    return {text_of(name): text_of(value) for name, value in fields.items()}


def text_of(word: bytes | str) -> str:
    return word.decode() if isinstance(word, bytes) else word
