"""The project's own commands as real processes: `limiter …` once, `limiter serve` for as long as a test needs it."""

import asyncio
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from limiter.cli.serve import _redis_cli_options

LIMITER = str(Path(sys.executable).with_name("limiter"))


def environment(settings: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment without anybody's settings, and with these."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LIMITER_")}
    return clean | {"COLUMNS": "200", "NO_COLOR": "1"} | dict(settings or {})


def limiter(
    *arguments: str, cwd: Path, settings: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end."""
    return subprocess.run(
        [LIMITER, *arguments],
        cwd=cwd,
        env=environment(settings),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


class Relay:
    """A `limiter serve` process on a free port.

    log: where its log goes, with what it prints if nothing is said. launcher: what starts it, before its own words.
    """

    def __init__(
        self,
        cwd: Path,
        *arguments: str,
        settings: Mapping[str, str] | None = None,
        log: int = subprocess.STDOUT,
        launcher: Sequence[str] = (),
    ) -> None:
        self.process = subprocess.Popen(
            [*launcher, LIMITER, "serve", "--port", "0", *arguments],
            cwd=cwd,
            env=environment(settings),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,  # a Ctrl-C of the test's own is for the tests
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.output: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        self.url = self.wait_for(r"serving on (\S+)")[1]

    def wait_for(self, pattern: str, *, within_s: float = 20.0) -> re.Match[str]:
        """Wait for a line of output."""
        deadline = time.monotonic() + within_s
        for line in self.output:
            if found := re.search(pattern, line):
                return found
        while True:
            try:
                line = self._lines.get(timeout=max(0.01, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no {pattern!r} in:\n{''.join(self.output)}") from None
            self.output.append(line)
            if found := re.search(pattern, line):
                return found
            assert line, f"it ended without {pattern!r}:\n{''.join(self.output)}"

    def rest(self) -> list[str]:
        """Give all its output, once it has ended."""
        while line := self._lines.get(timeout=20):
            self.output.append(line)
        return self.output

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End it as an operator would, and give its exit code."""
        self.process.send_signal(number)
        return self.process.wait(20)

    def kill(self) -> None:
        """End it as a crash would."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(20)

    def _read(self) -> None:
        assert self.process.stdout
        with self.process.stdout:
            for line in self.process.stdout:
                self._lines.put(line)
        self._lines.put("")


async def shown_by_redis_cli(url: str, row_key: str) -> str:
    """Run the line that `limiter serve` prints."""
    line = f"redis-cli {_redis_cli_options(url)} HGETALL {row_key}"
    done = await asyncio.to_thread(subprocess.run, ["sh", "-c", line], capture_output=True, text=True, check=True)
    return done.stdout
