"""A backend of raw bytes, for what no well-made server sends: it writes what it is told, with pauses, and hangs up."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

Script = Sequence[bytes | float]  # what is written, and the seconds between


class ScriptedBackend:
    """Answers each request with `script`, or the next of `scripts`, and then closes the connection.

    Its scripts have no end of their own: an answer without length ends well by `ended`, or by the connection's end.
    """

    def __init__(self) -> None:
        self.url = ""
        self.script: Script = []
        self.scripts: list[Script] = []
        self.calls = 0
        self.serving: set[asyncio.Future[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving = asyncio.ensure_future(self._serve(reader, writer))
        self.serving.add(serving)
        serving.add_done_callback(self.serving.discard)
        await asyncio.wait({serving})

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            await reader.readexactly(int(head.partition(b"content-length: ")[2].split(b"\r\n")[0]))
            self.calls += 1
            for step in self.scripts.pop(0) if self.scripts else self.script:
                if isinstance(step, bytes):
                    writer.write(step)
                    await writer.drain()
                else:
                    await asyncio.sleep(step)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def scripted_backend() -> AsyncIterator[ScriptedBackend]:
    """Run one in this process."""
    backend = ScriptedBackend()
    server = await asyncio.start_server(backend.serve, "127.0.0.1", 0)
    backend.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    try:
        yield backend
    finally:
        server.close()
        for serving in list(backend.serving):
            serving.cancel()
        if backend.serving:
            await asyncio.wait(backend.serving)


def head(content_type: str | None = "text/event-stream") -> bytes:
    """The head of a chunked 200."""
    line = f"Content-Type: {content_type}\r\n" if content_type else ""
    return f"HTTP/1.1 200 OK\r\n{line}Transfer-Encoding: chunked\r\n\r\n".encode()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


END = b"0\r\n\r\n"


def stream(*parts: bytes | float, content_type: str | None = "text/event-stream", ends: bool = True) -> Script:
    """The script of a stream of parts, each a chunk, with pauses. ends: False for one that breaks off."""
    steps = [chunk(part) if isinstance(part, bytes) else part for part in parts if part]
    return [head(content_type), *steps, END] if ends else [head(content_type), *steps]


def whole(body: bytes, *, content_type: str = "application/json", more: str = "") -> Script:
    """The script of a whole 200."""
    return [
        f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\n{more}Content-Length: {len(body)}\r\n\r\n".encode() + body
    ]
