"""Assembles the commands, and turns errors into one line on stderr."""

import sys

import typer

from limiter import __version__
from limiter.cli import config as settings
from limiter.cli import doctor, dump, licence, persist, prune, restore, serve, verify
from limiter.cli import import_ as import_file
from limiter.cli import lua as scripts
from limiter.cli import row as rows
from limiter.cli._console import ERRORS
from limiter.errors import LimiterError

app = typer.Typer(
    name="limiter",
    help="Atomic credits in Redis, and the relay that spends them on metered Gemini or your own hardware.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _version(
    show: bool = typer.Option(False, "--version", help="Print the version.", is_eager=True),
) -> None:
    if show:
        typer.echo(__version__)
        raise typer.Exit


app.command("serve")(serve.serve)
app.command("persist")(persist.persist)
app.command("import")(import_file.import_)
app.command("dump")(dump.dump)
app.command("verify")(verify.verify)
app.command("restore")(restore.restore)
app.command("row")(rows.row)
app.command("prune")(prune.prune)
app.command("doctor")(doctor.doctor)
app.command("config")(settings.config)
app.add_typer(licence.app, name="licence")
app.add_typer(scripts.app, name="lua")


def run() -> None:
    """Run the command of the command line."""
    try:
        app()
    except LimiterError as error:
        ERRORS.print(f"limiter: {error}", soft_wrap=True, highlight=False, markup=False)
        sys.exit(1)
