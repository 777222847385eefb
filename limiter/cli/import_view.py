"""How an import looks while it runs and when it is done; for every command that imports a file."""

from pathlib import Path

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from limiter.cli.terminal import ERRORS, OUT, print_json
from limiter.credit_limiter import CreditLimiter
from limiter.importer import ImportReport, import_file
from limiter.importer import Progress as ImportProgress
from limiter.scripts import PutMode

_PHASES = {"check": "checking the file", "compare": "comparing with Redis", "write": "writing rows"}


async def import_shown(limiter: CreditLimiter, file: Path, *, mode: PutMode, dry_run: bool = False) -> ImportReport:
    """Import a file as `importer.import_file` does, with a progress bar in a terminal."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rows]} rows"))
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


def print_report(report: ImportReport, *, as_json: bool) -> None:
    """Print what an import did: a table and the first reasons, or JSON."""
    if as_json:
        print_json(_document(report))
    else:
        _print(report)


def _document(report: ImportReport) -> dict[str, object]:
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


def _print(report: ImportReport) -> None:
    table = Table("rows", "of which new", "same", "changed", "rejected", box=None, pad_edge=False)
    table.add_row(*(f"{n:,}" for n in (report.total, report.new, report.same, report.changed, report.rejected)))
    OUT.print(table)
    if report.dry_run:
        OUT.print("\nThis was a dry run: nothing was written.")
    for row in report.first_rejected:
        ERRORS.print(f"rejected {row.install_id}: {row.reason}", markup=False, soft_wrap=True)
    if report.rejected_file is not None:
        ERRORS.print(f"limiter: {report.rejected:,} rows were rejected: see {report.rejected_file}", soft_wrap=True)
