"""Finding the primary through Sentinels, and connections that go to it only.

Each new connection looks the primary up, and checks that the server it reaches has that role. A connection to a server
that was demoted is dropped, so that the next one finds the new primary. Nothing here repeats a command.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

from redis.asyncio import BlockingConnectionPool, SSLConnection
from redis.exceptions import AuthenticationError, ReadOnlyError
from redis.exceptions import ConnectionError as RedisConnectionError

from limiter.redis.client import Client
from limiter.redis.fan_out import FanOut
from limiter.redis.multiplexed import MultiplexedConnection
from limiter.redis.redis_private import LocatedConnection
from limiter.redis.resp import script_load
from limiter.redis.url import Address


class Sentinels:
    """The Sentinels of one primary. make_client: opens a plain client of the Sentinel at an address."""

    def __init__(self, seeds: tuple[Address, ...], name: str, make_client: Callable[[Address], Client]) -> None:
        self.name = name
        self._clients = {seed: make_client(seed) for seed in seeds}
        self._fan_out = FanOut(self._query)

    async def primary(self) -> Address:
        """Query all Sentinels at once, and return the address that most of them name, as soon as that is certain.

        A Sentinel that is cut off still names the old primary. Raises RedisConnectionError if none of them names one.
        """
        named: Counter[Address] = Counter()
        failures: list[str] = []
        async for answer in self._fan_out.answers(self._clients):
            if isinstance(answer, AuthenticationError):
                raise answer
            if isinstance(answer, BaseException):
                failures.append(str(answer))
                continue
            named[answer] += 1
            if 2 * named[answer] > len(self._clients):
                return answer
        if not named:
            raise RedisConnectionError(f"no Sentinel knows the primary {self.name}: {'; '.join(failures)}")
        return named.most_common(1)[0][0]

    async def aclose(self) -> None:
        """Close the connections to the Sentinels."""
        await self._fan_out.aclose()
        for client in self._clients.values():
            await client.aclose()

    async def _query(self, seed: Address) -> Address:
        answer: Any = await self._clients[seed].execute_command(  # type: ignore[no-untyped-call]  # redis-py 8.1
            "SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.name
        )
        if not answer:
            raise RedisConnectionError(f"{seed} monitors no primary of that name")
        host, port = answer
        return Address(host.decode(), int(port))


class PrimaryConnection(LocatedConnection):
    """A connection to the server that is the primary at the time."""

    def __init__(self, *, sentinels: Sentinels, **options: Any) -> None:
        super().__init__(**options)
        self._sentinels = sentinels

    async def locate(self) -> tuple[str, int]:
        """Query the Sentinels."""
        primary = await self._sentinels.primary()
        return primary.host, primary.port

    async def on_connect_check_health(self, check_health: bool = True) -> None:
        """Log in, and check that the server is the primary."""
        await super().on_connect_check_health(check_health)
        await self.send_command("ROLE", check_health=False)
        role: Any = await self.read_response()
        if role[0] != b"master":
            raise RedisConnectionError(f"{self.host}:{self.port} is not the primary any more")

    async def read_response(self, *args: Any, **options: Any) -> Any:
        """Read one reply; drop the connection if the server was demoted."""
        try:
            return await super().read_response(*args, **options)
        except ReadOnlyError:
            await self.disconnect()
            raise


class TlsPrimaryConnection(PrimaryConnection, SSLConnection):
    """A connection to the primary, over TLS."""


class SentinelClient(Client):
    """A client of the primary that Sentinels name."""

    def __init__(self, sentinels: Sentinels, pool: BlockingConnectionPool) -> None:
        super().__init__(pool)
        self.channel = SentinelChannel(self.multiplexed)
        self._sentinels = sentinels

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        """Close the connections to the primary and to the Sentinels."""
        await super().aclose(close_connection_pool)
        await self._sentinels.aclose()


class SentinelChannel:
    """The channel to the primary: it reconnects after a demotion. A silent server is dropped by the connection."""

    def __init__(self, channel: MultiplexedConnection) -> None:
        self._channel = channel

    async def send(self, key: str, command: bytes, timeout_s: float) -> Any:
        """Send an encoded command. See `CommandChannel`."""
        try:
            return await self._channel.send(key, command, timeout_s)
        except ReadOnlyError:
            self._channel.renew()
            raise

    async def load_script(self, key: str, text: str, timeout_s: float) -> Any:
        """Load a script on the primary. See `CommandChannel`."""
        return await self.send(key, script_load(text), timeout_s)

    async def aclose(self) -> None:
        """Close the connection."""
        await self._channel.aclose()
