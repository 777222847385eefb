"""Runs one relay process: opens what its settings need, serves until a stop signal, closes in reverse order."""

import asyncio
import gc
import logging
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial

from aiohttp import web

from limiter._util.open_files import raise_open_files
from limiter._util.stop_signals import on_stop_signal
from limiter.backup.persister_process import PersisterProcess
from limiter.bootstrap import open_limiter
from limiter.config.settings import BackendSettings, ModelNames, Settings
from limiter.credits.models import Backend
from limiter.log_events import event
from limiter.relay.app import create_app, make_runner
from limiter.relay.process.listeners import open_listeners
from limiter.relay.process.worker_metrics import WorkerSlot, render_all, worker_metrics_served
from limiter.relay.telemetry.metrics import METRICS, METRICS_PAGE, Page
from limiter.relay.upstream.circuit_breaker import CircuitBreaker, RecentInstalls
from limiter.relay.upstream.client import BackendClient, check_no_proxy
from limiter.relay.upstream.echo_server import echo_server

_LOG = logging.getLogger("limiter.relay")
# Python's defaults (700, 10, 10) look for cycles every few requests, and take a fifth of the processor time. Objects
# that are in no cycle are freed at once anyway, and nearly all are.
_CYCLES = (10_000, 20, 20)


@dataclass(frozen=True, slots=True)
class Serving:
    """The report of a relay that has just started."""

    url: str
    echo: bool
    backends: Mapping[str, str]


async def serve(settings: Settings, started: Callable[[Serving], None], slot: WorkerSlot | None = None) -> None:
    """Serve until SIGTERM or SIGINT, then finish the running requests, settle, and dump the rows once more.

    slot: of a worker, which ends with its supervisor, too. Raises SettingsError or LimiterUnavailable if it cannot
    start.
    """
    gc.set_threshold(*_CYCLES)
    raise_open_files()
    "localhost".encode("idna")  # Python's resolver imports this codec, and later there may be no file to open
    stop = asyncio.Event()
    on_stop_signal(stop.set)
    async with AsyncExitStack() as stack:
        limiter = await stack.enter_async_context(open_limiter(settings))
        backends = await stack.enter_async_context(open_backends(settings))
        persister = None
        if settings.persister.file:
            persister = PersisterProcess(settings)
        reports = {} if persister is None else {"persister": persister.report}
        app = create_app(limiter, backends, settings, reports)
        dumping = await stack.enter_async_context(AsyncExitStack())  # it dumps once more after the last request
        if slot is not None:
            render = app[METRICS].render
            page: Page = partial(render_all, slot, render)
            app[METRICS_PAGE] = page
            await stack.enter_async_context(worker_metrics_served(slot, render))
            stack.enter_context(_end_with_supervisor(slot, stop))
        url = await _listen(app, settings, slot, stack)
        if persister is not None:
            await dumping.enter_async_context(persister)
            if slot is not None:
                dumping.push_async_callback(_supervisor_let_go, slot)
            app[METRICS].watch_dumps(lambda: persister.last_good_at)
        labels = {str(name): client.label for name, client in backends.items()}
        started(Serving(url, is_echo(settings), labels))
        _LOG.info("Started", extra=event("relay_started", url=url, backends=labels))
        await stop.wait()
        _LOG.info("Stopping", extra=event("relay_stopping"))


def is_echo(settings: Settings) -> bool:
    """Return whether no backend is set, so that the echo server answers."""
    return not settings.backends.gemini.api_key.get_secret_value() and not settings.backends.hardware.url


@asynccontextmanager
async def open_backends(settings: Settings) -> AsyncIterator[dict[Backend, BackendClient]]:
    """Open the backends that are set; if none is, the echo server as both."""
    gemini, hardware = settings.backends.gemini, settings.backends.hardware
    first_event_s, users = settings.relay.first_event_s, RecentInstalls()
    async with AsyncExitStack() as stack:
        clients: dict[Backend, BackendClient] = {}

        def keep(client: BackendClient) -> None:
            stack.push_async_callback(client.aclose)  # at once: the next one's settings may be refused
            clients[client.name] = client

        if is_echo(settings):
            url = await stack.enter_async_context(echo_server())
            keep(BackendClient("gemini", url, label="echo", timeout_s=gemini.timeout_s))
            keep(BackendClient("hardware", url, label="echo", timeout_s=hardware.timeout_s))
        if gemini.api_key.get_secret_value():
            keep(_client("gemini", gemini, settings.models, first_event_s, users))
        if hardware.url:
            keep(_client("hardware", hardware, settings.models, first_event_s, users))
        yield clients


def _client(
    name: Backend,
    backend: BackendSettings,
    names: Mapping[str, ModelNames],
    first_event_s: float,
    users: RecentInstalls,
) -> BackendClient:
    check_no_proxy(name, backend.url)
    maps = {model: {each: to for each, to in its.model_dump().items() if to} for model, its in names.items()}
    return BackendClient(
        name,
        backend.url,
        api_key=backend.api_key.get_secret_value(),
        connect_s=backend.connect_s,
        timeout_s=backend.timeout_s,
        idle_s=backend.idle_s,
        total_s=backend.total_s,
        first_event_s=first_event_s,
        routes=backend.routes,
        models={model: its[name] for model, its in maps.items() if name in its},
        lacks={model for model, its in maps.items() if its and name not in its},
        breaker=CircuitBreaker(failures=backend.breaker_failures, reset_s=backend.breaker_reset_s, users=users),
        keepalive_s=backend.keepalive_s,
        max_connections=backend.max_connections,
        ca_file=backend.ca_file,
    )


async def _supervisor_let_go(slot: WorkerSlot) -> None:
    """Wait until the supervisor has ended the other workers, or is gone: the last dump has their last commits, too."""
    ended = asyncio.Event()
    with _end_with_supervisor(slot, ended):
        await ended.wait()


@contextmanager
def _end_with_supervisor(slot: WorkerSlot, stop: asyncio.Event) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    loop.add_reader(slot.line, stop.set)  # nothing is ever sent on it: it is readable only at its end
    try:
        yield
    finally:
        loop.remove_reader(slot.line)


async def _listen(app: web.Application, settings: Settings, slot: WorkerSlot | None, stack: AsyncExitStack) -> str:
    relay = settings.relay
    runner = make_runner(app, relay)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    if slot is None:
        await runner.listen(open_listeners(relay.host, relay.port))
    else:
        await runner.listen([socket.socket(fileno=slot.listener)])
    host, port = runner.addresses[0][:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
