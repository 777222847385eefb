"""`limiter restore`: the rows of a dump back into Redis."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from limiter._util.timestamps import ms_from_iso
from limiter.backup.importer import ImportReport, import_file
from limiter.backup.restore import exclusive, has_rows, newest_good
from limiter.bootstrap import open_session
from limiter.cli._console import ERRORS, ConfigOption, JsonOption, RedisOption, run, settings_of
from limiter.cli.import_progress import import_shown, print_report
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
            metavar="[FILE]", help="A dump. Without it, the latest good one at persister.file.", show_default=False
        ),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Where Redis has the row too: the larger counters, the later period.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Where Redis has the row too: the file's, live holds stay.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    redis: RedisOption = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Bring the rows of a dump back into Redis. Stop all relays and persisters first.

    The file is verified as by `limiter verify`; without FILE, those at persister.file are tried from the latest on.
    What was debited since the dump is lost, and live holds are free again. Redis must have no rows, unless --merge or
    --replace says what becomes of them. Interrupted, it can be repeated.

    Example: limiter restore --redis redis://localhost:6379/0
    """
    if merge and replace:
        raise typer.BadParameter("give --merge or --replace, not both")
    settings = settings_of(config, redis=redis)
    found = _chosen(file, settings)
    if not yes and not sys.stdin.isatty():
        raise typer.BadParameter("there is no terminal to ask in: add --yes to restore without a question")
    mode: PutMode = "merge" if merge else "replace" if replace else "create"
    run(_look(settings, found, mode))
    _say(_what_it_means(found))
    if not yes:  # outside of any event loop, in which Ctrl-C would wait for the answer
        typer.confirm("Restore it?", abort=True, err=True)
    report = run(_restore(settings, found, mode, as_json=json))
    if report.rejected:
        raise typer.Exit(1)


def _chosen(file: Path | None, settings: Settings) -> VerifyReport:
    if file is None:
        if not settings.persister.file:
            raise SettingsError("persister.file is empty: name the file, as in limiter restore FILE")
        path = Path(settings.persister.file)
        found = newest_good(path, passed_over=_pass_over)
        for each in set_aside(path):
            _say(f"{each} was set aside when Redis had fewer rows: to restore that one, name it")
        return found
    found = verify(file)
    if not found.is_good:
        raise LedgerFileError(f"{file} was not restored: {found.faults[0]} (limiter verify {file} tells all)")
    return found


def _pass_over(report: VerifyReport) -> None:
    _say(f"{report.path} is passed over: {report.faults[0]}")


async def _look(settings: Settings, found: VerifyReport, mode: PutMode) -> None:
    """Refuse before anybody is asked. Raises LedgerFileError."""
    async with open_session(settings) as session:
        if mode == "create" and await has_rows(session):
            await import_file(session, found.path, mode=mode, dry_run=True)  # refuses, unless it is a repeat


async def _restore(settings: Settings, found: VerifyReport, mode: PutMode, *, as_json: bool) -> ImportReport:
    async with open_session(settings) as session, wait_for_replicas(session.redis, settings.redis.wait_replicas):
        checksum = found.trailer.checksum if found.trailer is not None else ""
        async with exclusive(session, lease_s=settings.persister.lease_s, checksum=checksum):
            report = await import_shown(session, found.path, mode=mode)
        print_report(report, as_json=as_json)
    return report


def _what_it_means(found: VerifyReport) -> str:
    if found.trailer is None:
        return f"{found.path}: {found.rows:,} rows, not dumped by limiter: it does not say of when they are."
    left_out = f" {found.trailer.broken:,} rows of Redis were left out of it." if found.trailer.broken else ""
    return (
        f"{found.path}: {found.rows:,} rows of {found.trailer.time}, {_age(found.trailer.time)} ago.{left_out} "
        "What was debited since is lost, as are installs that came since; live holds are free again."
    )


def _age(at: str) -> str:
    seconds = max(0, int(time.time() - ms_from_iso(at) / 1000))
    size, unit = next(((size, unit) for size, unit in _UNITS if seconds >= 2 * size), _UNITS[-1])
    return f"{seconds // size} {unit}"


def _say(text: str) -> None:
    ERRORS.print(text, markup=False, soft_wrap=True)
