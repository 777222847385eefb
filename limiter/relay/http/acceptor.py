"""Accepts the connections of clients, within limits: of all together, and of each network.

It takes the place of the event loop's own server, which accepts all that wait at once, whether or not there are files
for them, and decides nothing by their address.
"""

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Literal

import orjson

from limiter._util.ids import random_id
from limiter.log_events import event
from limiter.relay.http.client_address import Network, is_within, network_of, parse_address
from limiter.relay.http.problems import Problem

Limit = Literal["all", "address"]
OnClosed = Callable[[asyncio.Protocol], None]
_LOG = logging.getLogger("limiter.relay")
_ACCEPTS_A_TURN = 32
_MAX_REFUSED = 32  # connections that stay open for the client to read why; further ones are closed at once
_REFUSAL_S = 1.0
_RETRY_S = 1.0  # without a file for the next connection
_REFUSALS: dict[Limit, Problem] = {
    "all": Problem(
        503, "relay_busy", "Relay busy", "This relay has reached its limit of connections.", retry_after_s=1
    ),
    "address": Problem(
        429,
        "too_many_connections",
        "Too many connections",
        "Your network has too many connections to this relay: close some, or use them again.",
        retry_after_s=1,
    ),
}


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """How many connections clients may have open.

    Attributes:
        overall: all of them together; 0 for any number.
        per_address: those of one IPv4 address or IPv6 /56, but at most half of all; 0 for any number.
        exempt: networks of which per_address limits none.
    """

    overall: int = 0
    per_address: int = 0
    exempt: Sequence[Network] = ()


class Acceptor:
    """Accepts the connections of some listening sockets until it is closed, which closes them, too.

    Args:
        listeners: listening already.
        make: makes the protocol of a connection; it is given what to call with that at the connection's end.
        limits: on the connections that are open at a time.
        refused: called with the limit that a connection exceeded.
    """

    def __init__(
        self,
        listeners: Sequence[socket.socket],
        make: Callable[[OnClosed], asyncio.Protocol],
        limits: ConnectionLimits,
        refused: Callable[[Limit], None],
    ) -> None:
        self.sockets = tuple(listeners)  # where aiohttp looks for the addresses
        self._make, self._limits, self._refused = make, limits, refused
        share = max(1, limits.overall // 2) if limits.overall else limits.per_address
        self._per_address = min(limits.per_address, share)
        self._loop = asyncio.get_running_loop()
        self._open: dict[asyncio.Protocol, str | None] = {}
        self._by_network: Counter[str | None] = Counter()
        self._opening: set[asyncio.Task[None]] = set()
        self._lingering: dict[socket.socket, asyncio.TimerHandle] = {}
        self._is_closed = False
        for listener in self.sockets:
            listener.setblocking(False)
            self._resume(listener)

    def count(self) -> int:
        """Return how many connections are open."""
        return len(self._open)

    def close(self) -> None:
        """Close the listeners, and what was refused. Open connections stay."""
        self._is_closed = True
        for listener in self.sockets:
            self._loop.remove_reader(listener)
            listener.close()
        for client, end in self._lingering.items():
            end.cancel()
            client.close()
        self._lingering.clear()

    def _resume(self, listener: socket.socket) -> None:
        if not self._is_closed:
            self._loop.add_reader(listener, self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        """Accept some of the connections that wait; the others wait for the next turn of the event loop."""
        for _ in range(_ACCEPTS_A_TURN):
            try:
                client, peer = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # there are no files left, or no memory
                self._loop.remove_reader(listener)
                self._loop.call_later(_RETRY_S, self._resume, listener)
                _LOG.error("No connection can be accepted for now: %s", error, extra=event("accept_failed"))
                return
            client.setblocking(False)
            network = self._limited_network(peer[0])
            if limit := self._exceeded(network):
                self._refused(limit)
                self._refuse(client, _REFUSALS[limit])
            else:
                self._serve(client, network)

    def _limited_network(self, peer: str) -> str | None:
        """Return the network of a peer as text; None for one that no limit applies to."""
        address = parse_address(peer)
        if not self._per_address or address is None or is_within(address, self._limits.exempt):
            return None
        return network_of(address)

    def _exceeded(self, network: str | None) -> Limit | None:
        limits = self._limits
        if limits.overall and len(self._open) >= limits.overall:
            return "all"
        return "address" if network is not None and self._by_network[network] >= self._per_address else None

    def _serve(self, client: socket.socket, network: str | None) -> None:
        connection = self._make(self._closed)
        self._open[connection] = network
        self._by_network[network] += 1
        opening = self._loop.create_task(self._connect(client, connection))
        self._opening.add(opening)
        opening.add_done_callback(self._opening.discard)

    async def _connect(self, client: socket.socket, connection: asyncio.Protocol) -> None:
        try:
            await self._loop.connect_accepted_socket(lambda: connection, client)
        except BaseException as error:
            client.close()
            self._closed(connection)
            if not isinstance(error, OSError):  # the client has left already
                raise

    def _closed(self, connection: asyncio.Protocol) -> None:
        if connection in self._open:
            network = self._open.pop(connection)
            self._by_network[network] -= 1
            if not self._by_network[network]:
                del self._by_network[network]

    def _refuse(self, client: socket.socket, problem: Problem) -> None:
        """Send an error object, whatever the client asks, and close the connection."""
        try:
            client.send(_refusal(problem))
            client.shutdown(socket.SHUT_WR)
        except OSError:
            client.close()
            return
        if len(self._lingering) >= _MAX_REFUSED:
            client.close()
            return
        # Closing with unread bytes resets the connection, and the client could lose the answer.
        self._lingering[client] = self._loop.call_later(_REFUSAL_S, self._end, client)

    def _end(self, client: socket.socket) -> None:
        del self._lingering[client]
        client.close()


def _refusal(problem: Problem) -> bytes:
    request_id = random_id()
    body = orjson.dumps(problem.as_dict(request_id))
    start = f"HTTP/1.1 {problem.status} {HTTPStatus(problem.status).phrase}"
    headers = {"Content-Type": "application/json", "Connection": "close", "X-Request-Id": request_id}
    lines = [f"{name}: {value}" for name, value in {**headers, **problem.headers()}.items()]
    return "\r\n".join([start, *lines, f"Content-Length: {len(body)}", "", ""]).encode() + body
