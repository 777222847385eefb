"""The persister inside `limiter serve`: a process of its own, so that a dump takes no time from requests.

On the relay's own loop, a dump delayed timers by tens of milliseconds; in a thread by hardly less, as threads share the
GIL; in a process of its own by next to nothing. This module starts the process, reads its reports from a pipe, and
restarts it when it exits. The child ends when its standard input is closed: with its parent, however that one ends, but
not before one last dump.
"""

import asyncio
import contextlib
import logging
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import orjson
import uvloop

from limiter._util.backoff import Backoff
from limiter._util.stop_signals import on_stop_signal
from limiter.backup.persister import make_persister
from limiter.bootstrap import open_session
from limiter.config.settings import Settings
from limiter.errors import LimiterError
from limiter.log_config import set_up_logging
from limiter.log_events import event

_LOG = logging.getLogger("limiter")


class PersisterProcess:
    """A persister in a child process: `async with PersisterProcess(settings):`, which waits for the last dump."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._report: Mapping[str, object] = {"file": settings.persister.file, "role": "starting"}
        self._process: Process | None = None
        self._stopped = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._keep())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._end_input()
        if self._task is not None:
            await self._task

    def report(self) -> Mapping[str, object]:
        """Return the state of the dumps, as `Persister.report` does."""
        return self._report

    @property
    def last_good_at(self) -> str | None:
        """The time of the last good dump; None if there is none."""
        at = self._report.get("last_good_at")
        return at if isinstance(at, str) else None

    async def _keep(self) -> None:
        """Keep a child running until `stop` is called."""
        backoff = Backoff(first_s=0.5, max_s=15.0)
        while True:
            try:
                reported, code = await self._run()
                ended = f"exited with code {code}"
            except OSError as error:  # as without files, or memory, for another process
                reported, code, ended = False, None, f"could not be started ({error})"
            if self._stopped.is_set():
                return
            if reported:
                backoff.reset()
            pause_s = backoff.next_s()
            problem = f"The persister's process {ended}: another starts in {pause_s:g} s"
            _LOG.error("%s", problem, extra=event("persister_exited", code=code))
            self._report = {**self._report, "role": "starting", "error": problem}
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._stopped.wait()
                    return

    async def _run(self) -> tuple[bool, int]:
        """Run a child until it exits. Return whether it ever reported, and its exit code."""
        # In a session of its own: a Ctrl-C is for the relay, which ends the child after its requests are settled.
        process = self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            "-m",
            "limiter.backup.persister_process",
            stdin=PIPE,
            stdout=PIPE,
            start_new_session=True,
        )
        assert process.stdin  # noqa: S101  it is a pipe
        assert process.stdout  # noqa: S101
        with contextlib.suppress(ConnectionError):
            process.stdin.write(_packed(self._settings) + b"\n")
            await process.stdin.drain()
        if self._stopped.is_set():
            self._end_input()
        reported = False
        async for line in process.stdout:
            self._report, reported = orjson.loads(line), True
        return reported, await process.wait()

    def _end_input(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()


def _packed(settings: Settings) -> bytes:
    """Return the settings that the child needs. They are not on its command line, where other users could read them."""
    logs = settings.logs.model_dump(include={"level", "format", "events_per_s"})
    tiers = {name: tier.model_dump(exclude_none=True) for name, tier in settings.tiers.items()}
    sections = {
        "redis": settings.redis.model_dump(mode="json"),
        "persister": settings.persister.model_dump(mode="json"),
    }
    return orjson.dumps({**sections, "logs": logs, "tiers": tiers})


async def _main(settings: Settings) -> None:
    """Persist until the input ends, and write each new report as a line of JSON."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async with open_session(settings) as session:
        persister = make_persister(session, settings.persister, on_change=_tell)
        on_stop_signal(persister.stop)

        async def stop_with_parent() -> None:
            await reader.read()
            persister.stop()

        watching = asyncio.create_task(stop_with_parent())
        await persister.run()
        watching.cancel()


def _tell(report: Mapping[str, object]) -> None:
    with contextlib.suppress(OSError):  # the parent has exited: the last dump is made all the same
        sys.stdout.buffer.write(orjson.dumps(report) + b"\n")
        sys.stdout.buffer.flush()


def _child() -> None:
    given: Any = {"command_line": orjson.loads(sys.stdin.buffer.readline()), "file": {}}
    settings = Settings(**given)
    set_up_logging(
        level=settings.logs.level,
        style=settings.logs.format,
        hide=[urlsplit(settings.redis.url).password or ""],
        events_per_s=settings.logs.events_per_s,
    )
    try:
        uvloop.run(_main(settings))
    except LimiterError as error:
        _LOG.error("The persister cannot start: %s", error, extra=event("persister_start_failed"))
        sys.exit(1)


if __name__ == "__main__":
    _child()
