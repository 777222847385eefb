"""Every private part of redis-py that is used here: it has no public API for these things."""

import asyncio
from abc import abstractmethod
from typing import cast

from redis.asyncio.connection import AbstractConnection, Connection
from redis.connection import DefaultParser

from limiter._util.private_names import require

SUPPORTED = "redis>=8.1,<8.2"
_REQUIRES = {
    "redis.asyncio.connection.AbstractConnection": ("_connect", "_reader", "_writer"),
    "redis.connection.DefaultParser": ("parse_error",),
}
require(SUPPORTED, _REQUIRES)


# Returns redis-py's exception for an error reply.
error_from_reply = DefaultParser.parse_error


def take_over(connection: AbstractConnection) -> asyncio.StreamWriter:
    """Take the stream of a connection after its handshake. redis-py cannot use the connection any more."""
    writer = cast("asyncio.StreamWriter", connection._writer)  # noqa: SLF001
    connection._reader = connection._writer = None  # noqa: SLF001
    return writer


class LocatedConnection(Connection):
    """A connection that finds out where its server is each time it connects."""

    @abstractmethod
    async def locate(self) -> tuple[str, int]:
        """Return host and port."""

    async def _connect(self) -> None:
        self.host, self.port = await self.locate()
        await super()._connect()  # type: ignore[no-untyped-call]  # redis-py 8.1
