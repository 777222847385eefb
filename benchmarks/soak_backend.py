"""A backend that does what the model's name says, as a process: else it is `benchmarks.constant_backend`.

    python -m benchmarks.soak_backend

It prints its port. `GET /hang/S` lets it answer no request for its models for so many seconds.
"""

import asyncio
import re
import time
from typing import ClassVar

import uvloop

from benchmarks.constant_backend import ConstantBackend

CHUNKS, GAP_S = 16, 0.05
ENDLESS_GAP_S = 2.0
LARGE_B = 1_000_000
_MODEL = re.compile(rb'"model": ?"soak-([a-z]+)"')
_LOOKED_AT_B = 200
_MODELS = b'{"object":"list","data":[{"id":"m","object":"model","created":1,"owned_by":"soak"}]}'


def _whole(status: bytes, body: bytes) -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


_ANSWERS = {
    b"large": _whole(b"200 OK", b'{"id":"1","choices":[{"message":{"content":"%s"}}]}' % (b"x" * LARGE_B)),
    b"refuse": _whole(b"400 Bad Request", b'{"error":{"message":"not like this","code":"invalid"}}'),
    b"poison": _whole(b"500 Internal Server Error", b'{"error":{"message":"crashed"}}'),
    b"slow": b"",  # never
}


class SoakBackend(ConstantBackend):
    """One connection."""

    hangs_until_s: ClassVar = 0.0

    def _answer(self, head: bytes, body: bytes) -> None:
        model = _MODEL.search(body, 0, _LOOKED_AT_B)
        if head.startswith(b"GET /hang/"):
            SoakBackend.hangs_until_s = time.monotonic() + float(head.split()[1].rpartition(b"/")[2])
            self._transport.write(_whole(b"200 OK", b"{}"))
        elif head.startswith(b"GET"):
            if time.monotonic() >= self.hangs_until_s:
                self._transport.write(_whole(b"200 OK", _MODELS))
        elif model and model[1] == b"endless":
            self._chunks, self._gap_s = 0, ENDLESS_GAP_S
            super()._answer(head, body)
        elif model and model[1] in _ANSWERS:
            self._transport.write(_ANSWERS[model[1]])
        else:
            self._chunks, self._gap_s = CHUNKS, GAP_S
            super()._answer(head, body)


async def main() -> None:
    """Serve until the process is ended."""
    server = await asyncio.get_running_loop().create_server(
        lambda: SoakBackend(CHUNKS, GAP_S), "127.0.0.1", 0, backlog=4096
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
