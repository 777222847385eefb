"""The way to one backend over HTTP/1.1: connections are made, kept and used again here. It judges no answer.

A request on a used connection which the backend closes without one byte of an answer is sent again, once, on a new one,
as browsers do (RFC 9112, 9.3.1): the two ends may let go of an idle connection in the same moment. Only a body that is
there whole is sent again. So a backend may see a call twice; credits are never debited for it twice.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from functools import lru_cache
from math import inf

import aiohappyeyeballs
from yarl import URL

from limiter.relay.upstream.http_protocol import Exchange, HttpConnection, TransportError

_WRITE_AT_ONCE = 1 << 16  # a larger body is written bit by bit, as the backend takes it
_HAPPY_EYEBALLS_S = 0.25  # RFC 8305
_MIN_TICK_S, _MAX_TICK_S = 0.01, 0.5
_TICKS_IN_A_TIMEOUT = 10
KEEPALIVE_S = 4.0  # below uvicorn's, and so vLLM's, 5 s


class HttpTransport:
    """A backend and the connections to it. Make it inside the running event loop and close it with `aclose`.

    Args:
        base: http or https, with a slash at the end of its path.
        connect_s: seconds until there is a connection.
        shortest_s: the shortest of the timeouts in use: all are looked at ten times within it.
        keepalive_s: how many seconds a connection may be idle and be used again.
        ca_file: certificates of authorities, in place of the system's.
    """

    def __init__(
        self,
        base: URL,
        *,
        connect_s: float,
        shortest_s: float = 1.0,
        keepalive_s: float = KEEPALIVE_S,
        ca_file: str | None = None,
    ) -> None:
        self._base = base
        self._connect_s, self._keepalive_s = connect_s, keepalive_s
        self._loop = asyncio.get_running_loop()
        self._ssl = ssl.create_default_context(cafile=ca_file) if base.scheme == "https" else None
        self._idle: list[HttpConnection] = []  # the one used last is at the end
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

        Raises TransportError, TimeoutError, ssl.SSLError and OSError.
        """
        rest = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
        if isinstance(body, bytes):
            head = self._beginning(method, path) + f"{rest}Content-Length: {len(body)}\r\n\r\n".encode("ascii")
            return await self._send_whole(head, body, within_s)
        framing = "\r\n" if "Content-Length" in headers else "Transfer-Encoding: chunked\r\n\r\n"
        head = self._beginning(method, path) + f"{rest}{framing}".encode("ascii")
        return await self._send_stream(head, body, within_s, chunked="Content-Length" not in headers)

    async def aclose(self) -> None:
        """Close the connections."""
        if self._tick is not None:
            self._tick.cancel()
        for connection in list(self._open):
            connection.close()

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return len(self._open)

    async def _send_whole(self, head: bytes, body: bytes, within_s: float) -> Exchange:
        deadline_s = self._loop.time() + within_s
        connection = self._take_idle()
        if connection is not None:
            try:
                return await self._exchange(connection, head, body, deadline_s)
            except TransportError as error:
                if not error.unused:
                    raise
        return await self._exchange(await self._connect(deadline_s), head, body, deadline_s)

    async def _exchange(self, connection: HttpConnection, head: bytes, body: bytes, deadline_s: float) -> Exchange:
        exchange = self._begin(connection, deadline_s)
        try:
            if len(body) <= _WRITE_AT_ONCE:
                connection.write(head + body)
            else:
                connection.write(head)
                for at in range(0, len(body), _WRITE_AT_ONCE):
                    connection.write(body[at : at + _WRITE_AT_ONCE])
                    await connection.drain()
            await exchange.head()
        except BaseException:
            exchange.close()
            raise
        return exchange

    async def _send_stream(
        self, head: bytes, body: AsyncIterator[bytes], within_s: float, *, chunked: bool
    ) -> Exchange:
        deadline_s = self._loop.time() + within_s
        connection = self._take_idle() or await self._connect(deadline_s)
        exchange = self._begin(connection, deadline_s)
        sending = self._loop.create_task(
            self._write_stream(connection, exchange, head, body, within_s, chunked=chunked)
        )
        heading = self._loop.create_task(exchange.head())
        try:
            await asyncio.wait({sending, heading}, return_when=asyncio.FIRST_COMPLETED)
            if not heading.done():
                with suppress(TransportError):  # a backend may answer and close before it has read all
                    sending.result()
            await heading
        except BaseException:
            exchange.close()
            raise
        finally:
            for task in (sending, heading):
                task.cancel()
            await asyncio.wait({sending, heading})
        if not sending.done() or sending.cancelled() or sending.exception() is not None:
            connection.reusable = False  # it answered before the end of the body
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
    ) -> None:
        """Write a body as it arrives. While the client's bytes are awaited, no time of the backend's runs."""
        connection.write(head)
        while True:
            exchange.deadline_s = inf
            chunk = await anext(body, b"")
            exchange.deadline_s = self._loop.time() + within_s
            if not chunk:
                break
            connection.write(b"%x\r\n%b\r\n" % (len(chunk), chunk) if chunked else chunk)
            await connection.drain()
        if chunked:
            connection.write(b"0\r\n\r\n")

    def _begin(self, connection: HttpConnection, deadline_s: float) -> Exchange:
        exchange = connection.begin(deadline_s)
        self._exchanges.add(exchange)
        if self._tick is None:
            self._tick = self._loop.call_later(self._tick_s, self._check)
        return exchange

    def _take_idle(self) -> HttpConnection | None:
        now_s = self._loop.time()
        while self._idle:
            connection = self._idle.pop()
            if connection.is_idle(now_s, self._keepalive_s):
                return connection
            connection.close()
        return None

    async def _connect(self, deadline_s: float) -> HttpConnection:
        ends_s = min(self._loop.time() + self._connect_s, deadline_s)
        async with asyncio.timeout_at(None if ends_s == inf else ends_s):
            host, port = self._base.host or "", self._base.port or 0
            infos = await self._loop.getaddrinfo(host, port, type=1)
            sock = await aiohappyeyeballs.start_connection(
                infos, happy_eyeballs_delay=_HAPPY_EYEBALLS_S, loop=self._loop
            )
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
        self._open.add(connection)
        return connection

    def _ended(self, connection: HttpConnection) -> None:
        """Keep a connection whose exchange has ended, or forget one that is closed."""
        if connection.reusable:
            self._idle.append(connection)
        else:
            self._open.discard(connection)

    def _check(self) -> None:
        """Fail the exchanges whose time is over. One tick for all of them costs less than a timer each."""
        now_s = self._loop.time()
        over = [each for each in self._exchanges if each.is_over or now_s >= each.deadline_s]
        for exchange in over:
            self._exchanges.discard(exchange)
            exchange.fail(TimeoutError())
        self._tick = self._loop.call_later(self._tick_s, self._check) if self._exchanges else None

    def _beginning_of(self, method: str, path: str) -> bytes:
        """Return the lines that are the same for each request to a path."""
        url = self._base.joinpath(path).with_query(self._base.query_string or None)
        return f"{method} {url.raw_path_qs} HTTP/1.1\r\nHost: {url.host_port_subcomponent}\r\n".encode("ascii")
