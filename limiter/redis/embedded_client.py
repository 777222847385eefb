"""A client of the embedded server: it starts the server again after a crash, and stops it with its last client."""

import asyncio
import logging
from typing import Any

from redis.asyncio import BlockingConnectionPool
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisConnectionError

from limiter.errors import LimiterError
from limiter.log_events import event
from limiter.redis import embedded
from limiter.redis.client import Client

_LOG = logging.getLogger("limiter")


class EmbeddedClient(Client):
    """A client of the embedded server, which stops with its last client."""

    def __init__(self, lease: embedded.ServerLease, pool: BlockingConnectionPool) -> None:
        super().__init__(pool)
        self._lease = lease
        self._reviving: asyncio.Task[None] | None = None

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        """Run a command; if the server does not answer, start it again for the next one."""
        try:
            return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]  # redis-py 8.1
        except RedisConnectionError:
            self._start_reviving()
            raise

    async def _dial(self) -> AbstractConnection:
        try:
            return await super()._dial()
        except RedisConnectionError:
            self._start_reviving()
            raise

    def _start_reviving(self) -> None:
        if self._reviving is None or self._reviving.done():
            self._reviving = asyncio.create_task(self._revive())

    async def _revive(self) -> None:
        try:
            await asyncio.to_thread(embedded.revive, self._lease)
        except (LimiterError, OSError) as error:
            _LOG.error("The embedded server is gone: %s", error, extra=event("embedded_server_failed"))

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        """Close the connections, and stop the server if no other client is left."""
        if self._reviving is not None:
            await self._reviving
        await super().aclose(close_connection_pool)
        await asyncio.to_thread(embedded.stop_if_last, self._lease)
