"""`limiter import`, `dump` and `persist`: credits.json in and out."""

import asyncio
import signal
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from limiter.cli.terminal import (
    ERRORS,
    OUT,
    ConfigOption,
    JsonOption,
    RedisOption,
    log_as,
    print_json,
    run,
    settings_of,
)
from limiter.errors import SettingsError
from limiter.importer import ImportReport, import_file
from limiter.importer import Progress as ImportProgress
from limiter.opening import open_limiter
from limiter.persister import DumpReport, Persister
from limiter.persister import dump as dump_rows
from limiter.scripts import PutMode
from limiter.settings import Settings

_PHASES = {"check": "checking the file", "compare": "comparing with Redis", "write": "writing rows"}


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A credits.json, of the old ledger or of limiter.")],
    merge: Annotated[
        bool, typer.Option("--merge", help="Where Redis has the row too: the larger counters, the later period.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Where Redis has the row too: the file's, live holds stay.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would happen; write nothing.")] = False,
    redis: RedisOption = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Bring the rows of a credits.json into Redis.

    The whole file is checked first: one that is broken anywhere changes nothing. Rows that cannot be used go to
    FILE.rejected.json with their reasons, the others are in, and the exit code is 1. Without --merge or --replace,
    Redis must have no rows but those of this very file, as a repeat finds them; rows that only Redis has always stay.

    Example: limiter import old-credits.json --redis redis://localhost:6379/0
    """
    if merge and replace:
        raise typer.BadParameter("give --merge or --replace, not both")
    mode: PutMode = "merge" if merge else "replace" if replace else "create"
    report = run(_import(settings_of(config, redis=redis), file, mode, dry_run=dry_run))
    if json:
        print_json(_import_document(report))
    else:
        _print_import(report)
    if report.rejected:
        raise typer.Exit(1)


async def _import(settings: Settings, file: Path, mode: PutMode, *, dry_run: bool) -> ImportReport:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rows]} rows"))
    async with open_limiter(settings) as limiter:
        times = (TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, *times, console=ERRORS, transient=True, disable=not ERRORS.is_terminal) as bars:
            tasks = {phase: bars.add_task(text, rows=0, visible=False) for phase, text in _PHASES.items()}

            def show(done: ImportProgress) -> None:
                bars.update(
                    tasks[done.phase],
                    completed=done.read_bytes,
                    total=done.size_bytes,
                    rows=f"{done.rows:,}",
                    visible=True,
                )

            return await import_file(limiter, file, mode=mode, dry_run=dry_run, on_progress=show)


def _import_document(report: ImportReport) -> dict[str, object]:
    return {
        "total": report.total,
        "new": report.new,
        "same": report.same,
        "changed": report.changed,
        "rejected": report.rejected,
        "first_rejected": [{"install_id": row.install_id, "reason": row.reason} for row in report.first_rejected],
        "rejected_file": None if report.rejected_file is None else str(report.rejected_file),
        "dry_run": report.dry_run,
    }


def _print_import(report: ImportReport) -> None:
    table = Table("rows", "of which new", "same", "changed", "rejected", box=None, pad_edge=False)
    table.add_row(*(f"{n:,}" for n in (report.total, report.new, report.same, report.changed, report.rejected)))
    OUT.print(table)
    if report.dry_run:
        OUT.print("\nThis was a dry run: nothing was written.")
    for row in report.first_rejected:
        ERRORS.print(f"rejected {row.install_id}: {row.reason}", markup=False, soft_wrap=True)
    if report.rejected_file is not None:
        ERRORS.print(f"limiter: {report.rejected:,} rows were rejected: see {report.rejected_file}", soft_wrap=True)


def dump(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write; an existing file is replaced whole.")],
    redis: RedisOption = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Write every row to a credits.json. Live holds are not in it.

    A FILE that has rows which Redis has not is kept beside it. A row that cannot be read is left out and goes to
    FILE.broken.json, and the exit code is 1.

    Example: limiter dump backup.json --redis redis://localhost:6379/0
    """
    report = run(_dump(settings_of(config, redis=redis), file))
    if json:
        print_json(_dump_document(report))
    else:
        OUT.print(f"{report.rows:,} rows, {report.size_bytes:,} bytes: {report.path}", markup=False, soft_wrap=True)
        if report.kept is not None:
            OUT.print(f"It replaced a file with other rows, kept as {report.kept}", markup=False, soft_wrap=True)
    if not report.clean:
        for reason in report.first_broken:
            ERRORS.print(f"left out: {reason}", markup=False, soft_wrap=True)
        ERRORS.print(f"limiter: {report.broken:,} rows are not in the file: see {report.broken_file}", soft_wrap=True)
        raise typer.Exit(1)


async def _dump(settings: Settings, file: Path) -> DumpReport:
    async with open_limiter(settings) as limiter:
        return await dump_rows(limiter, file)


def _dump_document(report: DumpReport) -> dict[str, object]:
    return {
        "file": str(report.path),
        "time": report.time,
        "rows": report.rows,
        "size_bytes": report.size_bytes,
        "checksum": report.checksum,
        "kept": None if report.kept is None else str(report.kept),
        "broken": report.broken,
        "first_broken": list(report.first_broken),
        "broken_file": None if report.broken_file is None else str(report.broken_file),
    }


def persist(redis: RedisOption = None, config: ConfigOption = None) -> None:
    """Dump every row to persister.file, every interval, until Ctrl-C or SIGTERM; then once more.

    A relay has this inside: run it by itself where relays have no disk, with their LIMITER_PERSISTER__FILE empty.

    Example: LIMITER_PERSISTER__FILE=/var/lib/limiter/credits.json limiter persist --redis redis://localhost:6379/0
    """
    settings = settings_of(config, redis=redis)
    if not settings.persister.file:
        raise SettingsError("persister.file is empty: say where to write, as LIMITER_PERSISTER__FILE=credits.json")
    log_as(settings)
    failure = run(_persist(settings))
    if failure is not None:
        ERRORS.print(f"limiter: the last dump failed: {failure}", markup=False, soft_wrap=True)
        raise typer.Exit(1)


async def _persist(settings: Settings) -> str | None:
    """Persist until told to stop; give the error of the last dump, if it failed."""
    async with open_limiter(settings) as limiter:
        persister = Persister(limiter, Path(settings.persister.file), interval_s=settings.persister.interval_s)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, persister.stop)
        OUT.print(f"limiter: dumping to {settings.persister.file} every {settings.persister.interval_s:g} s")
        await persister.run()
        return persister.last_error
