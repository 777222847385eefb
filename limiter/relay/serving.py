"""Runs one relay process from its settings: opens what it needs, serves until told to stop, closes in reverse order."""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from limiter.errors import SettingsError
from limiter.licence import Licences
from limiter.model import Backend
from limiter.opening import open_limiter
from limiter.persister import Persister
from limiter.relay.app import Report, create_app
from limiter.relay.backends import BackendClient
from limiter.relay.echo import echo_server
from limiter.settings import Settings


@dataclass(frozen=True, slots=True)
class Serving:
    """What a relay that has just started says of itself."""

    url: str
    echo: bool
    backends: Mapping[str, str]


async def serve(settings: Settings, started: Callable[[Serving], None]) -> None:
    """Serve until SIGTERM or SIGINT, then finish what runs, settle, and dump the rows once more.

    Raises SettingsError, LimiterUnavailable when it cannot start.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with AsyncExitStack() as stack:
        limiter = await stack.enter_async_context(open_limiter(settings))
        backends = await stack.enter_async_context(open_backends(settings))
        reports: dict[str, Report] = {}
        if settings.persister.file:
            persister = Persister(limiter, Path(settings.persister.file), interval_s=settings.persister.interval_s)
            await stack.enter_async_context(persister)
            reports["persister"] = persister.report
        app = create_app(
            limiter,
            backends,
            licences=Licences(settings.licence.public_keys),
            costs=settings.costs,
            body_limit_mb=settings.relay.body_limit_mb,
            drain_s=settings.relay.drain_s,
            reports=reports,
        )
        url = await _listen(app, settings, stack)
        labels = {str(name): client.label for name, client in backends.items()}
        started(Serving(url, is_echo(settings), labels))
        await stop.wait()


def is_echo(settings: Settings) -> bool:
    """Tell whether no backend is set, so that the echo answers."""
    return not settings.backends.gemini.api_key.get_secret_value() and not settings.backends.hardware.url


@asynccontextmanager
async def open_backends(settings: Settings) -> AsyncIterator[dict[Backend, BackendClient]]:
    """Open the backends that are set; when none is, the echo as both."""
    gemini, hardware = settings.backends.gemini, settings.backends.hardware
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
            keep(
                BackendClient(
                    "gemini",
                    gemini.url,
                    api_key=gemini.api_key.get_secret_value(),
                    timeout_s=gemini.timeout_s,
                    models={name: to.gemini for name, to in settings.models.items() if to.gemini},
                )
            )
        if hardware.url:
            keep(
                BackendClient(
                    "hardware",
                    hardware.url,
                    api_key=hardware.api_key.get_secret_value(),
                    timeout_s=hardware.timeout_s,
                    models={name: to.hardware for name, to in settings.models.items() if to.hardware},
                )
            )
        yield clients


async def _listen(app: web.Application, settings: Settings, stack: AsyncExitStack) -> str:
    relay = settings.relay
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=relay.drain_s)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    try:
        await web.TCPSite(runner, relay.host, relay.port).start()
    except OSError as error:
        raise SettingsError(
            f"cannot listen on {relay.host}:{relay.port}: {error.strerror}; give another --port"
        ) from None
    host, port = runner.addresses[0][:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
