"""The client that `connect` gives: redis-py's, for whatever is asked of Redis, and beside it the wire for scripts."""

from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection

from limiter.redis.multiplexed import ServerWire, Wire


class Client(Redis):
    """A client of one server. It owns its pool; close it with `aclose()`."""

    def __init__(self, pool: "ConnectionPool") -> None:
        super().__init__(connection_pool=pool)
        self.auto_close_connection_pool = True
        self.server_wire = ServerWire(self._dial)
        self.wire: Wire = self.server_wire

    async def open(self) -> None:
        """Connect the wire now. Raises RedisError, OSError."""
        await self.server_wire.open()

    async def _dial(self) -> AbstractConnection:
        """Connect and greet the server as the pool's connections do: address, TLS, user, database."""
        connection: AbstractConnection = self.connection_pool.make_connection()  # type: ignore[no-untyped-call]  # redis-py 8.1
        await connection.connect()  # type: ignore[no-untyped-call]
        return connection

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        """Close the wire and the pool."""
        await self.wire.aclose()
        await super().aclose(close_connection_pool)
