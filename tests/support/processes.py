"""Which processes the tests have left running."""

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class LeftProcess:
    """A process that still runs, or that has ended and was not waited for."""

    pid: int
    folder: Path  # its working directory, which tells whose it was: pytest names it after the test
    command: str

    def __str__(self) -> str:
        return f"{self.pid} in {self.folder}: {self.command}"

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGCONT)
            os.kill(self.pid, signal.SIGKILL)
        with suppress(ChildProcessError):  # not a child of this process
            os.waitpid(self.pid, 0)


def left_processes(folder: Path) -> list[LeftProcess]:
    """Return this process's children, and everybody's whose working directory lies in the folder.

    The latter finds what a child started and left, as an embedded server. Without Linux's /proc nothing is found.
    """
    return [process for pid in _pids() if (process := _left(pid, folder))]


def _pids() -> Iterator[int]:
    with suppress(FileNotFoundError):
        yield from (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())


def _left(pid: int, folder: Path) -> LeftProcess | None:
    own = Path(f"/proc/{pid}")
    try:
        name, _, rest = (own / "stat").read_text().partition("(")[2].rpartition(")")
        state, parent = rest.split()[:2]
        command = (own / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        where = (own / "cwd").readlink() if state != "Z" else Path("-")
        is_child = int(parent) == os.getpid()
        if pid == os.getpid() or not (is_child or where.is_relative_to(folder)):
            return None
    except OSError:  # it has ended meanwhile, or is somebody else's
        return None
    return LeftProcess(pid, where, "ended, but not waited for" if state == "Z" else command or name)
