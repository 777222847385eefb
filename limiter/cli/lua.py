"""`limiter lua`: the scripts as Redis receives them."""

from typing import Annotated

import typer

from limiter.cli._console import JsonOption, print_json
from limiter.errors import SettingsError
from limiter.redis.lua_source import compose, script_names, summary

app = typer.Typer(help="The Lua scripts as Redis receives them.", no_args_is_help=True)


@app.command()
def names(json: JsonOption = False) -> None:
    """List the scripts, and what each does. Example: limiter lua names"""  # noqa: D400  ends with what to type
    summaries = {name: summary(name) for name in script_names()}
    if json:
        print_json(summaries)
        return
    width = max(map(len, summaries))
    for name, does in summaries.items():
        typer.echo(f"{name:{width}}  {does}")


@app.command()
def show(name: Annotated[str, typer.Argument(help="One of `limiter lua names`.")]) -> None:
    """Print a script with its includes in place, for redis-cli --eval.

    Example: limiter lua show balance > balance.lua
    """
    if name not in script_names():
        raise SettingsError(f"there is no script {name!r}: the scripts are {', '.join(script_names())}")
    typer.echo(compose(name).text, nl=False)


@app.command()
def sha(json: JsonOption = False) -> None:
    """Print the SHA that Redis knows each script by. Example: limiter lua sha"""  # noqa: D400  ends with what to type
    shas = {name: compose(name).sha for name in script_names()}
    if json:
        print_json(shas)
        return
    for name, digest in shas.items():
        typer.echo(f"{digest}  {name}")
