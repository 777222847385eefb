"""All bodies that a relay holds are bounded together: one too many is a 503, and what is done with makes room."""

import asyncio

import pytest

from limiter.relay.handlers.context import RELAY
from limiter.relay.requests.memory_budget import MemoryBudget
from tests.support.openai_backend import Backend
from tests.support.relay import CHAT, ONE_SERVER, RunningRelay, StartRelay, client_of
from tests.support.wait import eventually

pytestmark = ONE_SERVER
UPLOAD = "/v1/audio/transcriptions"
MIB = 1 << 20


@pytest.fixture
async def small(start_relay: StartRelay, gemini: Backend, hardware: Backend) -> RunningRelay:
    """A relay with room for 4 MiB, so with 2 MiB for one client."""
    return await start_relay(
        client_of("gemini", gemini.url),
        client_of("hardware", hardware.url),
        body_limit_mb=1,
        bodies_in_memory_mb=4,
    )


def bodies(relay: RunningRelay) -> MemoryBudget:
    return relay.app[RELAY].memory


async def test_body_when_those_before_it_fill_the_memory_then_503_and_it_is_served_when_they_are_done(
    small: RunningRelay, gemini: Backend
) -> None:
    big = "x" * (MIB - 10_000)
    waiting = [asyncio.create_task(small.ask("wait", input=big)) for _ in range(2)]
    await eventually(lambda: len(gemini.seen) == 2)
    answer = await small.ask("plain", input=big)
    assert (answer.status, answer.code, answer.headers["Retry-After"]) == (503, "relay_busy", "1")
    assert len(gemini.seen) == 2
    gemini.go_on.set()
    assert [answer.status for answer in await asyncio.gather(*waiting)] == [200, 200]
    await eventually(lambda: bodies(small).held_b == 0)
    assert (await small.ask("plain", input=big)).status == 200
    assert await small.spent() == (3, 3)


async def test_body_when_its_length_is_only_claimed_then_it_reserves_no_memory(small: RunningRelay) -> None:
    writers = []
    for _ in range(8):
        _, writer = await asyncio.open_connection("127.0.0.1", small.port)
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nX-Install-Id: {small.install_id}\r\nContent-Type: application/json\r\n"
        )
        writer.write(f"{head}Content-Length: {MIB}\r\n\r\n".encode() + b"x" * 1000)
        writers.append(writer)
    await eventually(lambda: bodies(small).held_b == 8000)
    assert (await small.ask(input="x" * 900_000)).status == 200
    for writer in writers:
        writer.close()
    await eventually(lambda: bodies(small).held_b == 0)


@pytest.mark.parametrize("length", [b"Content-Length: 2000000", b"Transfer-Encoding: chunked"])
async def test_body_when_it_is_over_its_own_limit_then_413_and_nothing_stays_counted(
    small: RunningRelay, length: bytes
) -> None:
    body = b"%x\r\n%s\r\n0\r\n\r\n" % (2_000_000, b"x" * 2_000_000) if b"chunked" in length else b"x" * 2_000_000
    head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nX-Install-Id: {small.install_id}\r\nContent-Type: application/json\r\n"
    received = await small.raw(head.encode() + length + b"\r\n\r\n" + body)
    assert received.startswith(b"HTTP/1.1 413 ")
    assert bodies(small).held_b == 0


async def test_upload_when_the_memory_is_used_up_then_it_passes_but_is_not_kept_for_hardware(
    small: RunningRelay, gemini: Backend
) -> None:
    big = "x" * (MIB - 10_000)
    waiting = [asyncio.create_task(small.ask("wait", input=big)) for _ in range(2)]
    await eventually(lambda: len(gemini.seen) == 2)
    parts = (("model", "plain"), ("file", "y" * 600_000))
    form = "".join(f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{text}\r\n' for name, text in parts)

    async def upload() -> int:
        kind = "multipart/form-data; boundary=b"
        body = f"{form}--b--\r\n".encode()
        return (await small.send("POST", UPLOAD, body, X_Install_Id=small.install_id, Content_Type=kind)).status

    assert await upload() == 200
    gemini.always = "status:500"
    assert await upload() == 502
    gemini.go_on.set()
    await asyncio.gather(*waiting)
    await eventually(lambda: bodies(small).held_b == 0)
    assert await upload() == 200  # by hardware
