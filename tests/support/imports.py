"""Imports for the tests: rows as the old ledger has them, one import, and what Redis holds after it."""

from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from limiter import CreditLimiter
from limiter.backup.importer import ImportReport, import_file
from limiter.credits.scripts import PutMode

Member = dict[str, Any]


def member(**fields: Any) -> Member:
    whole = {
        "tier_snapshot": "pro",
        "lifetime_consumed": 3,
        "lifetime_gemini_consumed": 1,
        "last_renewal_at": "2026-05-04T21:24:54.719Z",
        "anniversary_day": 4,
        "monthly_consumed": 5,
        "monthly_gemini_consumed": 2,
        "last_active_at": "2026-05-10T00:00:00.000Z",
    }
    return whole | fields


def many(count: int) -> dict[str, object]:
    return {f"i-{number}": member(monthly_consumed=number) for number in range(count)}


async def dumps(redis: Redis) -> dict[object, object]:
    """The rows that Redis holds, to the byte."""
    return {key: await redis.dump(key) for key in await redis.keys("*:install:*")}


async def run_import(
    limiter: CreditLimiter, path: Path, mode: PutMode = "create", *, dry_run: bool = False
) -> ImportReport:
    return await import_file(limiter.session, path, mode=mode, dry_run=dry_run)


def counts(report: ImportReport) -> tuple[int, int, int, int]:
    return report.new, report.same, report.changed, report.rejected
