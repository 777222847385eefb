"""Helpers that the commands share: the two consoles, common options, and reading the settings."""

import os
import shutil
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any, TypeVar

import orjson
import typer
import uvloop
from rich.console import Console
from rich.table import Table

from limiter.config.loader import load_settings
from limiter.config.settings import Settings, Values
from limiter.log_config import set_up_logging
from limiter.redis.url import passwords_of

T = TypeVar("T")
OUT = Console(highlight=False)
ERRORS = Console(stderr=True, highlight=False)
_TABLE_WIDTH = 120

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", metavar="FILE", help="Settings in TOML; by default ./limiter.toml, if it exists."),
]
RedisOption = Annotated[
    str | None,
    typer.Option("--redis", metavar="URL", help="redis[s]://, redis+sentinel://, redis+cluster://, embedded:FOLDER …"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def read_settings(config: Path | None, *, redis: str | None = None, **sections: Values) -> Settings:
    """Return the settings, overridden by the options of the command line; an option that is None was not given."""
    options = {
        name: {key: value for key, value in section.items() if value is not None} for name, section in sections.items()
    }
    if redis is not None:
        options["redis"] = {"url": redis}
    return load_settings(config, {name: section for name, section in options.items() if section})[0]


def configure_logging(settings: Settings) -> None:
    """Configure the log of a long-running command, which masks the secrets of the settings."""
    backends = settings.backends
    secrets = [key.get_secret_value() for key in (backends.gemini.api_key, backends.hardware.api_key)]
    secrets += passwords_of(settings.redis.url)
    logs = settings.logs
    set_up_logging(
        level=logs.level,
        style=logs.format,
        hide=secrets,
        events_per_s=logs.events_per_s,
        requests_per_s=logs.requests_per_s,
    )


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine of a command on uvloop."""
    return uvloop.run(main)


def print_json(document: object) -> None:
    """Print a document as JSON."""
    typer.echo(orjson.dumps(document, option=orjson.OPT_INDENT_2).decode())


def print_table(table: Table) -> None:
    """Print a table without cutting values off, so that they can be copied; a narrow terminal wraps its lines."""
    Console(highlight=False, width=max(OUT.width, _TABLE_WIDTH)).print(table)


def program_name() -> str:
    """Return the command as it is typed in the current folder."""
    path = Path(sys.argv[0]).absolute()
    if shutil.which("limiter") == str(path) or not path.is_file():
        return "limiter"
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
