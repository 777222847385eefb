"""The attacker of `benchmarks.soak`, as a process: it is told on its standard input which attack to make next.

The first line is JSON: the URLs of the relay and of its backend, and the licences that the attacker has paid for. Each
further line is the name of an attack, or QUIET; for it, the former one ends, and a line says what it got.

His connections come from addresses that no proxy stands for (127.0.66.1 and on); his requests, which a proxy seems to
pass on, from any address that he likes.
"""

import asyncio
import json
import random
import socket
import sys
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress

import aiohttp
import uvloop

from limiter._util.open_files import raise_open_files

QUIET = "quiet"
CHAT = "/v1/chat/completions"
_SOURCES = 8  # addresses of idle connections
_NETWORKS = 300  # of new installs
_AT_ONCE = 200  # requests that wait for an answer
_JSON = {"Content-Type": "application/json"}
_TIMEOUT = aiohttp.ClientTimeout(total=20)


def _chat(model: str, rest: str = "") -> bytes:
    return f'{{"model": "{model}", "messages": [{{"role": "user", "content": "{uuid.uuid4()}"}}]{rest}}}'.encode()


class Attacker:
    """What all attacks are made with."""

    def __init__(self, session: aiohttp.ClientSession, relay: str, backend: str, licences: list[str]) -> None:
        self.relay, self.backend, self._session = relay, backend, session
        host, _, port = relay.rpartition("//")[2].partition(":")
        self._address = (host, int(port))
        self._paid = [
            {"Authorization": f"Bearer {licence}", "X-Install-Id": str(uuid.uuid5(uuid.NAMESPACE_OID, licence))}
            for licence in licences
        ]
        self.got: Counter[str] = Counter()
        self._held: list[asyncio.StreamWriter] = []
        self._under_way: set[asyncio.Task[None]] = set()

    def paid(self, number: int | None = None) -> dict[str, str]:
        """Return the headers of an install with a licence: a random one, or always the same."""
        chosen = self._paid[number % len(self._paid)] if number is not None else random.choice(self._paid)
        return chosen | {"X-Forwarded-For": f"192.0.2.{random.randrange(1, 255)}"}

    async def ask(
        self, path: str = CHAT, body: bytes | None = None, headers: dict[str, str] | None = None, base: str = ""
    ) -> None:
        """Make one request, and count its answer."""
        method = "GET" if body is None else "POST"
        async with self._session.request(
            method, (base or self.relay) + path, data=body, headers=_JSON | (headers or {}), timeout=_TIMEOUT
        ) as answer:
            await answer.read()
            self.got[str(answer.status)] += 1

    async def hold(
        self, data: bytes, source: str | None = None, *, receives_b: int = 0, for_s: float | None = None
    ) -> None:
        """Open a connection, send something, and read nothing until the end of the attack, or for a time."""
        link = socket.socket()
        if receives_b:
            link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receives_b)
        link.setblocking(False)
        link.bind((source or "127.0.0.1", 0))
        await asyncio.get_running_loop().sock_connect(link, self._address)
        _, writer = await asyncio.open_connection(sock=link, limit=1024)
        self._held.append(writer)
        writer.write(data)
        await writer.drain()
        self.got["sent"] += 1
        if for_s is not None:
            await asyncio.sleep(for_s)
            self._held.remove(writer)
            writer.transport.abort()

    async def repeat(self, per_s: float, act: Callable[[], Awaitable[None]], *, times: int | None = None) -> None:
        """Do something so many times a second, however long it takes."""
        while times is None or times > 0:
            if len(self._under_way) < _AT_ONCE:
                task = asyncio.create_task(self._counted(act))
                self._under_way.add(task)
                task.add_done_callback(self._under_way.discard)
            else:
                self.got["waits"] += 1
            times = None if times is None else times - 1
            await asyncio.sleep(1 / per_s)

    async def _counted(self, act: Callable[[], Awaitable[None]]) -> None:
        try:
            await act()
        except (OSError, aiohttp.ClientError, TimeoutError) as error:
            self.got[type(error).__name__] += 1

    async def end(self) -> dict[str, int]:
        """End everything, and say what it got."""
        for task in self._under_way:
            task.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)
        for writer in self._held:
            writer.transport.abort()
        self._held.clear()
        got, self.got = dict(self.got), Counter()
        return got

    def head(self, path: str, headers: dict[str, str], length: int) -> bytes:
        """Return the head of a request."""
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return f"POST {path} HTTP/1.1\r\nHost: relay\r\nContent-Length: {length}\r\n{lines}\r\n".encode()


async def kept_answers(by: Attacker) -> None:
    """Have large answers kept, each for another key."""
    await by.repeat(
        4, lambda: by.ask(body=_chat("soak-large"), headers=by.paid() | {"Idempotency-Key": str(uuid.uuid4())})
    )


async def left_calls(by: Attacker) -> None:
    """Leave calls before their answer."""
    body = _chat("soak-slow")
    await by.repeat(20, lambda: by.hold(by.head(CHAT, by.paid() | _JSON, len(body)) + body, for_s=0.3))


async def refused_calls(by: Attacker) -> None:
    """Make calls that the backend refuses, which cost nothing."""
    await by.repeat(50, lambda: by.ask(body=_chat("soak-refuse"), headers=by.paid(0)))


async def idle_connections(by: Attacker) -> None:
    """Open more connections than the relay should take, from some addresses."""
    numbers = iter(range(1_000_000))
    await by.repeat(400, lambda: by.hold(b"", f"127.0.66.{next(numbers) % _SOURCES + 1}"), times=_SOURCES * 300)
    await asyncio.sleep(3600)


async def standing_bodies(by: Attacker) -> None:
    """Send bodies until shortly before their end, and then nothing."""
    size_b = 32 << 20
    part = b'{"model": "m", "messages": [{"role": "user", "content": "' + b"x" * (size_b - 4096)
    numbers = iter(range(1_000_000))
    await by.repeat(
        2, lambda: by.hold(by.head(CHAT, by.paid(next(numbers)) | _JSON, size_b) + part, for_s=40), times=16
    )
    await by.repeat(5, lambda: by.hold(by.head(CHAT, by.paid() | _JSON, 1 << 20) + part[: 1 << 19]))


async def streams(by: Attacker) -> None:
    """Begin as many streams as there can be, and read none."""
    body = _chat("soak-endless", ', "stream": true')
    numbers = iter(range(1_000_000))
    await by.repeat(
        30, lambda: by.hold(by.head(CHAT, by.paid(next(numbers)) | _JSON, len(body)) + body, receives_b=4096)
    )


async def tiny_parts(by: Attacker) -> None:
    """Send forms of very many parts."""
    form = b"--x" + b"\r\n--x\r\n\r\n\r\n" * 80_000
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    await by.repeat(1, lambda: by.ask("/v1/audio/transcriptions", form, by.paid() | headers))


async def many_objects(by: Attacker) -> None:
    """Send documents of a million values."""
    bodies = [
        b'{"model": "m", "messages": [' + piece * (4_000_000 // len(piece)) + b"0]}"
        for piece in (b"[],", b'{"":0},', b"1,")
    ]
    await by.repeat(1, lambda: by.ask(body=random.choice(bodies), headers=by.paid()))


async def slow_replays(by: Attacker) -> None:
    """Ask for one kept answer again and again, and do not read it."""
    body, key = _chat("soak-large"), {"Idempotency-Key": str(uuid.uuid4())}
    await by.ask(body=body, headers=by.paid(1) | key)
    await by.repeat(10, lambda: by.hold(by.head(CHAT, by.paid(1) | key | _JSON, len(body)) + body, receives_b=4096))


async def forged_licences(by: Attacker) -> None:
    """Present licences that nobody signed, each another."""

    def forged() -> dict[str, str]:
        return {"Authorization": f"Bearer eyJhbGciOiJFZERTQSJ9.eyJzdWIiOiJ{uuid.uuid4().hex}.{'A' * 86}"}

    await by.repeat(50, lambda: by.ask("/v1/credits", headers=by.paid() | forged()))


async def dear_requests(by: Attacker) -> None:
    """Ask for many answers, made-up models and thousands of inputs."""

    def dear() -> Awaitable[None]:
        kind = random.randrange(3)
        if kind == 0:
            inputs = ", ".join(['"x"'] * 2048)
            return by.ask("/v1/embeddings", f'{{"model": "m", "input": [{inputs}]}}'.encode(), by.paid())
        body = _chat("m", ', "n": 128, "max_tokens": 1000000000') if kind == 1 else _chat(f"model-{uuid.uuid4()}")
        return by.ask(body=body, headers=by.paid())

    await by.repeat(20, dear)


async def unfinished_heads(by: Attacker) -> None:
    """Send heads that have many bytes and no end."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: relay\r\n" + (b"X-Pad: " + b"x" * 4000 + b"\r\n") * 15
    numbers = iter(range(1_000_000))
    await by.repeat(60, lambda: by.hold(head, f"127.0.66.{next(numbers) % _SOURCES + 1}", for_s=30))


async def poison(by: Attacker) -> None:
    """Make requests on which the backend fails, by a few installs."""
    await by.repeat(5, lambda: by.ask(body=_chat("soak-poison"), headers=by.paid(random.randrange(5))))


async def new_installs(by: Attacker) -> None:
    """Use new installs from many networks, none of which pays."""

    def new() -> Awaitable[None]:
        number = random.randrange(_NETWORKS)
        address = f"2001:db8:{number:x}::1" if number % 2 else f"203.0.{number % 250}.{random.randrange(1, 255)}"
        headers = {"X-Install-Id": str(uuid.uuid4()), "X-Forwarded-For": address}
        return by.ask(body=_chat("soak-refuse"), headers=headers)

    await by.repeat(20, new)


async def hanging_models(by: Attacker) -> None:
    """Ask for the list of models, while the backend does not answer for it."""
    await by.ask("/hang/3600", base=by.backend)
    try:
        await by.repeat(10, lambda: by.ask("/v1/models", headers=by.paid()))
    finally:
        with suppress(OSError, aiohttp.ClientError):
            await by.ask("/hang/0", base=by.backend)


async def log_volume(by: Attacker) -> None:
    """Make short requests of which each would be a line in the log."""
    await by.repeat(10, lambda: by.hold(b"GET /%0d%0a HTTP/1.1\r\n\r\n" * 40, "127.0.66.1", for_s=1))


Attack = Callable[[Attacker], Coroutine[None, None, None]]
ATTACKS: dict[str, Attack] = {
    attack.__name__: attack
    for attack in (
        kept_answers,
        left_calls,
        refused_calls,
        idle_connections,
        standing_bodies,
        streams,
        tiny_parts,
        many_objects,
        slow_replays,
        forged_licences,
        dear_requests,
        unfinished_heads,
        poison,
        new_installs,
        hanging_models,
        log_volume,
    )
}


async def main() -> None:
    """Attack as told."""
    raise_open_files()
    loop = asyncio.get_running_loop()
    told = json.loads(await loop.run_in_executor(None, sys.stdin.readline))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        by = Attacker(session, **told)
        running: asyncio.Task[None] | None = None
        while name := (await loop.run_in_executor(None, sys.stdin.readline)).strip():
            if running is not None:
                running.cancel()
                for outcome in await asyncio.gather(running, return_exceptions=True):
                    if isinstance(outcome, Exception):
                        by.got[f"ended by {outcome!r}"] += 1
            print(json.dumps(await by.end()), flush=True)
            running = None if name == QUIET else asyncio.create_task(ATTACKS[name](by))


if __name__ == "__main__":
    uvloop.run(main())
