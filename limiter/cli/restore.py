"""`limiter restore`: loads the rows of a dump back into Redis."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from limiter._util.timestamps import ms_from_iso
from limiter.backup.importer import ImportReport, import_file
from limiter.backup.restore import exclusive, has_rows, newest_good
from limiter.bootstrap import open_session
from limiter.cli._console import ERRORS, ConfigOption, JsonOption, RedisOption, read_settings, run
from limiter.cli.import_progress import import_with_progress, print_report
from limiter.config.settings import Settings
from limiter.credits.scripts import PutMode
from limiter.errors import LedgerFileError, SettingsError
from limiter.ledger.rotation import set_aside
from limiter.ledger.verify import VerifyReport, verify
from limiter.redis.replication import wait_for_replicas

_UNITS = ((86_400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))


def restore(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FILE]", help="A dump; by default the latest good one at persister.file.", show_default=False
        ),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Where Redis has the row, too: keep the larger counters, the later period.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Where Redis has the row, too: take the file's; live holds stay.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    redis: RedisOption = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Load the rows of a dump back into Redis. Stop all relays and persisters first.

    The file is verified as by `limiter verify`; without FILE, the dumps at persister.file are tried, the latest first.
    Debits since the dump are lost, and the holds with them. Redis must have no rows, unless --merge or --replace
    decides about them. If it is interrupted, run the same command again.

    Example: limiter restore --redis redis://localhost:6379/0
    """
    if merge and replace:
        raise typer.BadParameter("use --merge or --replace, not both")
    settings = read_settings(config, redis=redis)
    found = _choose_dump(file, settings)
    if not yes and not sys.stdin.isatty():
        raise typer.BadParameter("there is no terminal to confirm in: add --yes to restore without confirmation")
    mode: PutMode = "merge" if merge else "replace" if replace else "create"
    run(_refuse_early(settings, found, mode))
    _print(_consequences(found))
    if not yes:  # not within an event loop, where Ctrl-C would have to wait for the answer
        typer.confirm("Restore it?", abort=True, err=True)
    report = run(_restore(settings, found, mode, as_json=json))
    if report.rejected:
        raise typer.Exit(1)


def _choose_dump(file: Path | None, settings: Settings) -> VerifyReport:
    if file is None:
        if not settings.persister.file:
            raise SettingsError("persister.file is empty: name the file, as in limiter restore FILE")
        path = Path(settings.persister.file)
        found = newest_good(path, on_faulty=_pass_over)
        for each in set_aside(path):
            _print(f"{each} was set aside when Redis had fewer rows: to restore it, name it as FILE")
        return found
    found = verify(file)
    if not found.is_good:
        raise LedgerFileError(f"{file} was not restored: {found.faults[0]} (limiter verify {file} lists all faults)")
    return found


def _pass_over(report: VerifyReport) -> None:
    _print(f"{report.path} is skipped: {report.faults[0]}")


async def _refuse_early(settings: Settings, found: VerifyReport, mode: PutMode) -> None:
    """Raise LedgerFileError, before the operator confirms anything, if Redis has other rows already."""
    async with open_session(settings) as session:
        if mode == "create" and await has_rows(session):
            await import_file(
                session, found.path, mode=mode, dry_run=True
            )  # raises, unless it repeats an interrupted run


async def _restore(settings: Settings, found: VerifyReport, mode: PutMode, *, as_json: bool) -> ImportReport:
    async with open_session(settings) as session, wait_for_replicas(session.redis, settings.redis.wait_replicas):
        checksum = found.trailer.checksum if found.trailer is not None else ""
        async with exclusive(session, lease_s=settings.persister.lease_s, checksum=checksum):
            report = await import_with_progress(session, found.path, mode=mode)
        print_report(report, as_json=as_json)
    return report


def _consequences(found: VerifyReport) -> str:
    if found.trailer is None:
        return f"{found.path}: {found.rows:,} rows, not dumped by limiter: the file does not record their time."
    left_out = f" {found.trailer.broken:,} rows of Redis were left out of it." if found.trailer.broken else ""
    return (
        f"{found.path}: {found.rows:,} rows of {found.trailer.time}, {_age(found.trailer.time)} ago.{left_out} "
        "Debits since then are lost, as are new installs; live holds are released."
    )


def _age(at: str) -> str:
    seconds = max(0, int(time.time() - ms_from_iso(at) / 1000))
    size, unit = next(((size, unit) for size, unit in _UNITS if seconds >= 2 * size), _UNITS[-1])
    return f"{seconds // size} {unit}"


def _print(text: str) -> None:
    ERRORS.print(text, markup=False, soft_wrap=True)
