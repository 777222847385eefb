"""What the tests of the relay are made of: a relay on a port with a client, its answers, and waiting for things."""

import asyncio
import io
import json
import os
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from multidict import CIMultiDictProxy
from pydantic import BaseModel
from redis.asyncio import Redis

from limiter import CreditLimiter, Tiers
from limiter.config.settings import (
    IdempotencySettings,
    LicenceSettings,
    ModelNames,
    RedisSettings,
    RelaySettings,
    Settings,
    TierSettings,
)
from limiter.credits.models import Backend as BackendName
from limiter.relay.app import create_app, make_runner
from limiter.relay.handlers.context import RELAY
from limiter.relay.handlers.health import Report
from limiter.relay.http.connection import RelayRunner
from limiter.relay.process.listeners import open_listeners
from limiter.relay.upstream.client import BackendClient
from tests.support.openai_backend import Document
from tests.support.redis_matrix import MATRIX, TOPOLOGY
from tests.support.wait import eventually

CHAT = "/v1/chat/completions"
GEMINI_KEY = "gemini-key-of-the-operator"
HARDWARE_KEY = "hardware-key-of-the-operator"
RELAY_TIERS = Tiers.from_mapping(
    {
        "core": {"lifetime": 50, "gemini_cap": 20},
        "pro": {"monthly": 1000, "gemini_cap": 400},
        "max": {"monthly": None, "gemini_cap": 2000},
        "free": {},
    }
)
ONE_SERVER = pytest.mark.parametrize("redis_url", MATRIX if TOPOLOGY in os.environ else MATRIX[:1], indirect=True)


def tiers(**core: int) -> Tiers:
    """Tiers of which only `core` matters."""
    return Tiers.from_mapping({"core": core})


def new_install() -> str:
    return str(uuid.uuid4())


@dataclass(frozen=True)
class Answer:
    """A whole answer; `body` is as it came over the channel."""

    status: int
    headers: CIMultiDictProxy[str]
    body: bytes

    @property
    def document(self) -> Document:
        document: Document = json.loads(self.body)
        return document

    @property
    def code(self) -> str:
        """The word of an error."""
        return str(self.document["error"]["code"])


@dataclass
class RunningRelay:
    """A relay on a port, and a client of it that adds nothing of its own and unpacks nothing."""

    url: str
    limiter: CreditLimiter
    app: web.Application
    runner: RelayRunner
    session: aiohttp.ClientSession
    install_id: str = field(default_factory=new_install)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def post(self, model: str, path: str = CHAT, headers: Mapping[str, str] | None = None, **members: Any) -> Any:
        """Start a request; an async context manager, for tests that do more than wait for its end."""
        document = {"model": model, "messages": [{"role": "user", "content": "Hi"}], **members}
        headers = {"X-Install-Id": self.install_id, "Content-Type": "application/json", **(headers or {})}
        return self.session.post(self.url + path, data=io.BytesIO(json.dumps(document).encode()), headers=headers)

    async def ask(
        self, model: str = "plain", path: str = CHAT, headers: Mapping[str, str] | None = None, **members: Any
    ) -> Answer:
        """Make a request to its end."""
        async with self.post(model, path, headers, **members) as response:
            return Answer(response.status, response.headers, await response.read())

    async def send(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        """Send what a well-behaved client would not."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.session.request(method, self.url + path, data=body, headers=named) as response:
            return Answer(response.status, response.headers, await response.read())

    @asynccontextmanager
    async def connect(self, model: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """Send a request by hand, for a client that reads when it likes, and leaves at the end of the block."""
        body = json.dumps({"model": model}).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: relay\r\nContent-Type: application/json\r\n"
            f"X-Install-Id: {self.install_id}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        try:
            writer.write(head.encode() + body)
            yield reader, writer
        finally:
            writer.close()

    async def raw(self, request: bytes) -> bytes:
        """Write bytes to the port and give all that comes back until the relay closes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(request)
            async with asyncio.timeout(10):
                return await reader.read()
        except ConnectionResetError:
            return b""
        finally:
            writer.close()

    async def settled(self) -> None:
        """Wait until no handler's commit or release is under way."""
        while tasks := set(self.app[RELAY].retries._tasks):
            await asyncio.wait(tasks)

    async def spent(self, install_id: str | None = None) -> tuple[int, int]:
        """Credits and Gemini credits that were debited, once nothing is held any more."""
        install_id = install_id or self.install_id
        await self.settled()
        await eventually(lambda: self._nothing_held(install_id), what="the settlement of every hold")
        row = await self.limiter.row(install_id)
        return (row.lifetime_consumed, row.lifetime_gemini_consumed) if row else (0, 0)

    async def _nothing_held(self, install_id: str) -> bool:
        row = await self.limiter.row(install_id)
        return row is None or not row.holds


StartRelay = Callable[..., Awaitable[RunningRelay]]


def client_of(
    name: BackendName, url: str, *, timeout_s: float = 10, models: Mapping[str, str] | None = None, **more: Any
) -> BackendClient:
    key = GEMINI_KEY if name == "gemini" else HARDWARE_KEY
    return BackendClient(name, url, api_key=key, timeout_s=timeout_s, models=models, **more)


def _sections(options: Mapping[str, Any]) -> dict[str, Any]:
    """Sort settings given by their bare names into the sections that a relay looks at."""
    kinds: dict[str, type[BaseModel]] = {
        "relay": RelaySettings,
        "redis": RedisSettings,
        "idempotency": IdempotencySettings,
    }
    unknown = set(options).difference(*(kind.model_fields for kind in kinds.values()))
    assert not unknown, f"no settings: {unknown}"
    return {
        section: kind(**{name: value for name, value in options.items() if name in kind.model_fields})
        for section, kind in kinds.items()
    }


@asynccontextmanager
async def relays_on(redis: Redis) -> AsyncIterator[StartRelay]:
    """Start relays. Afterwards, when all are drained, no row may hold anything."""
    async with AsyncExitStack() as stack:

        async def start(
            *clients: BackendClient,
            on: CreditLimiter | None = None,
            tiers: Tiers = RELAY_TIERS,
            public_keys: Sequence[str] = (),
            costs: Mapping[str, int] | None = None,
            reports: Mapping[str, Report] | None = None,
            listed: Sequence[str] = (),
            tier_settings: Mapping[str, TierSettings] | None = None,
            **options: Any,
        ) -> RunningRelay:
            for client in clients:
                stack.push_async_callback(client.aclose)
            limiter = on or CreditLimiter(redis, tiers)
            settings = Settings.model_construct(  # without the environment
                costs={"default": 1, **(costs or {})},
                models={name: ModelNames() for name in listed},
                tiers=dict(tier_settings or {}),
                licence=LicenceSettings(public_keys=list(public_keys)),
                **_sections({"mint_per_ip": 0, "mint_overall": 0, **options}),
            )
            app = create_app(limiter, {client.name: client for client in clients}, settings, reports)
            runner = make_runner(app, settings.relay.model_copy(update={"drain_s": 5}))
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await runner.listen(open_listeners("127.0.0.1", 0))
            connector = aiohttp.TCPConnector(limit=0)
            session = aiohttp.ClientSession(
                connector=connector, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()
            )
            stack.push_async_callback(session.close)
            return RunningRelay(f"http://127.0.0.1:{runner.addresses[0][1]}", limiter, app, runner, session)

        yield start
    for key in await redis.keys("*:install:*"):
        held = [name for name in await redis.hkeys(key) if "hold:" in str(name)]
        assert not held, f"{key!r} was left with {held}"
