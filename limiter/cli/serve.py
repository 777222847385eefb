"""`limiter serve`: runs one relay, or several workers on one port."""

import shlex
import socket
import uuid
from dataclasses import asdict
from typing import Annotated
from urllib.parse import parse_qs, unquote, urlsplit

import orjson
import typer

from limiter.cli._console import OUT, ConfigOption, RedisOption, configure_logging, program_name, read_settings, run
from limiter.config.settings import RedisSettings, Settings
from limiter.credits.keys import Keys
from limiter.redis.embedded import folder_of, socket_path
from limiter.redis.url import parse_url, redacted
from limiter.relay.process import relay_process as serving
from limiter.relay.process.supervisor import supervise
from limiter.relay.process.worker_metrics import WorkerSlot


def serve(
    redis: RedisOption = None,
    host: Annotated[str | None, typer.Option(help="The address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="The port; 0 takes a free one.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes on the port; 0 runs one for each core.")] = None,
    config: ConfigOption = None,
    worker: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Serve the relay until Ctrl-C or SIGTERM.

    Example: limiter serve --redis redis://localhost:6379/0 --port 8081
    """
    settings = read_settings(config, redis=redis, relay={"host": host, "port": port, "workers": workers})
    configure_logging(settings)
    if worker is not None:
        run(_work(settings, WorkerSlot.from_text(worker)))
        return
    same = [] if config is None else ["--config", str(config)]
    if redis is not None or (config is None and settings.redis.url != RedisSettings().url):
        same += ["--redis", redacted(settings.redis.url)]
    serve_it = serving.serve if settings.relay.workers == 1 else supervise
    run(serve_it(settings, lambda relay: _announce(settings, relay, shlex.join(same))))
    OUT.print("limiter: stopped; every row is kept")


async def _work(settings: Settings, slot: WorkerSlot) -> None:
    """Serve as one worker, which reports to its supervisor. Only the first one has a persister."""
    if slot.number:
        settings = settings.model_copy(update={"persister": settings.persister.model_copy(update={"file": ""})})
    with socket.socket(fileno=slot.line) as line:
        await serving.serve(settings, lambda relay: line.sendall(orjson.dumps(asdict(relay)) + b"\n"), slot)


def _announce(settings: Settings, relay: serving.Serving, same: str) -> None:
    """Print what runs, where the data is, and commands to paste. same: the options that select the same rows."""
    install_id = uuid.uuid4()
    row_key = Keys(settings.redis.prefix).install(str(install_id))
    lines = [f"limiter: serving on {relay.url}"]
    if relay.echo:
        lines.append("  backends   echo (built in): neither backends.gemini.api_key nor backends.hardware.url is set")
    else:
        lines.append("  backends   " + ", ".join(f"{name} at {label}" for name, label in relay.backends.items()))
    url = redacted(settings.redis.url)
    folder = folder_of(settings.redis.url)
    lines.append(f"  rows       {url if folder is None else f'embedded server, data in {folder.resolve()}'}")
    persister = settings.persister
    lines.append(
        f"  ledger     {f'{persister.file}, every {persister.interval_s:g} s' if persister.file else 'no file'}"
    )
    model = "echo" if relay.echo else next(iter(settings.models), "MODEL")
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello, relay"}}]}}'
    curl = (
        f"curl -s {relay.url}/v1/chat/completions -H 'Content-Type: application/json' -H 'X-Install-Id: {install_id}'"
        f" -d '{body}'"
    )
    lines += [
        "",
        "Try it (this line works as it is):" if relay.echo else "Try it (with one of your models):",
        f"  {curl}",
        "Then look at its row:" + (" (with the password in place of ***)" if url != settings.redis.url else ""),
        f"  {program_name()} row {install_id} {same}".rstrip(),
        f"  redis-cli {_redis_cli_options(settings.redis.url)} HGETALL {row_key}",
        "",
        "Ctrl-C stops it.",
    ]
    OUT.print("\n".join(lines), markup=False, soft_wrap=True)


def _redis_cli_options(url: str) -> str:
    """Return the options of redis-cli for a server, as redis-cli does not accept every URL."""
    folder = folder_of(url)
    if folder is not None:
        return shlex.join(["-s", str(socket_path(folder))])
    target = parse_url(url)
    if target is not None and target.kind == "cluster":
        return shlex.join(["-c", "-u", redacted(target.url_of(target.seeds[0]))])
    if target is not None:
        seed = target.seeds[0]  # the primary can change: the line looks it up when it is run
        query = shlex.join(["-h", seed.host, "-p", str(seed.port), "SENTINEL", "GET-MASTER-ADDR-BY-NAME", target.name])
        return f"$(redis-cli {query} | xargs printf -- '-h %s -p %s')"
    parts = urlsplit(url)
    if parts.scheme != "unix":
        return shlex.join(["-u", redacted(url)])
    database = parse_qs(parts.query).get("db", ["0"])[0]
    return shlex.join(["-s", unquote(parts.path), "-n", database])
