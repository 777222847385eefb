"""`limiter prune`: deletes the rows of installs that never used a credit."""

from typing import Annotated

import typer

from limiter.backup.prune import DAY_MS, PruneReport, prune_unused
from limiter.bootstrap import open_session
from limiter.cli._console import OUT, ConfigOption, JsonOption, RedisOption, print_json, read_settings, run
from limiter.config.settings import Settings
from limiter.redis.replication import wait_for_replicas


def prune(
    unused_days: Annotated[
        int, typer.Option("--unused-days", min=1, max=36_500, help="Delete rows that were not used for so many days.")
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be deleted; delete nothing.")] = False,
    redis: RedisOption = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Delete the rows of installs that were never debited, hold nothing, and were not used for some time.

    Relays may run meanwhile: each row is looked at again as it is deleted. An install that comes back is a new one. The
    next dump has fewer rows, and knows why.

    Example: limiter prune --unused-days 30 --dry-run
    """
    report = run(_prune(read_settings(config, redis=redis), unused_days, dry_run=dry_run))
    if json:
        print_json({"rows": report.rows, "pruned": report.pruned, "unused_days": unused_days, "dry_run": dry_run})
        return
    what = "would be" if dry_run else "were"
    OUT.print(f"{report.pruned:,} of {report.rows:,} rows {what} deleted.", markup=False)


async def _prune(settings: Settings, unused_days: int, *, dry_run: bool) -> PruneReport:
    replicas = 0 if dry_run else settings.redis.wait_replicas
    async with open_session(settings) as session, wait_for_replicas(session.redis, replicas):
        return await prune_unused(session, unused_ms=unused_days * DAY_MS, dry_run=dry_run)
