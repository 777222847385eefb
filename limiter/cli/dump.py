"""`limiter dump`: writes every row to a credits.json, once."""

from pathlib import Path
from typing import Annotated

import typer

from limiter.backup.dump import DumpReport
from limiter.backup.dump import dump as dump_rows
from limiter.bootstrap import open_session
from limiter.cli._console import ERRORS, OUT, ConfigOption, JsonOption, RedisOption, print_json, read_settings, run
from limiter.config.settings import Settings


def dump(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write; an existing file is replaced.")],
    redis: RedisOption = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Write every row to a credits.json. Live holds are not included.

    A FILE that is replaced is kept as FILE.<its time>, up to the latest persister.keep of them; one that limiter did
    not write, or that has many more rows, as FILE.before-<time>. Rows that cannot be read go to FILE.broken.json
    instead, and the exit code is 1.

    Example: limiter dump backup.json --redis redis://localhost:6379/0
    """
    report = run(_dump(read_settings(config, redis=redis), file))
    if json:
        print_json(_document(report))
    else:
        OUT.print(f"{report.rows:,} rows, {report.size_bytes:,} bytes: {report.path}", markup=False, soft_wrap=True)
        if report.unchanged:
            OUT.print("The file had these rows already: nothing was replaced")
        if report.kept is not None:
            OUT.print(f"The replaced file is kept as {report.kept}", markup=False, soft_wrap=True)
    if not report.clean:
        for reason in report.first_broken:
            ERRORS.print(f"left out: {reason}", markup=False, soft_wrap=True)
        ERRORS.print(f"limiter: {report.broken:,} rows are not in the file: see {report.broken_file}", soft_wrap=True)
        raise typer.Exit(1)


async def _dump(settings: Settings, file: Path) -> DumpReport:
    async with open_session(settings) as session:
        return await dump_rows(session, file, keep=settings.persister.keep)


def _document(report: DumpReport) -> dict[str, object]:
    return {
        "file": str(report.path),
        "time": report.time,
        "rows": report.rows,
        "size_bytes": report.size_bytes,
        "checksum": report.checksum,
        "unchanged": report.unchanged,
        "kept": None if report.kept is None else str(report.kept),
        "broken": report.broken,
        "first_broken": list(report.first_broken),
        "broken_file": None if report.broken_file is None else str(report.broken_file),
    }
