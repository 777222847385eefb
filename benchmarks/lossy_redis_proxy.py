"""A TCP proxy before a Redis that loses replies, as a process: `python -m benchmarks.lossy_redis_proxy PORT`.

It prints its own port. After a line on stdin it cuts a connection now and then, instead of passing on what the server
has just answered: all of that was executed, and whoever asked does not know it. Unlike `tests.support.redis_proxy` it
knows no commands, so many are under way.
"""

import asyncio
import contextlib
import random
import sys

_SHARE = 0.02  # of the reads from the server, each of one reply or of many
_READ_BYTES = 65_536


class LossyProxy:
    """Passes connections on to the port, and cuts them once it `cuts`."""

    def __init__(self, port: int) -> None:
        self.cuts = False
        self._port = port

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass one connection on until an end closes it, or it is cut."""
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._port)
        asking = asyncio.create_task(_pass_on(reader, server_writer))
        with contextlib.suppress(ConnectionError):  # the racer may have gone
            while (replies := await server_reader.read(_READ_BYTES)) and not self._is_lost():
                writer.write(replies)
        asking.cancel()
        writer.close()
        server_writer.close()

    def _is_lost(self) -> bool:
        return self.cuts and random.random() < _SHARE


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(_READ_BYTES):
            writer.write(data)
        writer.write_eof()


async def main(port: int) -> None:
    """Serve until the process is ended."""
    proxy = LossyProxy(port)
    async with await asyncio.start_server(proxy.accept, "127.0.0.1", 0) as server:
        print(server.sockets[0].getsockname()[1], flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        proxy.cuts = True
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
