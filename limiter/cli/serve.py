"""`limiter serve`: one relay."""

import logging
import shlex
import uuid
from typing import Annotated

import typer

from limiter.cli.terminal import OUT, ConfigOption, RedisOption, program, run, settings_of
from limiter.connection import redacted
from limiter.embedded import folder_of, socket_path
from limiter.keys import Keys
from limiter.relay import serving
from limiter.settings import RedisSettings, Settings


def serve(
    redis: RedisOption = None,
    host: Annotated[str | None, typer.Option(help="The address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="The port; 0 takes a free one.")] = None,
    config: ConfigOption = None,
) -> None:
    """Serve the relay until Ctrl-C or SIGTERM.

    Example: limiter serve --redis redis://localhost:6379/0 --port 8081
    """
    settings = settings_of(config, redis=redis, relay={"host": host, "port": port})
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    run(serving.serve(settings, lambda relay: _announce(settings, relay)))
    OUT.print("limiter: stopped; every row is kept")


def _announce(settings: Settings, relay: serving.Serving) -> None:
    """Say what runs, where the data is, and what to paste."""
    install_id = uuid.uuid4()
    row_key = Keys(settings.redis.prefix).install(str(install_id))
    lines = [f"limiter: serving on {relay.url}"]
    if relay.echo:
        lines.append("  backends   echo (built in): neither backends.gemini.api_key nor backends.hardware.url is set")
    else:
        lines.append("  backends   " + ", ".join(f"{name} at {label}" for name, label in relay.backends.items()))
    folder = folder_of(settings.redis.url)
    if folder is None:
        look = f"redis-cli -u {shlex.quote(redacted(settings.redis.url))} HGETALL {row_key}"
        lines.append(f"  rows       {redacted(settings.redis.url)}")
    else:
        look = f"redis-cli -s {shlex.quote(str(socket_path(folder)))} HGETALL {row_key}"
        lines.append(f"  rows       embedded server, data in {folder.resolve()}")
    lines.append(f"  ledger     {settings.persister.file or 'no file'}, every {settings.persister.interval_s:g} s")
    model = "echo" if relay.echo else next(iter(settings.models), "MODEL")
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello, relay"}}]}}'
    curl = (
        f"curl -s {relay.url}/v1/chat/completions -H 'Content-Type: application/json' -H 'X-Install-Id: {install_id}'"
        f" -d '{body}'"
    )
    by_default = settings.redis.url == RedisSettings().url
    elsewhere = "" if by_default else f" --redis {shlex.quote(redacted(settings.redis.url))}"
    lines += [
        "",
        "Try it (this line works as it is):" if relay.echo else "Try it (with a model of yours):",
        f"  {curl}",
        "Then look at its row:",
        f"  {program()} row {install_id}{elsewhere}",
        f"  {look}",
        "",
        "Ctrl-C stops it.",
    ]
    OUT.print("\n".join(lines), markup=False, soft_wrap=True)
