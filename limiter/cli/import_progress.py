"""The progress and the report of an import, for every command that imports a file."""

import asyncio
import time
from pathlib import Path

from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from limiter.backup.importer import ImportReport, Phase, import_file
from limiter.backup.importer import Progress as ImportProgress
from limiter.cli._console import ERRORS, OUT, print_json
from limiter.credits.scripts import PutMode
from limiter.credits.session import Session

_PHASES: dict[Phase, str] = {
    "check": "checking the file",
    "compare": "comparing with Redis",
    "write": "writing rows",
}
_LINE_EVERY_S = 5.0


async def import_with_progress(session: Session, file: Path, *, mode: PutMode, dry_run: bool = False) -> ImportReport:
    """Import a file like `importer.import_file`, showing a progress bar in a terminal, and lines elsewhere."""
    view = _Bars() if ERRORS.is_terminal else _Lines()
    with view.bars:
        try:
            return await import_file(session, file, mode=mode, dry_run=dry_run, on_progress=view.show)
        except asyncio.CancelledError:
            outcome = "nothing was changed"
            if view.stored is not None:
                outcome = f"at least {view.stored:,} rows are imported, each completely: import the file again"
            view.bars.console.print(f"limiter: interrupted: {outcome}", soft_wrap=True)
            raise


class _View:
    """The state that both views need: when each phase began, and how many rows are stored."""

    def __init__(self, *, is_terminal: bool) -> None:
        columns = (
            *(SpinnerColumn(), TextColumn("{task.description}"), BarColumn()),
            *(TextColumn("{task.fields[rows]} rows"), TextColumn("{task.fields[rate]} rows/s")),
        )
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self.bars = Progress(*columns, *times, console=ERRORS, transient=True, disable=not is_terminal)
        self.stored: int | None = None
        self._began: dict[Phase, float] = {}

    def show(self, done: ImportProgress) -> None:
        """Show how far the import is."""
        if done.phase == "write":
            self.stored = done.rows
        now = time.monotonic()
        passed_s = now - self._began.setdefault(done.phase, now)
        self.show_rate(done, done.rows / passed_s if passed_s else 0.0)

    def show_rate(self, done: ImportProgress, rate: float) -> None:
        raise NotImplementedError


class _Bars(_View):
    def __init__(self) -> None:
        super().__init__(is_terminal=True)
        self._tasks = {
            phase: self.bars.add_task(text, rows="0", rate="0", visible=False) for phase, text in _PHASES.items()
        }

    def show_rate(self, done: ImportProgress, rate: float) -> None:
        self.bars.update(
            self._tasks[done.phase],
            completed=done.read_bytes,
            total=done.size_bytes,
            rows=f"{done.rows:,}",
            rate=f"{rate:,.0f}",
            visible=True,
        )


class _Lines(_View):
    def __init__(self) -> None:
        super().__init__(is_terminal=False)
        self._phase: Phase | None = None
        self._printed_s = 0.0

    def show_rate(self, done: ImportProgress, rate: float) -> None:
        now = time.monotonic()
        if done.phase != self._phase:
            ERRORS.print(f"limiter: {_PHASES[done.phase]}", soft_wrap=True)
        elif now - self._printed_s >= _LINE_EVERY_S and rate and done.read_bytes:
            left_s = (done.size_bytes / done.read_bytes - 1) * done.rows / rate
            share = f"{100 * done.read_bytes / done.size_bytes:.0f} %, {done.rows:,} rows, {rate:,.0f} rows/s"
            ERRORS.print(f"limiter: {_PHASES[done.phase]}: {share}, {left_s:.0f} s left", soft_wrap=True)
        else:
            return
        self._phase, self._printed_s = done.phase, now


def print_report(report: ImportReport, *, as_json: bool) -> None:
    """Print the result of an import: a table and the first reasons, or JSON."""
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
        "faults": report.faults,
        "first_rejected": [{"install_id": row.install_id, "reason": row.reason} for row in report.first_rejected],
        "rejected_file": None if report.rejected_file is None else str(report.rejected_file),
        "dry_run": report.dry_run,
    }


def _print(report: ImportReport) -> None:
    new, changed = ("would be new", "would change") if report.dry_run else ("new", "changed")
    table = Table("rows", new, "same", changed, "rejected", box=None, pad_edge=False)
    table.add_row(*(f"{n:,}" for n in (report.total, report.new, report.same, report.changed, report.rejected)))
    OUT.print(table)
    if report.faults:
        faults = Table("rejected", "why", box=None, pad_edge=False)
        for fault, rows in report.faults.items():
            faults.add_row(f"{rows:,}", escape(fault))
        OUT.print("", faults)
    if report.dry_run:
        OUT.print("\nThis was a dry run: nothing was written.")
    for row in report.first_rejected:
        ERRORS.print(f"rejected: {row.reason}", markup=False, soft_wrap=True)
    if report.rejected_file is not None:
        ERRORS.print(f"limiter: {report.rejected:,} rows were rejected: see {report.rejected_file}", soft_wrap=True)
