"""Sends requests to one server over HTTP, on connections that aiohttp makes, keeps and reads. It judges no answer.

aiohttp's session is made for any request: it looks for cookies, redirects, proxies and traces, and takes a task to
write. A request whose body is there whole is written here in one piece, which costs less than half of that.
"""

import asyncio
import io
from collections.abc import AsyncIterator, Mapping
from functools import lru_cache
from inspect import signature
from typing import Protocol

import aiohttp
from aiohttp import hdrs
from aiohttp.connector import Connection
from aiohttp.http import RawResponseMessage
from aiohttp.tracing import Trace
from multidict import CIMultiDictProxy
from yarl import URL

from limiter._util.private_names import require, unsupported
from limiter.relay.http.connection import SUPPORTED

_REQUIRES = {  # what aiohttp documents of them is that they exist
    "aiohttp.client_proto.ResponseHandler": ("read", "set_response_params", "should_close"),
    "aiohttp.connector.Connection": ("protocol", "transport"),
}
require(SUPPORTED, _REQUIRES)
try:
    signature(aiohttp.ClientRequest).bind(hdrs.METH_POST, URL(), loop=None)
except TypeError as cause:
    raise unsupported(SUPPORTED, "has another aiohttp.ClientRequest than (method, url, loop=…)") from cause

_CONNECTIONS = 1000
_AT_ONCE = 1 << 16  # a larger body is sent bit by bit: it would block the loop
_INTERIM = range(100, 200)
_SWITCHING_PROTOCOLS = 101  # after which no other answer comes


class Answer(Protocol):
    """An answer whose head has come. End it with `release`, after its last byte, or with `close`."""

    @property
    def status(self) -> int: ...  # noqa: D102  the class says it
    @property
    def headers(self) -> Mapping[str, str]: ...  # noqa: D102
    @property
    def content(self) -> aiohttp.StreamReader: ...  # noqa: D102
    def release(self) -> object: ...  # noqa: D102  its connection can be used again
    def close(self) -> None: ...  # noqa: D102  its connection closes, which stops the server's work


class _Connections(aiohttp.TCPConnector):
    """Never reuses a connection with unsolicited bytes: aiohttp (3.14) would take them for the next answer."""

    async def connect(
        self,
        req: aiohttp.ClientRequest,
        traces: list[Trace],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109  aiohttp's
    ) -> Connection:
        """Get one from the pool or make one. The caller bounds the time: a server may speak first on each."""
        while True:
            connection = await super().connect(req, traces, timeout)
            if connection.protocol is not None and not connection.protocol.should_close:
                return connection
            connection.close()


class HttpTransport:
    """A server and the connections to it. Make it inside the running event loop and close it with `aclose`.

    base: http or https, with a slash at its end. connect_s: until there is a connection.
    """

    def __init__(self, base: URL, *, connect_s: float) -> None:
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_s)
        self._connector = _Connections(limit=_CONNECTIONS)
        # What `connect` reads of a request is the same for all of them: whereto.
        self._whereto = aiohttp.ClientRequest(hdrs.METH_POST, base, loop=asyncio.get_running_loop())
        self._beginning = lru_cache(maxsize=64)(self._beginning_of)
        self._url = lru_cache(maxsize=64)(base.joinpath)
        self._session = aiohttp.ClientSession(
            connector=self._connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,  # the body passes as it is, with its Content-Encoding
            skip_auto_headers=(hdrs.USER_AGENT, hdrs.ACCEPT_ENCODING),
            timeout=self._timeout,
        )

    async def ask(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | AsyncIterator[bytes]
    ) -> Answer:
        """Send a request to a path below the base, and wait for the head of its answer. There is no other time limit.

        headers: names and values that can be written as they are; of those of the body only its type, and the length of
        one that comes bit by bit. Raises aiohttp's errors, HttpProcessingError and OSError.
        """
        if isinstance(body, bytes) and 0 < len(body) <= _AT_ONCE:
            return await self._exchanged(method, path, headers, body)
        sent = io.BytesIO(body) if isinstance(body, bytes) and body else body or None
        return await self._session.request(method, self._url(path), data=sent, headers=headers, allow_redirects=False)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._session.close()

    async def _exchanged(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Answer:
        lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
        rest = f"{lines}Content-Length: {len(body)}\r\n\r\n".encode("ascii")
        connection = await self._connector.connect(self._whereto, traces=[], timeout=self._timeout)
        try:
            head, content = await _answered(connection, self._beginning(method, path) + rest + body)
        except BaseException:
            connection.close()
            raise
        return _Exchange(connection, head.code, head.headers, content)

    def _beginning_of(self, method: str, path: str) -> bytes:
        """Return the lines that are the same for each request to a path."""
        url = self._url(path)
        return f"{method} {url.raw_path_qs} HTTP/1.1\r\nHost: {url.host_port_subcomponent}\r\n".encode("ascii")


class _Exchange:
    """An `Answer` to what was written in one piece."""

    __slots__ = ("_connection", "content", "headers", "status")

    def __init__(
        self,
        connection: Connection,
        status: int,
        headers: CIMultiDictProxy[str],
        content: aiohttp.StreamReader,
    ) -> None:
        self._connection, self.status, self.headers, self.content = connection, status, headers, content

    def release(self) -> None:
        self._connection.release()

    def close(self) -> None:
        self._connection.close()


async def _answered(connection: Connection, request: bytes) -> tuple[RawResponseMessage, aiohttp.StreamReader]:
    protocol, transport = connection.protocol, connection.transport
    if protocol is None or transport is None:
        raise aiohttp.ClientConnectionError("the connection closed")
    protocol.set_response_params(read_until_eof=True, auto_decompress=False)
    transport.write(request)
    while True:
        head, content = await protocol.read()
        if head.code not in _INTERIM or head.code == _SWITCHING_PROTOCOLS:
            return head, content
