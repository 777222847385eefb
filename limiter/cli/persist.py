"""`limiter persist`: the persister by itself."""

import typer

from limiter._util.stop_signals import on_stop_signal
from limiter.backup.persister import make_persister
from limiter.bootstrap import open_session
from limiter.cli._console import ERRORS, OUT, ConfigOption, RedisOption, log_as, run, settings_of
from limiter.config.settings import Settings
from limiter.errors import SettingsError


def persist(redis: RedisOption = None, config: ConfigOption = None) -> None:
    """Dump every row to persister.file, every interval, until Ctrl-C or SIGTERM; then once more.

    Of several, in relays or by themselves, one writes, and the others stand by to take over when it is gone.
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
    async with open_session(settings) as session:
        persister = make_persister(session, settings.persister)
        on_stop_signal(persister.stop)
        OUT.print(f"limiter: dumping to {settings.persister.file} every {settings.persister.interval_s:g} s")
        await persister.run()
        return persister.last_error
