"""`limiter persist`: the persister in a process of its own."""

import typer

from limiter._util.stop_signals import on_stop_signal
from limiter.backup.persister import make_persister
from limiter.bootstrap import open_session
from limiter.cli._console import ERRORS, OUT, ConfigOption, RedisOption, configure_logging, read_settings, run
from limiter.config.settings import Settings
from limiter.errors import SettingsError


def persist(redis: RedisOption = None, config: ConfigOption = None) -> None:
    """Dump every row to persister.file at each interval until Ctrl-C or SIGTERM, and then once more.

    Of several persisters one writes, and the others stand by to take over. A relay has a persister of its own: run this
    command where relays have no disk, and set their LIMITER_PERSISTER__FILE to an empty value.

    Example: LIMITER_PERSISTER__FILE=/var/lib/limiter/credits.json limiter persist --redis redis://localhost:6379/0
    """
    settings = read_settings(config, redis=redis)
    if not settings.persister.file:
        raise SettingsError("persister.file is empty: set it, for example LIMITER_PERSISTER__FILE=credits.json")
    configure_logging(settings)
    failure = run(_persist(settings))
    if failure is not None:
        ERRORS.print(f"limiter: the last dump failed: {failure}", markup=False, soft_wrap=True)
        raise typer.Exit(1)


async def _persist(settings: Settings) -> str | None:
    """Persist until stopped; return the error of the last dump, if it failed."""
    async with open_session(settings) as session:
        persister = make_persister(session, settings.persister)
        on_stop_signal(persister.stop)
        OUT.print(f"limiter: dumping to {settings.persister.file} every {settings.persister.interval_s:g} s")
        await persister.run()
        return persister.last_error
