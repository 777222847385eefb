"""The way to one backend over HTTP/1.1: connections are made, kept and used again here. It judges no answer.

A request on a used connection which the backend closes without one byte of an answer is sent again, once, on a new one,
as browsers do (RFC 9112, 9.3.1): the two ends may let go of an idle connection in the same moment. Only a body that is
there whole is sent again; one that arrives bit by bit gets a new connection from the start. So a backend may see a call
twice; credits are never debited for it twice.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from functools import lru_cache
from math import inf
from socket import SOCK_STREAM

import aiohappyeyeballs
from yarl import URL

from limiter._util.fair_share import FairSlots, Holders
from limiter.relay.upstream.http_protocol import Exchange, HttpConnection, TransportError

_WRITE_AT_ONCE = 1 << 16  # a larger body is written bit by bit, as the backend takes it
_HAPPY_EYEBALLS_S = 0.25  # RFC 8305
_MIN_TICK_S, _MAX_TICK_S = 0.01, 0.5
_TICKS_IN_A_TIMEOUT = 10
_ROOM_S = 1.0  # how long a request waits for one of the connections that there may be
KEEPALIVE_S = 4.0  # below uvicorn's, and so vLLM's, 5 s


class NoConnectionFree(TransportError):  # noqa: N818  names the thing
    """All connections that there may be are in use. It says nothing about the backend."""


class HttpTransport:
    """A backend and the connections to it. Make it inside the running event loop and close it with `aclose`.

    Args:
        base: http or https, with a slash at the end of its path.
        connect_s: seconds until there is a connection.
        shortest_s: the shortest of the timeouts in use: all are looked at ten times within it.
        keepalive_s: how many seconds a connection may be idle and be used again.
        max_connections: how many there may be, 0: any number.
        tls: what verifies the backend; for https.
    """

    def __init__(
        self,
        base: URL,
        *,
        connect_s: float,
        shortest_s: float = 1.0,
        keepalive_s: float = KEEPALIVE_S,
        max_connections: int = 0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._base = base
        self._connect_s, self._keepalive_s = connect_s, keepalive_s
        self._loop = asyncio.get_running_loop()
        self._ssl = tls
        self._max = max_connections
        self._slots = FairSlots(max_connections) if max_connections else None  # for an exchange each
        self._takers: dict[HttpConnection, Holders] = {}  # of the slots
        self._making = 0
        self._is_closed = False
        self._idle: dict[HttpConnection, None] = {}  # the one used last is at the end
        self._open: set[HttpConnection] = set()
        self._exchanges: set[Exchange] = set()
        self._tick_s = max(_MIN_TICK_S, min(_MAX_TICK_S, shortest_s / _TICKS_IN_A_TIMEOUT))
        self._tick: asyncio.TimerHandle | None = None
        self._beginning = lru_cache(maxsize=64)(self._beginning_of)

    async def request(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: "bytes | AsyncIterator[bytes]",
        *,
        within_s: float = inf,
        on_sent: Callable[[], None] | None = None,
        holders: Holders = (),
    ) -> Exchange:
        """Send a request to a path below the base, and wait for the head of its answer.

        Args:
            method: in capitals.
            path: without a slash at its beginning.
            headers: names and values that can be written as they are. Length and coding of the body are added; of an
                iterator the length is sent if it is among them, else it goes in chunks.
            body: whole, or as it arrives.
            within_s: seconds from here, or from the last byte of an iterator, to the head; `deadline_s` of the exchange
                goes on counting.
            on_sent: called once the whole request is written.
            holders: whose share of the connections it takes, where they are bounded.

        Raises TransportError, of which NoConnectionFree is one, TimeoutError, ssl.SSLError and OSError.
        """
        rest = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
        if isinstance(body, bytes):
            head = self._beginning(method, path) + f"{rest}Content-Length: {len(body)}\r\n\r\n".encode("ascii")
            return await self._send_whole(head, body, within_s, on_sent, holders)
        framing = "\r\n" if "Content-Length" in headers else "Transfer-Encoding: chunked\r\n\r\n"
        head = self._beginning(method, path) + f"{rest}{framing}".encode("ascii")
        is_chunked = "Content-Length" not in headers
        return await self._send_stream(head, body, within_s, holders, chunked=is_chunked, on_sent=on_sent)

    async def aclose(self) -> None:
        """Close the connections."""
        self._is_closed = True
        if self._tick is not None:
            self._tick.cancel()
        for connection in list(self._open):
            connection.close()
        await asyncio.sleep(0)  # in which the loop closes the sockets

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return len(self._open)

    async def _send_whole(
        self, head: bytes, body: bytes, within_s: float, on_sent: Callable[[], None] | None, holders: Holders
    ) -> Exchange:
        deadline_s = self._loop.time() + within_s
        connection = await self._acquire(deadline_s, holders)
        is_used = connection.used > 0
        try:
            return await self._exchange(connection, head, body, deadline_s, on_sent)
        except TransportError as error:
            if not (is_used and error.unused):
                raise
        connection = await self._acquire(deadline_s, holders, new=True)
        return await self._exchange(connection, head, body, deadline_s, on_sent)

    async def _exchange(
        self,
        connection: HttpConnection,
        head: bytes,
        body: bytes,
        deadline_s: float,
        on_sent: Callable[[], None] | None,
    ) -> Exchange:
        exchange = self._begin(connection, deadline_s)
        try:
            if len(body) <= _WRITE_AT_ONCE:
                connection.write(head + body)
            else:
                connection.write(head)
                for at in range(0, len(body), _WRITE_AT_ONCE):
                    connection.write(body[at : at + _WRITE_AT_ONCE])
                    if not await exchange.drain() and at + _WRITE_AT_ONCE < len(body):
                        connection.reusable = False  # it answered before the end of the body
                        break
            if on_sent is not None:
                on_sent()
            await exchange.head()
        except BaseException:
            exchange.close()
            raise
        return exchange

    async def _send_stream(
        self,
        head: bytes,
        body: AsyncIterator[bytes],
        within_s: float,
        holders: Holders,
        *,
        chunked: bool,
        on_sent: Callable[[], None] | None,
    ) -> Exchange:
        deadline_s = self._loop.time() + within_s
        connection = await self._acquire(deadline_s, holders, new=True)  # it could not be sent again
        exchange = self._begin(connection, deadline_s)
        sending = self._loop.create_task(
            self._write_stream(connection, exchange, head, body, within_s, chunked=chunked)
        )
        try:
            await exchange.until_sent(sending)
            if not sending.done() or not sending.result():
                connection.reusable = False  # it answered before the end of the body
            elif on_sent is not None:
                on_sent()
            await exchange.head()
        except BaseException:
            exchange.close()
            await _cancel(sending)
            raise
        if exchange.wants_more:
            exchange.keep_sending(sending)
        else:
            await _cancel(sending)
        return exchange

    async def _write_stream(
        self,
        connection: HttpConnection,
        exchange: Exchange,
        head: bytes,
        body: AsyncIterator[bytes],
        within_s: float,
        *,
        chunked: bool,
    ) -> bool:
        """Write a body as it arrives; return whether all of it. While the client's bytes are awaited, no time runs."""
        connection.write(head)
        while True:
            if not exchange.status:  # from its head on, it is the reader who sets the time
                exchange.deadline_s = inf
            chunk = await anext(body, b"")
            if not exchange.status:
                exchange.deadline_s = self._loop.time() + within_s
            if not chunk:
                break
            connection.write(b"%x\r\n%b\r\n" % (len(chunk), chunk) if chunked else chunk)
            if not await exchange.drain():
                return False
        if chunked:
            connection.write(b"0\r\n\r\n")
        return True

    def _begin(self, connection: HttpConnection, deadline_s: float) -> Exchange:
        exchange = connection.begin(deadline_s)
        self._exchanges.add(exchange)
        self._start_ticking()
        return exchange

    async def _acquire(self, deadline_s: float, holders: Holders, *, new: bool = False) -> HttpConnection:
        """Return a connection for one exchange, an idle one unless it must be new. Raises as `request`."""
        if self._slots is None:
            return (None if new else self._take_idle()) or await self._connect(deadline_s)
        try:
            await self._slots.take(holders, min(self._loop.time() + _ROOM_S, deadline_s))
        except TimeoutError:
            raise NoConnectionFree(f"all of its {self._max} connections are in use, or a client's share") from None
        try:
            connection = (None if new else self._take_idle()) or await self._connect(deadline_s)
        except BaseException:
            self._slots.give_back(holders)
            raise
        self._takers[connection] = holders
        return connection

    def _take_idle(self) -> HttpConnection | None:
        now_s = self._loop.time()
        while self._idle:
            connection = next(reversed(self._idle))
            if connection.is_idle(now_s, self._keepalive_s):
                del self._idle[connection]
                return connection
            connection.close()
        return None

    async def _connect(self, deadline_s: float) -> HttpConnection:
        if self._max and len(self._open) + self._making >= self._max and self._idle:
            next(iter(self._idle)).close()  # in its place
        self._making += 1
        try:
            connection = await self._new_connection(min(self._loop.time() + self._connect_s, deadline_s))
        finally:
            self._making -= 1
        if self._is_closed or not connection.is_open:  # as when it spoke, or was closed, before it was asked
            connection.close()
            raise TransportError("the connection was lost as soon as it was made")
        self._open.add(connection)
        return connection

    async def _new_connection(self, ends_s: float) -> HttpConnection:
        host, port = self._base.raw_host or "", self._base.port or 0
        async with asyncio.timeout_at(ends_s):
            try:
                infos = await self._loop.getaddrinfo(host, port, type=SOCK_STREAM)
                sock = await aiohappyeyeballs.start_connection(
                    infos, happy_eyeballs_delay=_HAPPY_EYEBALLS_S, loop=self._loop
                )
            except (RuntimeError, UnicodeError) as error:  # of uvloop; of a name that no resolver takes
                raise TransportError(f"it cannot be reached: {error}") from error
            try:
                _, connection = await self._loop.create_connection(
                    lambda: HttpConnection(self._loop, self._ended),
                    sock=sock,
                    ssl=self._ssl,
                    server_hostname=host if self._ssl else None,
                )
            except BaseException:
                sock.close()
                raise
        return connection

    def _ended(self, connection: HttpConnection) -> None:
        """Keep a connection whose exchange has ended, or forget one that is closed."""
        if connection.reusable:
            self._idle[connection] = None
            self._start_ticking()
        elif connection in self._open:
            self._open.discard(connection)
            if connection in self._idle:
                del self._idle[connection]
                return
        else:
            return  # it was lost while it was made
        if self._slots is not None:
            self._slots.give_back(self._takers.pop(connection))

    def _start_ticking(self) -> None:
        if self._tick is None and not self._is_closed:
            self._tick = self._loop.call_later(self._tick_s, self._check)

    def _check(self) -> None:
        """Fail the exchanges whose time is over, and close what has been idle for too long.

        One tick for all of them costs less than a timer each.
        """
        now_s = self._loop.time()
        over = [each for each in self._exchanges if each.is_over or now_s >= each.deadline_s]
        for exchange in over:
            self._exchanges.discard(exchange)
            exchange.fail(TimeoutError())
        for connection in [each for each in self._idle if not each.is_idle(now_s, self._keepalive_s)]:
            connection.close()
        self._tick = None
        if self._exchanges or self._idle:
            self._start_ticking()

    def _beginning_of(self, method: str, path: str) -> bytes:
        """Return the lines that are the same for each request to a path."""
        base = self._base
        query = f"?{base.raw_query_string}" if base.raw_query_string else ""
        target = f"{base.joinpath(path).raw_path}{query}"
        return f"{method} {target} HTTP/1.1\r\nHost: {base.host_port_subcomponent}\r\n".encode("ascii")


async def _cancel(sending: "asyncio.Task[bool]") -> None:
    """End an upload. An error of it was raised already, or came too late to matter."""
    sending.cancel()
    await asyncio.wait({sending})
    if not sending.cancelled():
        sending.exception()
