"""A TCP proxy before a real Redis: it records every command, and loses the reply of the one that the test names.

It passes one command at a time on each connection, so that a reply belongs to the command before it. A lost reply is
either swallowed (the connection stays, nothing comes) or the connection is cut after the server has executed it.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal

import hiredis
import pytest

Loss = Literal["swallow", "cut"]
Command = tuple[bytes, ...]


class Proxy:
    """`url` leads through it; `commands` are those since `lose_reply` or the start."""

    def __init__(self, port: int) -> None:
        self.commands: list[Command] = []
        self.url = ""
        self._port = port
        self._lost: tuple[int, Loss] | None = None
        self._links: set[asyncio.Task[None]] = set()

    def lose_reply(self, number: int, loss: Loss) -> None:
        """Lose the reply of the command that comes as number 0, 1, … from now on."""
        self.commands.clear()
        self._lost = (number, loss)

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._links.add(task)
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            # The client may go away in the middle; that is the point here.
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await self._pass_on(reader, writer, server_reader, server_writer)
        finally:
            self._links.discard(task)
            for end in (writer, server_writer):
                end.close()
                with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                    await end.wait_closed()

    async def _pass_on(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        server_reader: asyncio.StreamReader,
        server_writer: asyncio.StreamWriter,
    ) -> None:
        while True:
            raw, command = await _read_command(reader)
            number = len(self.commands)
            self.commands.append(command)
            server_writer.write(raw)
            reply = await _read_reply(server_reader)
            if self._lost == (number, "cut"):
                return
            if self._lost != (number, "swallow"):
                writer.write(reply)

    async def close(self) -> None:
        for task in list(self._links):
            task.cancel()
        while self._links:
            await asyncio.wait(self._links)


@asynccontextmanager
async def proxy_of(redis_url: str) -> AsyncIterator[Proxy]:
    """Put a proxy before the server of a redis://HOST:PORT/DB URL."""
    if not redis_url.startswith("redis://"):
        pytest.skip("the proxy stands before one server")
    place, _, database = redis_url.removeprefix("redis://").partition("/")
    proxy = Proxy(int(place.rpartition(":")[2]))
    async with await asyncio.start_server(proxy.accept, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        proxy.url = f"redis://127.0.0.1:{port}/{database}"
        yield proxy
        await proxy.close()


async def _read_command(reader: asyncio.StreamReader) -> tuple[bytes, Command]:
    """Read one command, an array of strings; give its bytes as they came, and its words."""
    raw = await reader.readuntil(b"\r\n")
    words = []
    for _ in range(int(raw[1:])):
        length = await reader.readuntil(b"\r\n")
        word = await reader.readexactly(int(length[1:]) + 2)
        raw += length + word
        words.append(word[:-2])
    return raw, tuple(words)


async def _read_reply(reader: asyncio.StreamReader) -> bytes:
    parser, raw = hiredis.Reader(notEnoughData=Ellipsis), b""
    while True:
        chunk = await reader.read(65536)
        if not chunk:
            raise ConnectionResetError("the server closed the connection")
        raw += chunk
        parser.feed(chunk)
        if parser.gets() is not Ellipsis:
            return raw
