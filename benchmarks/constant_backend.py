"""A backend that costs next to nothing, as a process: one fixed answer, or a stream if the body asks for one.

    python -m benchmarks.constant_backend [CHUNKS GAP_S]

A stream has so many chunks, 0: it ends when its client leaves.

It prints its port. It reads no more of HTTP than where a request ends, and does no pipelining.
"""

import asyncio
import re
import sys
from itertools import count
from typing import cast

import uvloop

CHUNKS, GAP_S = 64, 0.02
_BODY = (
    b'{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":"m","choices":[{"index":0,"finish_reason":"stop",'
    b'"message":{"role":"assistant","content":"Hello"}}],"usage":{"prompt_tokens":1,"completion_tokens":1}}'
)
_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(_BODY), _BODY)
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_EVENT = b'data: {"id":"c","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":"word "}}]}\n\n'
_CHUNK = b"%x\r\n%s\r\n" % (len(_EVENT), _EVENT)
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)


class ConstantBackend(asyncio.Protocol):
    """One connection."""

    def __init__(self, chunks: int, gap_s: float) -> None:
        self._chunks, self._gap_s = chunks, gap_s
        self._buffer = b""
        self._streaming: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:  # noqa: D102
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:  # noqa: D102
        self._buffer += data
        head, end, body = self._buffer.partition(b"\r\n\r\n")
        if not end:
            return
        length = _LENGTH.search(head)
        if length and len(body) < int(length[1]):
            return
        self._buffer = b""
        self._answer(head, body)

    def _answer(self, _head: bytes, body: bytes) -> None:
        if b'"stream": true' in body or b'"stream":true' in body:
            self._streaming = asyncio.get_running_loop().create_task(self._stream())
        else:
            self._transport.write(_ANSWER)

    async def _stream(self) -> None:
        self._transport.write(_HEAD)
        for _ in range(self._chunks) if self._chunks else count():
            if self._transport.is_closing():
                return
            self._transport.write(_CHUNK)
            await asyncio.sleep(self._gap_s)
        self._transport.write(b"0\r\n\r\n")


async def main(chunks: int = CHUNKS, gap_s: float = GAP_S) -> None:
    """Serve until the process is ended."""
    server = await asyncio.get_running_loop().create_server(
        lambda: ConstantBackend(chunks, gap_s), "127.0.0.1", 0, backlog=4096
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), float(sys.argv[2])) if len(sys.argv) > 1 else main())
