"""`limiter import`: loads a credits.json into Redis."""

from pathlib import Path
from typing import Annotated

import typer

from limiter.backup.importer import ImportReport
from limiter.bootstrap import open_session
from limiter.cli._console import ConfigOption, JsonOption, RedisOption, read_settings, run
from limiter.cli.import_progress import import_with_progress, print_report
from limiter.config.settings import Settings
from limiter.credits.scripts import PutMode
from limiter.redis.replication import wait_for_replicas

_MERGE = (
    "A row that Redis has too gets the larger of each counter (the monthly ones from the later period), the tier of "
    "the later activity, and the other members of both. No install gets credits back."
)
_REPLACE = "A row that Redis has too is replaced by the file's: what was spent since is free again. Live holds stay."


def import_(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A credits.json, written by the old ledger or by limiter.")
    ],
    merge: Annotated[bool, typer.Option("--merge", help=_MERGE)] = False,
    replace: Annotated[bool, typer.Option("--replace", help=_REPLACE)] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would happen; write nothing.")] = False,
    redis: RedisOption = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Load the rows of a credits.json into Redis.

    The whole file is checked first: a damaged file changes nothing. Rows that are not valid go to FILE.rejected.json
    with their reasons, the others are imported, and the exit code is 1. Without --merge or --replace, Redis must have
    no rows other than those of this file, from an earlier run; rows that only Redis has always stay. Only one import
    can run at a time. If it is interrupted, run the same command again to complete it.

    Example: limiter import old-credits.json --redis redis://localhost:6379/0
    """
    if merge and replace:
        raise typer.BadParameter("use --merge or --replace, not both")
    mode: PutMode = "merge" if merge else "replace" if replace else "create"
    report = run(_import(read_settings(config, redis=redis), file, mode, dry_run=dry_run, as_json=json))
    if report.rejected:
        raise typer.Exit(1)


async def _import(settings: Settings, file: Path, mode: PutMode, *, dry_run: bool, as_json: bool) -> ImportReport:
    replicas = 0 if dry_run else settings.redis.wait_replicas
    async with open_session(settings) as session, wait_for_replicas(session.redis, replicas):
        report = await import_with_progress(session, file, mode=mode, dry_run=dry_run)
        print_report(report, as_json=as_json)
    return report
