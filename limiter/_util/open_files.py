"""How many files and sockets this process may have open, and how many connections that allows."""

import resource
from contextlib import suppress

_BESIDE_CONNECTIONS = 128  # Redis, the log, listeners, what a library opens for a moment


def raise_open_files() -> None:
    """Raise the soft limit of open files to the hard one. Where the system refuses, it stays."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # macOS refuses what is more than its own bound
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def open_files(*, hard: bool = False) -> int:
    """Return the soft limit of open files, or the hard one; 0 when there is none."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1 if hard else 0]
    return 0 if limit == resource.RLIM_INFINITY else limit


def clients_within(files: int) -> int:
    """Return how many clients fit into a limit of open files, each with a connection to a backend; 0: any number."""
    return max(1, (files - _BESIDE_CONNECTIONS) // 2) if files else 0


def files_for(connections: int) -> int:
    """Return how many open files a number of connections takes."""
    return connections + _BESIDE_CONNECTIONS
