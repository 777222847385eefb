"""`limiter import`: a credits.json into Redis."""

from pathlib import Path
from typing import Annotated

import typer

from limiter.backup.importer import ImportReport
from limiter.bootstrap import open_session
from limiter.cli._console import ConfigOption, JsonOption, RedisOption, run, settings_of
from limiter.cli.import_progress import import_shown, print_report
from limiter.config.settings import Settings
from limiter.credits.scripts import PutMode
from limiter.redis.replication import wait_for_replicas

_MERGE = (
    "A row that Redis has too gets the larger of each counter, those of the month from the later period; the tier of "
    "the later activity; the other members of both. Nobody gets credits back."
)
_REPLACE = "A row that Redis has too becomes as in the file: what was spent since is free again. Live holds stay."


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A credits.json, of the old ledger or of limiter.")],
    merge: Annotated[bool, typer.Option("--merge", help=_MERGE)] = False,
    replace: Annotated[bool, typer.Option("--replace", help=_REPLACE)] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would happen; write nothing.")] = False,
    redis: RedisOption = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Bring the rows of a credits.json into Redis.

    The whole file is checked first: one that is broken anywhere changes nothing. Rows that cannot be used go to
    FILE.rejected.json with their reasons, the others are in, and the exit code is 1. Without --merge or --replace,
    Redis must have no rows but those of this very file, as a repeat finds them; rows that only Redis has always stay.
    One import runs at a time. Interrupted anywhere, the same command again completes it.

    Example: limiter import old-credits.json --redis redis://localhost:6379/0
    """
    if merge and replace:
        raise typer.BadParameter("give --merge or --replace, not both")
    mode: PutMode = "merge" if merge else "replace" if replace else "create"
    report = run(_import(settings_of(config, redis=redis), file, mode, dry_run=dry_run, as_json=json))
    if report.rejected:
        raise typer.Exit(1)


async def _import(settings: Settings, file: Path, mode: PutMode, *, dry_run: bool, as_json: bool) -> ImportReport:
    wanted = 0 if dry_run else settings.redis.wait_replicas
    async with open_session(settings) as session, wait_for_replicas(session.redis, wanted):
        report = await import_shown(session, file, mode=mode, dry_run=dry_run)
        print_report(report, as_json=as_json)
    return report
