"""Many clients of a fleet of relays: each asks, sometimes leaves, and notes down what it saw."""

import asyncio
import contextlib
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import aiohttp

from tests.support.cli import Relay
from tests.support.relay import CHAT

Saw = Literal["served", "refused", "nothing"]
_GIVE_UP_S = 60.0  # no answer takes so long: whoever waits has met a bug


@dataclass(slots=True)
class ForwardableRequest:
    """One request: its name, whose it is, the relay that it went to, and what its client saw of the answer.

    served: the first body byte of a 2xx. refused: an error, whole. nothing: neither, as the client left or the relay
    died. hold_id: of the answer, if it had begun. stayed: the client waited for the end.
    """

    name: str
    install_id: str
    relay: int
    saw: Saw = "nothing"
    status: int = 0
    hold_id: str = ""
    stayed: bool = True


class Fleet:
    """Relays of which some may die, and the requests that were made of them."""

    def __init__(self, relays: Sequence[Relay]) -> None:
        self.relays = relays
        self.alive = set(range(len(relays)))
        self.asked: list[ForwardableRequest] = []

    async def ask(self, clients: int, installs: Sequence[str], requests: int) -> None:
        """Make so many requests from so many clients at once, which share the installs."""
        numbers = iter(range(requests))
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=_GIVE_UP_S)
        ) as session:
            await asyncio.gather(
                *(
                    self._client(session, install_id, numbers)
                    for install_id in itertools.islice(itertools.cycle(installs), clients)
                )
            )

    async def _client(self, session: aiohttp.ClientSession, install_id: str, numbers: Iterator[int]) -> None:
        for number in numbers:
            asked = ForwardableRequest(f"r{number}", install_id, random.choice(sorted(self.alive)))
            self.asked.append(asked)
            stream = random.random() < 0.6
            body = {"model": "m", "stream": stream, "user": asked.name, "messages": [{"role": "user", "content": "Hi"}]}
            with contextlib.suppress(aiohttp.ClientError, ConnectionError):
                match random.randrange(10):
                    case 0:
                        await self._leave_while_sending(asked, json.dumps(body).encode())
                    case 1 | 2:
                        asked.stayed = False
                        with contextlib.suppress(TimeoutError):
                            async with asyncio.timeout(random.random() ** 2 * 0.5):
                                await self._read(session, asked, body)
                    case 3 if stream:
                        asked.stayed = False
                        await self._read(session, asked, body, at_most=1)
                    case _:
                        await self._read(session, asked, body)

    async def _leave_while_sending(self, asked: ForwardableRequest, body: bytes) -> None:
        """Send a head and all but the last of the body, and leave."""
        asked.stayed = False
        _, writer = await asyncio.open_connection("127.0.0.1", int(self.relays[asked.relay].url.rpartition(":")[2]))
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: relay\r\nContent-Type: application/json\r\n"
            f"X-Install-Id: {asked.install_id}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body[:-1])
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async def _read(
        self, session: aiohttp.ClientSession, asked: ForwardableRequest, body: object, at_most: int | None = None
    ) -> None:
        url = self.relays[asked.relay].url + CHAT
        async with session.post(url, json=body, headers={"X-Install-Id": asked.install_id}) as response:
            asked.status, asked.hold_id = response.status, response.headers["X-Request-Id"]
            if response.status != 200:
                await response.read()
                asked.saw = "refused"
                return
            if response.content_type != "text/event-stream":
                await response.read()
                asked.saw = "served"
                return
            chunks = 0
            async for _ in response.content.iter_any():
                asked.saw = "served"
                chunks += 1
                if chunks == at_most:
                    return
