"""Opens the sockets that a relay, or a supervisor for its workers, listens on."""

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from limiter.errors import SettingsError

_BACKLOG = 1024


def open_listeners(host: str, port: int) -> list[socket.socket]:
    """Listen on each address of a host. Raises SettingsError."""
    with _failures_named(host, port), ExitStack() as undo:
        listeners: list[socket.socket] = []
        for family, address in dict.fromkeys(_resolve(host, port)):
            try:
                listener = undo.enter_context(socket.socket(family, socket.SOCK_STREAM))
            except OSError:  # the machine has no IPv6, though its names do
                continue
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # IPv4 has a socket of its own
            listener.bind(address)
            listener.listen(_BACKLOG)
            listeners.append(listener)
        undo.pop_all()
        return listeners


def open_shared_listeners(host: str, port: int, count: int) -> list[socket.socket]:
    """Listen on one port with several sockets, among which the kernel spreads the connections. Raises SettingsError."""
    with _failures_named(host, port), ExitStack() as undo:
        family, address = _resolve(host, port)[0]
        # By itself: sockets that share a port by SO_REUSEPORT would share it with another supervisor's, too.
        with socket.create_server(address[:2], family=family) as probe:
            address = (address[0], probe.getsockname()[1], *address[2:])
        listeners = []
        for _ in range(count):
            listener = undo.enter_context(socket.socket(family, socket.SOCK_STREAM))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind(address)
            listener.listen(_BACKLOG)
            listeners.append(listener)
        undo.pop_all()
        return listeners


def _resolve(host: str, port: int) -> list[tuple[socket.AddressFamily, Any]]:
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return [(family, address) for family, _, _, _, address in found]


@contextmanager
def _failures_named(host: str, port: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # The resolver's errors have numbers of their own.
        cause = error.strerror if isinstance(error, socket.gaierror) or not error.errno else os.strerror(error.errno)
        raise SettingsError(f"cannot listen on {host}:{port}: {cause}; give another --host or --port") from None
