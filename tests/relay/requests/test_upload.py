"""Transcriptions: a form with a large file passes as it arrives; its hold is settled like any other."""

import asyncio
import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import aiohttp
import openai
import pytest

from tests.support.cli import Relay
from tests.support.openai_backend import CHUNK, Backend
from tests.support.paths import ROOT
from tests.support.relay import ONE_SERVER, Answer, RunningRelay, StartRelay, client_of, new_install, tiers
from tests.support.wait import eventually

pytestmark = ONE_SERVER
PATH = "/v1/audio/transcriptions"
MULTIPART = "multipart/form-data; boundary=b0undary"
MIB = 1 << 20


def form(model: str, file: bytes, *, file_first: bool = False) -> bytes:
    parts = [
        b'--b0undary\r\nContent-Disposition: form-data; name="model"\r\n\r\n%s\r\n' % model.encode(),
        b'--b0undary\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n'
        b"Content-Type: audio/wav\r\n\r\n%s\r\n" % file,
    ]
    return b"".join(reversed(parts) if file_first else parts) + b"--b0undary--\r\n"


async def in_pieces(body: bytes, size: int = 65_536) -> AsyncIterator[bytes]:
    for start in range(0, len(body), size):
        yield body[start : start + size]


async def upload(
    relay: RunningRelay, body: bytes | AsyncIterator[bytes], content_type: str = MULTIPART, **headers: str
) -> Answer:
    """Send a body: of known length if it is bytes, else chunked."""
    given = {"X-Install-Id": relay.install_id, "Content-Type": content_type}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    data = in_pieces(body) if isinstance(body, bytes) else body
    if isinstance(body, bytes):
        given["Content-Length"] = str(len(body))
    async with relay.session.post(relay.url + PATH, data=data, headers=given) as response:
        return Answer(response.status, response.headers, await response.read())


def head(relay: RunningRelay, *headers: str) -> bytes:
    lines = [f"POST {PATH} HTTP/1.1", "Host: relay", f"X-Install-Id: {relay.install_id}", *headers]
    return "\r\n".join([*lines, "", ""]).encode()


async def held(relay: RunningRelay) -> int:
    return (await relay.limiter.balance(relay.install_id, tier="core")).held


# Through


@pytest.mark.parametrize("file_first", [False, True])
@pytest.mark.parametrize("sized", [False, True])
async def test_upload_when_no_name_is_mapped_then_the_backend_gets_its_very_bytes(
    relay: RunningRelay, gemini: Backend, sized: bool, file_first: bool
) -> None:
    body = form("whisper", os.urandom(3 * MIB), file_first=file_first)
    answer = await upload(relay, body if sized else in_pieces(body))
    assert (answer.status, answer.document["text"]) == (200, f"{len(body)} bytes")
    assert gemini.last.sha256 == hashlib.sha256(body).hexdigest()
    assert gemini.last.headers["Content-Type"] == MULTIPART
    assert gemini.last.headers.get("Content-Length") == (str(len(body)) if sized else None)
    assert await relay.spent() == (1, 1)


@pytest.mark.parametrize("file_first", [False, True])
async def test_upload_when_its_model_is_mapped_then_each_backend_gets_its_own_name_and_the_same_file(
    start_relay: StartRelay, gemini: Backend, hardware: Backend, file_first: bool
) -> None:
    relay = await start_relay(
        client_of("gemini", gemini.url, models={"recap": "status:500"}),
        client_of("hardware", hardware.url, models={"recap": "whisper-large-v3"}),
    )
    file = os.urandom(30_000)
    answer = await upload(relay, form("recap", file, file_first=file_first))
    assert answer.headers["X-Credits-Backend"] == "hardware"
    assert gemini.last.body == form("status:500", file, file_first=file_first)
    assert hardware.last.body == form("whisper-large-v3", file, file_first=file_first)
    assert await relay.spent() == (1, 0)


async def test_upload_when_it_is_packed_then_415(relay: RunningRelay, gemini: Backend) -> None:
    answer = await upload(relay, gzip.compress(form("whisper", b"text" * 10_000)), Content_Encoding="gzip")
    assert (answer.status, answer.code) == (415, "packed_body")
    assert gemini.seen == []


async def test_upload_when_the_answer_streams_then_its_bytes_are_the_backends(relay: RunningRelay) -> None:
    answer = await upload(relay, form("stream:2:0", b"sound"))
    assert answer.body == b": a comment\n\n" + CHUNK % 0 + b"\n" + CHUNK % 1 + b"\n" + b"data: [DONE]\n\n"


async def test_sdk_when_it_transcribes_then_it_reads_the_text(relay: RunningRelay, gemini: Backend) -> None:
    async with openai.AsyncOpenAI(base_url=f"{relay.url}/v1", api_key=relay.install_id) as client:
        answer = await client.audio.transcriptions.create(model="whisper", file=("a.wav", b"sound" * 1000))
    assert answer.text == f"{gemini.last.received} bytes"
    assert gemini.last.received > 5000
    assert await relay.spent() == (1, 1)


# Fallback


@pytest.mark.parametrize("model", ["status:500", "break-before", "empty"])
async def test_gemini_when_it_fails_after_a_small_upload_then_hardware_gets_all_of_it(
    start_relay: StartRelay, gemini: Backend, hardware: Backend, model: str
) -> None:
    relay = await start_relay(
        client_of("gemini", gemini.url, models={"m": model}), client_of("hardware", hardware.url, models={"m": "x"})
    )
    answer = await upload(relay, form("m", b"s" * 900_000))
    assert (answer.status, answer.headers["X-Credits-Backend"]) == (200, "hardware")
    assert hardware.last.sha256 == hashlib.sha256(form("x", b"s" * 900_000)).hexdigest()
    assert await relay.spent() == (1, 0)


@pytest.mark.parametrize("model", ["status:500", "break-before"])
async def test_gemini_when_it_fails_after_a_large_upload_then_502_and_the_hold_is_released(
    relay: RunningRelay, hardware: Backend, model: str
) -> None:
    answer = await upload(relay, form(model, b"s" * (2 * MIB)))
    assert (answer.status, answer.code) == (502, "backend_unavailable")
    assert hardware.seen == []
    assert await relay.spent() == (0, 0)


@pytest.mark.parametrize("behaviour", ["status:503", "break-before"])
async def test_gemini_when_it_fails_before_much_was_sent_then_hardware_gets_all_of_a_large_upload(
    relay: RunningRelay, gemini: Backend, hardware: Backend, behaviour: str
) -> None:
    body = form("whisper", os.urandom(3 * MIB))
    gemini.always = behaviour

    async def waiting() -> AsyncIterator[bytes]:
        yield body[:100_000]
        await eventually(lambda: bool(hardware.seen), what="the fallback")
        yield body[100_000:]

    answer = await upload(relay, waiting())
    assert answer.headers["X-Credits-Backend"] == "hardware"
    assert hardware.last.sha256 == hashlib.sha256(body).hexdigest()
    assert await relay.spent() == (1, 0)


async def test_gemini_when_nothing_listens_there_then_hardware_gets_a_large_upload(
    start_relay: StartRelay, gemini: Backend, hardware: Backend
) -> None:
    relay = await start_relay(client_of("gemini", "http://127.0.0.1:1/v1"), client_of("hardware", hardware.url))
    body = form("whisper", os.urandom(3 * MIB))
    assert (await upload(relay, body)).headers["X-Credits-Backend"] == "hardware"
    assert hardware.last.sha256 == hashlib.sha256(body).hexdigest()
    assert gemini.seen == []


async def test_client_when_it_uploads_for_longer_than_the_backend_may_take_to_answer_then_it_is_served(
    start_relay: StartRelay, gemini: Backend
) -> None:
    """While the client's bytes are awaited, the backend's time does not run."""
    relay = await start_relay(client_of("gemini", gemini.url, timeout_s=0.2))
    began_s = time.monotonic()

    async def slow() -> AsyncIterator[bytes]:
        for piece in (form("whisper", b"sound")[:50], form("whisper", b"sound")[50:]):
            yield piece
            await eventually(lambda: time.monotonic() - began_s > 0.5)

    assert (await upload(relay, slow())).status == 200
    assert await relay.spent() == (1, 1)


# Refused, before the file is sent


@pytest.mark.parametrize("expect", [False, True])
async def test_upload_when_there_are_no_credits_then_402_comes_before_the_body(
    start_relay: StartRelay, gemini: Backend, expect: bool
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url), tiers=tiers(lifetime=0))
    more = ["Expect: 100-continue"] if expect else []
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
    writer.write(head(relay, f"Content-Type: {MULTIPART}", "Content-Length: 100000000", *more))
    answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    assert answer.startswith(b"HTTP/1.1 402 ")
    assert b"Connection: close" in answer
    await asyncio.wait_for(reader.readuntil(b"out_of_credits"), 5)
    writer.close()
    assert gemini.seen == []


async def test_upload_when_it_expects_100_continue_then_that_is_sent_once_credits_are_held(
    relay: RunningRelay, gemini: Backend
) -> None:
    body = form("whisper", b"sound")
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
    sized = f"Content-Length: {len(body)}"
    writer.write(head(relay, f"Content-Type: {MULTIPART}", sized, "Expect: 100-continue", "Connection: close"))
    assert await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5) == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert await held(relay) == 1
    writer.write(body)
    assert (await asyncio.wait_for(reader.read(), 5)).startswith(b"HTTP/1.1 200 ")
    writer.close()
    assert gemini.last.body == body
    assert await relay.spent() == (1, 1)


@pytest.mark.parametrize(
    ("content_type", "status", "code"),
    [
        ("application/json", 415, "unsupported_media_type"),
        ("multipart/mixed; boundary=b0undary", 415, "unsupported_media_type"),
        ("", 415, "unsupported_media_type"),
        ("multipart/form-data", 400, "invalid_body"),
        ("multipart/form-data; boundary=", 400, "invalid_body"),
        ("multipart/form-data; boundary=" + "x" * 71, 400, "invalid_body"),
    ],
)
async def test_upload_when_it_is_not_a_form_then_4xx_and_nothing_is_reserved(
    relay: RunningRelay, gemini: Backend, content_type: str, status: int, code: str
) -> None:
    answer = await upload(relay, form("m", b"x"), content_type)
    assert (answer.status, answer.code) == (status, code)
    assert await relay.limiter.row(relay.install_id) is None
    assert gemini.seen == []


@pytest.mark.parametrize("sized", [True, False])
async def test_upload_when_it_is_over_the_limit_then_413_and_nothing_stays_held(
    start_relay: StartRelay, gemini: Backend, sized: bool
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url), upload_limit_mb=1)
    body = form("whisper", b"s" * MIB)
    with suppress(aiohttp.ClientConnectionError):  # it may still be sending when it is refused
        answer = await upload(relay, body if sized else in_pieces(body))
        assert (answer.status, answer.code) == (413, "request_too_large")
    if sized:
        assert await relay.limiter.row(relay.install_id) is None
    else:
        await eventually(gemini.last.gone.is_set, what="the end of the call")
    assert await relay.spent() == (0, 0)
    assert (await upload(relay, form("whisper", b"s" * (MIB - 1000)))).status == 200


# Ended by the client


@pytest.mark.parametrize("leave", ["close", "abort"])
async def test_client_when_it_leaves_in_mid_upload_then_the_call_ends_and_the_hold_is_released(
    relay: RunningRelay, gemini: Backend, leave: str
) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", relay.port)
    writer.write(head(relay, f"Content-Type: {MULTIPART}", "Content-Length: 100000000") + form("m", b"x" * 200_000))
    await eventually(lambda: bool(gemini.seen) and gemini.last.received > 100_000, what="the start of the upload")
    assert await held(relay) == 1
    writer.close() if leave == "close" else writer.transport.abort()
    assert await eventually(gemini.last.gone.is_set, what="the end of the call") < 1
    assert await relay.spent() == (0, 0)


async def test_client_when_it_stops_uploading_then_408_and_it_is_not_a_failure_of_the_backend(
    start_relay: StartRelay, gemini: Backend, hardware: Backend
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url), client_of("hardware", hardware.url), upload_s=0.3)
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
    writer.write(head(relay, f"Content-Type: {MULTIPART}", "Content-Length: 100000000") + form("m", b"x" * 200_000))
    assert (await asyncio.wait_for(reader.readline(), 5)).startswith(b"HTTP/1.1 408 ")
    writer.close()
    await eventually(gemini.last.gone.is_set, what="the end of the call")
    assert hardware.seen == []
    assert await relay.spent() == (0, 0)


@pytest.mark.slow
async def test_client_when_it_stops_uploading_after_the_answer_began_then_the_answer_is_the_backends(
    start_relay: StartRelay, gemini: Backend
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url), upload_s=0.3)
    gemini.always = "stream:40:0.02"
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
    writer.write(head(relay, f"Content-Type: {MULTIPART}", "Content-Length: 100000000") + form("m", b"x" * 2000))
    received = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    assert received.startswith(b"HTTP/1.1 200 ")
    assert received.count(b"HTTP/1.1") == 1
    assert await relay.spent() == (1, 1)


async def test_upload_when_its_chunks_are_damaged_then_4xx_or_closed_and_nothing_stays_held(
    start_relay: StartRelay, gemini: Backend
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url), upload_s=0.5)
    received = await relay.raw(
        head(relay, f"Content-Type: {MULTIPART}", "Transfer-Encoding: chunked", "Connection: close")
        + b"5\r\n--b0u\r\nno chunk size\r\n\r\n"
    )
    assert received == b"" or re.match(rb"HTTP/1\.[01] 4", received), received[:200]
    assert await relay.spent() == (0, 0)


# Held back by the backend


async def test_backend_when_it_does_not_read_then_504_and_the_hold_is_released(
    start_relay: StartRelay, gemini: Backend
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url, timeout_s=0.3))
    gemini.reads.clear()
    body = form("whisper", bytes(40 * MIB))
    with suppress(aiohttp.ClientConnectionError):
        answer = await upload(relay, body)
        assert (answer.status, answer.code) == (504, "backend_timeout")
    assert await relay.spent() == (0, 0)


async def test_backend_when_it_reads_late_then_the_client_waits_and_nothing_is_lost(
    relay: RunningRelay, gemini: Backend
) -> None:
    gemini.reads.clear()
    body = form("whisper", os.urandom(24 * MIB))
    taken = 0

    async def counted() -> AsyncIterator[bytes]:
        nonlocal taken
        async for piece in in_pieces(body):
            yield piece
            taken += len(piece)

    sending = asyncio.ensure_future(upload(relay, counted()))
    before, same = -1, 0

    def stands_still() -> bool:
        nonlocal before, same
        same, before = (same + 1 if taken == before else 0), taken
        return same >= 20

    await eventually(stands_still, what="the end of what the relay takes")
    assert taken < 16 * MIB  # the buffers of two pairs of sockets
    gemini.reads.set()
    assert (await sending).status == 200
    assert gemini.last.sha256 == hashlib.sha256(body).hexdigest()


def memory_kib(pid: int) -> int:
    """The most memory that a process has had."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="tells memory by /proc")
@pytest.mark.usefixtures("redis")
async def test_uploads_when_they_are_of_100_mb_then_the_relay_does_not_grow(tmp_path: Path, redis_url: str) -> None:
    """Three at once, each with a mapped name, through a real relay to a real backend, each in its process."""
    backend = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.support.openai_backend", "--port", "0", cwd=ROOT, stdout=subprocess.PIPE
    )
    assert backend.stdout
    url = f"http://127.0.0.1:{int(await backend.stdout.readline())}"
    names = '[models]\nrecap = { hardware = "whisper" }\n'
    (tmp_path / "limiter.toml").write_text(f'[backends.hardware]\nurl = "{url}/v1"\n{names}')
    relay = Relay(tmp_path, "--redis", redis_url)
    piece = os.urandom(MIB)
    start, end = form("recap", b"|").split(b"|")

    async def body() -> AsyncIterator[bytes]:
        yield start
        for _ in range(100):
            yield piece
        yield end

    try:
        async with aiohttp.ClientSession() as session:

            async def send(parts: AsyncIterator[bytes]) -> int:
                headers = {"X-Install-Id": new_install(), "Content-Type": MULTIPART}
                async with session.post(relay.url + PATH, data=parts, headers=headers) as answer:
                    await answer.read()
                    return answer.status

            assert await send(in_pieces(form("recap", b"warm" * 1000))) == 200
            before = memory_kib(relay.process.pid)
            assert await asyncio.gather(*(send(body()) for _ in range(3))) == [200] * 3
            assert memory_kib(relay.process.pid) - before < 32 * 1024
            async with session.get(f"{url}/seen") as response:
                seen = json.loads(await response.read())
    finally:
        relay.stop()
        backend.kill()
        await backend.wait()
    expected = hashlib.sha256(start.replace(b"recap", b"whisper") + piece * 100 + end).hexdigest()
    assert [request["sha256"] for request in seen[1:]] == [expected] * 3
