"""`limiter serve --workers N`: one relay process a core on one port, and the supervisor that keeps them running.

The supervisor owns the port and passes signals on; it serves nothing and opens no Redis. Each worker has a listening
socket of its own, among which the kernel spreads the connections; the supervisor keeps them open as well, so that what
waits in the queue of a worker that died is served by the one after it.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import orjson

from limiter._util.backoff import Backoff
from limiter._util.stop_signals import on_stop_signal
from limiter.config.settings import Settings
from limiter.errors import LimiterError
from limiter.log_events import event
from limiter.relay.process.listeners import open_shared_listeners
from limiter.relay.process.relay_process import Serving
from limiter.relay.process.worker_metrics import WorkerSlot

_LOG = logging.getLogger("limiter.relay")
_LONG_LIFE_S = 30.0  # a worker that ran for so long did not fail at its start
_LOG_KEY = "LIMITER_LOGS__KEY"


async def supervise(settings: Settings, started: Callable[[Serving], None]) -> None:
    """Run `relay.workers` workers until SIGTERM or SIGINT; one that exits is restarted, with backoff.

    Raises SettingsError if it cannot listen, LimiterError if the first worker cannot start, which has logged why.
    """
    stop = asyncio.Event()
    on_stop_signal(stop.set)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="limiter-"))
        relay = settings.relay
        count = relay.workers or os.cpu_count() or 1
        listeners = [stack.enter_context(each) for each in open_shared_listeners(relay.host, relay.port, count)]
        environment = dict(os.environ)
        if not settings.logs.key.get_secret_value():
            environment[_LOG_KEY] = secrets.token_hex()  # so that all of them shorten an install id alike
        workers = [
            _Worker(WorkerSlot(number, len(listeners), listener.fileno(), -1, folder), environment)
            for number, listener in enumerate(listeners)
        ]
        keeping: list[asyncio.Task[None]] = []
        try:
            # The first one alone: only it reports wrong settings, and it starts the embedded server for all.
            first = await workers[0].start(stop)
            others = await asyncio.gather(*(worker.start(stop) for worker in workers[1:]))
            if first is None or None in others:
                return
            started(first)
            keeping = [asyncio.create_task(worker.keep(stop)) for worker in workers]
            await stop.wait()
        finally:
            for listener in listeners:
                listener.close()  # or else clients would queue where no process accepts them
            for worker in workers:
                worker.terminate()
            await asyncio.gather(*(worker.end() for worker in workers[1:]))
            await workers[0].end()  # its last dump has the commits of the others
            await asyncio.gather(*keeping)


class _Worker:
    """One place among the workers, and the process that has it."""

    def __init__(self, slot: WorkerSlot, environment: Mapping[str, str]) -> None:
        self._slot, self._environment = slot, environment
        self._process: asyncio.subprocess.Process | None = None
        self._line: socket.socket | None = None
        self._began_s = 0.0
        self._backoff = Backoff(first_s=0.2, max_s=15.0)

    async def start(self, stop: asyncio.Event) -> Serving | None:
        """Start the process, and return its report; None when it was stopped before. Raises LimiterError."""
        self._began_s = time.monotonic()
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            slot = replace(self._slot, line=theirs.fileno())
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                *sys.orig_argv[1:],
                "--worker",
                slot.as_text(),
                pass_fds=(slot.listener, slot.line),
                stdin=subprocess.DEVNULL,
                env=self._environment,
            )
        if self._line is not None:
            self._line.close()
        self._line = ours
        reading = asyncio.create_task(_read_line(ours))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({reading, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not reading.done():
            reading.cancel()
            return None
        if not (text := reading.result()):
            code = await self._ended()
            if stop.is_set():
                return None
            raise LimiterError(f"worker {self._slot.number} did not start (exit code {code})")
        return Serving(**orjson.loads(text))

    async def keep(self, stop: asyncio.Event) -> None:
        """Restart it whenever it has exited, until the supervisor stops."""
        while not stop.is_set():
            code = await self._ended()
            if stop.is_set():
                return
            if time.monotonic() - self._began_s > _LONG_LIFE_S:
                self._backoff.reset()
            pause_s = self._backoff.next_s()
            _LOG.error(
                "Worker %d exited with code %d: another starts in %.1f s",
                self._slot.number,
                code,
                pause_s,
                extra=event("worker_exited", worker=self._slot.number, code=code),
            )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await stop.wait()
                    return
            try:
                await self.start(stop)
            except LimiterError:
                continue  # it has logged why, and the next pause is longer
            except OSError as error:  # as without files, or memory, for another process
                _LOG.error(
                    "Worker %d could not be started: %s",
                    self._slot.number,
                    error,
                    extra=event("worker_start_failed", worker=self._slot.number),
                )

    def terminate(self) -> None:
        """Let it finish its requests, and then exit."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()

    async def end(self) -> None:
        """Let it make its last dump, if it is the one that dumps, and wait until it exits."""
        if self._line is not None:
            self._line.close()
        await self._ended()

    async def _ended(self) -> int:
        return 0 if self._process is None else await self._process.wait()


async def _read_line(line: socket.socket) -> bytes:
    """Read one line from a worker; empty if it exited without writing one."""
    loop = asyncio.get_running_loop()
    text = b""
    while not text.endswith(b"\n"):
        part = await loop.sock_recv(line, 65_536)
        if not part:
            return b""
        text += part
    return text
