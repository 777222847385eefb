"""The client that `connect` returns: redis-py's for any command, and beside it the channel for scripts."""

from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection

from limiter.redis.multiplexed import CommandChannel, MultiplexedConnection


class Client(Redis):
    """A client of one server. It owns its pool; close it with `aclose()`."""

    def __init__(self, pool: "ConnectionPool") -> None:
        super().__init__(connection_pool=pool)
        self.auto_close_connection_pool = True
        self.multiplexed = MultiplexedConnection(self._dial)
        self.channel: CommandChannel = self.multiplexed

    async def open(self) -> None:
        """Connect the channel now. Raises RedisError, OSError."""
        await self.multiplexed.open()

    async def _dial(self) -> AbstractConnection:
        """Connect and greet the server as the pool's connections do: address, TLS, user, database."""
        connection: AbstractConnection = self.connection_pool.make_connection()  # type: ignore[no-untyped-call]  # redis-py 8.1
        await connection.connect()  # type: ignore[no-untyped-call]
        return connection

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        """Close the channel and the pool."""
        await self.channel.aclose()
        await super().aclose(close_connection_pool)
