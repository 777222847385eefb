"""The memory of a relay process does not depend on how long streams and uploads are, nor on clients that read slowly.

LIMITER_TEST_MINUTES=10 makes each stream one of ten minutes, at 50 chunks a second without the waiting, and each upload
one of 100 MB. The bound is the same.
"""

import asyncio
import os
import re
import socket
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import pytest

from tests.relay.requests.test_upload import MIB, MULTIPART, PATH, form
from tests.support.cli import Relay
from tests.support.litellm import backend_process
from tests.support.relay import CHAT, ONE_SERVER

pytestmark = [ONE_SERVER, pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")]
MINUTES = float(os.environ.get("LIMITER_TEST_MINUTES", "0.8"))
CHUNKS_A_MINUTE, MIB_A_MINUTE = 50 * 60, 10
STREAMS, UPLOADS, SLOW_READERS = 50, 20, 10
# What may be in memory at once: of an upload what is kept for the fallback (relay.replay_limit_kb), and for each
# connection and its backend's the buffers of aiohttp and uvloop. The uploads alone, if they were kept, would be more.
MAX_GROWTH_MIB = UPLOADS * 1 + (STREAMS + UPLOADS + SLOW_READERS) * 1.25


@pytest.fixture
def relay(redis_url: str, tmp_path: Path) -> Iterator[Relay]:
    """A relay process before a backend process."""
    with backend_process() as backend:
        settings = {
            "LIMITER_BACKENDS__HARDWARE__URL": backend,
            "LIMITER_PERSISTER__FILE": "",
            "LIMITER_TIERS__CORE__LIFETIME": "100000",
            "LIMITER_TIERS__CORE__MAX_IN_FLIGHT": "1000",
            "LIMITER_TIERS__CORE__RATE_PER_MIN": "6000",
            "LIMITER_TIERS__CORE__BURST": "6000",
            "LIMITER_LOGS__LEVEL": "WARNING",
            "LIMITER_REDIS__TIMEOUT_MS": "10000",  # a busy machine may be slow: this is about memory
        }
        relay = Relay(tmp_path, "--redis", redis_url, settings=settings)
        yield relay
        relay.kill()


async def test_relay_when_streams_and_uploads_are_long_then_its_memory_does_not_grow_with_them(relay: Relay) -> None:
    headers = {"X-Install-Id": str(uuid.uuid4())}
    async with aiohttp.ClientSession(
        relay.url, headers=headers, connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
    ) as session:
        await asyncio.gather(_stream(session, 3), _upload(session, MIB))
        idle = _rss_mib(relay, "VmRSS")
        await _load(relay, session)
        most = _rss_mib(relay, "VmHWM")
    print(f"\nidle {idle:.1f} MiB, at most {most:.1f} MiB")  # noqa: T201  shown with `-s`
    assert most - idle < MAX_GROWTH_MIB


async def _load(relay: Relay, session: aiohttp.ClientSession) -> None:
    """Make all streams and uploads at once, while some clients do not read what they are sent."""
    async with AsyncExitStack() as stack:
        for _ in range(SLOW_READERS):
            stack.callback((await _stuck(relay, session)).close)
        await asyncio.gather(
            *(_stream(session, int(MINUTES * CHUNKS_A_MINUTE)) for _ in range(STREAMS)),
            *(_upload(session, int(MINUTES * MIB_A_MINUTE * MIB)) for _ in range(UPLOADS)),
        )


async def _stream(session: aiohttp.ClientSession, chunks: int) -> None:
    async with session.post(CHAT, json={"model": f"stream:{chunks}:0"}) as response:
        assert response.status == 200
        received = 0
        async for chunk in response.content.iter_any():
            received += chunk.count(b"data: {")
    assert received == chunks


async def _upload(session: aiohttp.ClientSession, size: int) -> None:
    """Send a form whose file is made on the way."""
    start, end = form("m", b"<file>").split(b"<file>")
    block = bytes(65_536)

    async def body() -> AsyncIterator[bytes]:
        yield start
        for _ in range(size // len(block)):
            yield block
        yield end

    length = len(start) + len(end) + size // len(block) * len(block)
    headers = {"Content-Type": MULTIPART, "Content-Length": str(length)}
    async with session.post(PATH, data=body(), headers=headers) as response:
        assert response.status == 200
        assert await response.json() == {"text": f"{length} bytes"}


async def _stuck(relay: Relay, session: aiohttp.ClientSession) -> socket.socket:
    """Ask for a stream without an end, and read only its beginning."""
    link = socket.socket()
    link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
    link.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(link, ("127.0.0.1", int(relay.url.rpartition(":")[2])))
    body = b'{"model": "pour:stream"}'
    head = f"POST {CHAT} HTTP/1.1\r\nHost: relay\r\nContent-Type: application/json\r\n"
    head += f"X-Install-Id: {session.headers['X-Install-Id']}\r\nContent-Length: {len(body)}\r\n\r\n"
    await loop.sock_sendall(link, head.encode() + body)
    assert (await loop.sock_recv(link, 12)) == b"HTTP/1.1 200"
    return link


def _rss_mib(relay: Relay, what: str) -> float:
    status = Path(f"/proc/{relay.process.pid}/status").read_text()
    found = re.search(rf"{what}:\s+(\d+) kB", status)
    assert found
    return int(found[1]) / 1024
