"""A backend of raw bytes: what it answers, and when it closes, is up to the test."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

Serve = Callable[["Peer"], Awaitable[None]]
GOOD = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ngood"
_LIMIT = 1 << 22


class Peer:
    """One connection to the backend. number: in the order in which they came, from 1."""

    def __init__(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.number, self.reader, self.writer = number, reader, writer
        self.requests: list[tuple[bytes, bytes]] = []
        self.gone = asyncio.Event()

    async def head(self) -> bytes:
        return await self.reader.readuntil(b"\r\n\r\n")

    async def request(self) -> tuple[bytes, bytes]:
        """Read one request; give its head and its body."""
        head = await self.head()
        fields = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(b":") for line in head.split(b"\r\n")[1:] if line)
        }
        body = b""
        if length := fields.get(b"content-length"):
            body = await self.reader.readexactly(int(length))
        elif b"transfer-encoding" in fields:
            while size := int(await self.reader.readline(), 16):
                body += (await self.reader.readexactly(size + 2))[:-2]
            await self.reader.readline()
        self.requests.append((head, body))
        return head, body

    async def send(self, *parts: bytes, pause_s: float = 0.0) -> None:
        for part in parts:
            self.writer.write(part)
            await self.writer.drain()
            if pause_s:
                await asyncio.sleep(pause_s)

    def reset(self) -> None:
        """Close at once, and lose what is not sent."""
        self.writer.transport.abort()


class RawBackend:
    def __init__(self) -> None:
        self.port = 0
        self.peers: list[Peer] = []

    @property
    def requests(self) -> int:
        return sum(len(peer.requests) for peer in self.peers)


@asynccontextmanager
async def raw_backend(
    serve: Serve, host: str = "127.0.0.1", *, tls: ssl.SSLContext | None = None
) -> AsyncIterator[RawBackend]:
    """Serve each connection by a function; when that is over, the connection is closed."""
    backend = RawBackend()

    async def run(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(len(backend.peers) + 1, reader, writer)
        backend.peers.append(peer)
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
                await serve(peer)
        finally:
            writer.close()
            peer.gone.set()

    server = await asyncio.start_server(run, host, 0, limit=_LIMIT, ssl=tls)
    backend.port = server.sockets[0].getsockname()[1]
    try:
        yield backend
    finally:
        server.close()
        for peer in backend.peers:
            peer.writer.transport.abort()
        await asyncio.sleep(0.01)


async def good(peer: Peer) -> None:
    """Answer each request well, and keep the connection."""
    while True:
        await peer.request()
        await peer.send(GOOD)
