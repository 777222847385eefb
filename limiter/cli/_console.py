"""What the commands share: the two consoles, options, and reading the settings."""

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
    typer.Option("--config", "-c", metavar="FILE", help="Settings in TOML; without it ./limiter.toml, if there."),
]
RedisOption = Annotated[
    str | None,
    typer.Option("--redis", metavar="URL", help="redis[s]://, redis+sentinel://, redis+cluster://, embedded:FOLDER …"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def settings_of(config: Path | None, *, redis: str | None = None, **sections: Values) -> Settings:
    """Read the settings, with what the command line says on top; what is None there was not said."""
    said = {
        name: {key: value for key, value in section.items() if value is not None} for name, section in sections.items()
    }
    if redis is not None:
        said["redis"] = {"url": redis}
    return load_settings(config, {name: section for name, section in said.items() if section})[0]


def log_as(settings: Settings) -> None:
    """Set up the log of a command that runs on, with the settings' secrets kept out of it."""
    backends = settings.backends
    secrets = [key.get_secret_value() for key in (backends.gemini.api_key, backends.hardware.api_key)]
    secrets += passwords_of(settings.redis.url)
    set_up_logging(level=settings.logs.level, style=settings.logs.format, hide=secrets)


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a command's work on uvloop."""
    return uvloop.run(main)


def print_json(document: object) -> None:
    """Print a document for programs."""
    typer.echo(orjson.dumps(document, option=orjson.OPT_INDENT_2).decode())


def print_table(table: Table) -> None:
    """Print a table whole, for it is copied from: in a narrow terminal its lines run on in the next."""
    Console(highlight=False, width=max(OUT.width, _TABLE_WIDTH)).print(table)


def program() -> str:
    """Give this command as a person here would type it."""
    path = Path(sys.argv[0]).absolute()
    if shutil.which("limiter") == str(path) or not path.is_file():
        return "limiter"
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
