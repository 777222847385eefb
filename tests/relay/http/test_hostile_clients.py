"""Requests of misbehaving clients: a clear 4xx or a closed connection, never a 500, and nothing stays held."""

import asyncio
import gzip
import json
import logging
import re
import subprocess
import sys
from collections.abc import AsyncIterator

import aiohttp
import pytest

from tests.support.openai_backend import Backend
from tests.support.paths import ROOT
from tests.support.relay import CHAT, ONE_SERVER, RunningRelay, StartRelay, client_of, tiers
from tests.support.wait import eventually

pytestmark = ONE_SERVER
BODY = b'{"model": "plain"}'


def request(
    relay: RunningRelay, *headers: bytes, body: bytes = BODY, start: bytes = b"POST /v1/chat/completions HTTP/1.1"
) -> bytes:
    """A request by hand; without a Content-Length unless it is among the headers."""
    install_id = relay.install_id.encode()
    head = [start, b"Host: relay", b"Content-Type: application/json", b"X-Install-Id: " + install_id, *headers]
    return b"\r\n".join([*head, b"", body])


SIZED = b"Content-Length: %d" % len(BODY)
CLOSE = b"Connection: close"


@pytest.fixture
async def attacked(relay: RunningRelay, caplog: pytest.LogCaptureFixture) -> AsyncIterator[RunningRelay]:
    """A relay that, after the attack, serves as before and has logged no fault of its own."""
    yield relay
    assert [record.getMessage() for record in caplog.records if "unexpected" in record.getMessage()] == []
    await relay.settled()
    before = await relay.spent()
    assert (await relay.ask()).status == 200
    assert await relay.spent() == (before[0] + 1, before[1] + 1)


def assert_refused(received: bytes) -> None:
    assert received == b"" or re.match(rb"HTTP/(?:0\.9|1\.[01]) 4\d\d ", received), received[:300]
    assert b"Traceback" not in received


@pytest.mark.parametrize(
    "headers",
    [
        [b"Content-Length: -1"],
        [b"Content-Length: x"],
        [b"Content-Length: 1e3"],
        [b"Content-Length: 99999999999999999999999"],
        [b"Content-Length: 18", b"Content-Length: 19"],
        [SIZED, b"Transfer-Encoding: chunked"],
        [b"Transfer-Encoding: chunked, identity"],
        [b"X: " + b"x" * 100_000, SIZED],
        [b"X" * 10_000 + b": x", SIZED],
        [b"X-%d: x" % number for number in range(5000)],
        [b"X: a\0b", SIZED],
        [b"X : a", SIZED],
        [b": a", SIZED],
        [b"no colon", SIZED],
        [b" folded: a", SIZED],
    ],
    ids=lambda headers: headers[0][:24].decode(errors="replace") + f" and {len(headers) - 1}",
)
async def test_head_when_it_is_malformed_then_400_or_closed(
    attacked: RunningRelay, gemini: Backend, headers: list[bytes]
) -> None:
    assert_refused(await attacked.raw(request(attacked, *headers)))
    assert gemini.seen == []


@pytest.mark.parametrize(
    "sent",
    [
        b"\r\n\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 64,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /healthz\r\n\r\n",
        b"GET /healthz HTTP/9.9\r\n\r\n",
        b"ODD /healthz HTTP/1.1\r\nHost: a\r\n\r\n",
        b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org\r\nConnection: close\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        b"GET http://example.org/ HTTP/1.1\r\nHost: example.org\r\nConnection: close\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /v1/../healthz/%00%ff HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
    ],
    ids=lambda sent: ascii(sent[:24]),
)
async def test_bytes_when_they_are_not_a_valid_request_then_4xx_or_closed(attacked: RunningRelay, sent: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", attacked.port)
    try:
        writer.write(sent)
        writer.write_eof()
        assert_refused(await asyncio.wait_for(reader.read(), 5))
    except ConnectionResetError:
        pass
    finally:
        writer.close()


@pytest.mark.parametrize(
    "chunks",
    [
        b"zz\r\nabc\r\n0\r\n\r\n",
        b"-1\r\n\r\n",
        b"5\r\nabcdefgh\r\n0\r\n\r\n",
        b"fffffffffffffffffffff\r\na\r\n",
    ],
    ids=["no number", "negative", "too long", "too large"],
)
async def test_chunked_body_when_it_is_malformed_then_400_or_closed(
    attacked: RunningRelay, gemini: Backend, chunks: bytes
) -> None:
    assert_refused(await attacked.raw(request(attacked, b"Transfer-Encoding: chunked", CLOSE, body=chunks)))
    assert gemini.seen == []


@pytest.mark.parametrize("rest", [b"", b"1;" + b"x" * 100_000])
async def test_body_when_it_stops_in_the_middle_then_408_in_the_end(
    start_relay: StartRelay, gemini: Backend, rest: bytes
) -> None:
    attacked = await start_relay(client_of("gemini", gemini.url), upload_s=0.2)
    reader, writer = await asyncio.open_connection("127.0.0.1", attacked.port)
    writer.write(request(attacked, b"Transfer-Encoding: chunked", body=b'9\r\n{"model":\r\n'))
    server = attacked.runner.server
    await eventually(lambda: bool(server and server.requests_count))
    writer.write(rest)
    assert (await asyncio.wait_for(reader.readline(), 5)).startswith(b"HTTP/1.1 408 ")
    writer.close()
    assert await attacked.limiter.row(attacked.install_id) is None
    assert gemini.seen == []


@pytest.mark.parametrize("leave", ["close", "abort"])
async def test_body_when_the_client_leaves_before_its_end_then_nothing_is_reserved(
    attacked: RunningRelay, gemini: Backend, leave: str
) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", attacked.port)
    writer.write(request(attacked, b"Content-Length: 100000"))
    server = attacked.runner.server
    await eventually(lambda: bool(server and server.requests_count))
    writer.close() if leave == "close" else writer.transport.abort()
    await eventually(lambda: bool(server and not server.connections))
    assert await attacked.limiter.row(attacked.install_id) is None
    assert gemini.seen == []


@pytest.mark.parametrize("encoding", [b"gzip", b"deflate", b"br", b"odd", b"gzip, gzip"])
async def test_packed_body_when_sent_then_415_and_it_is_never_unpacked(
    attacked: RunningRelay, gemini: Backend, encoding: bytes
) -> None:
    body = gzip.compress(BODY)
    sized = b"Content-Length: %d" % len(body)
    received = await attacked.raw(request(attacked, b"Content-Encoding: " + encoding, sized, CLOSE, body=body))
    assert_refused(received)
    assert b" 415 " in received[:16], received
    assert gemini.seen == []


async def test_packed_bombs_when_left_half_way_then_the_relay_does_not_grow(
    start_relay: StartRelay, gemini: Backend
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url))
    bomb = gzip.compress(b'{"model": "' + b"x" * (30 << 20) + b'"}', 9)
    assert len(bomb) < 1 << 16
    for _ in range(8):
        answer = await relay.send(
            "POST", CHAT, bomb, Content_Type="application/json", Content_Encoding="gzip", X_Install_Id=relay.install_id
        )
        assert (answer.status, answer.code) == (415, "packed_body")
    assert gemini.seen == []


@pytest.mark.parametrize("depth", [300, 1000, 100_000])
@pytest.mark.parametrize("mapped", [False, True])
async def test_body_when_it_is_nested_deeply_then_it_passes_or_400(
    start_relay: StartRelay, gemini: Backend, depth: int, mapped: bool
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url, models={"m": "plain"} if mapped else {}))
    body = b'{"model": "m", "x": ' + b"[" * depth + b"]" * depth + b"}"
    answer = await relay.send("POST", CHAT, body, Content_Type="application/json", X_Install_Id=relay.install_id)
    if answer.status == 200:
        assert gemini.last.body == (body.replace(b'"m"', b'"plain"') if mapped else body)
        assert await relay.spent() == (1, 1)
    else:
        assert (answer.status, answer.code) == (400, "invalid_json")
        assert await relay.spent() == (0, 0)
        assert gemini.seen == []


@pytest.mark.parametrize(
    "header", [b"Accept: \xff\xfe", b"OpenAI-Beta: \xc3\xa9\xff", b"Accept-Encoding: \xff", b"Accept: a\tb"]
)
async def test_header_when_it_is_not_ascii_then_it_is_not_passed_on(
    attacked: RunningRelay, gemini: Backend, header: bytes
) -> None:
    received = await attacked.raw(request(attacked, header, SIZED, CLOSE))
    assert received.startswith(b"HTTP/1.1 200 ")
    assert "\ufffd" not in str(gemini.last.headers)
    assert gemini.last.headers.get("OpenAI-Beta") is None


async def test_content_type_when_its_parameters_are_not_ascii_then_4xx_or_served(attacked: RunningRelay) -> None:
    received = await attacked.raw(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\nX-Install-Id: %s\r\n"
        b"Content-Type: application/json; x=\xff\r\n%s\r\n\r\n%s" % (attacked.install_id.encode(), SIZED, BODY)
    )
    assert received[:12] in {b"HTTP/1.1 200", b"HTTP/1.1 415", b"HTTP/1.1 400"}


@pytest.mark.parametrize(
    "headers",
    [
        [b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Version: 13", b"Sec-WebSocket-Key: AAAA"],
        [b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABk"],
    ],
    ids=["websocket", "h2c"],
)
@pytest.mark.parametrize("start", [b"POST /v1/chat/completions HTTP/1.1", b"GET /v1/credits HTTP/1.1"])
async def test_upgrade_when_it_is_requested_then_it_is_not_made(
    attacked: RunningRelay, headers: list[bytes], start: bytes
) -> None:
    """It is served as if no upgrade had been requested, or refused; either way as HTTP/1.1."""
    reader, writer = await asyncio.open_connection("127.0.0.1", attacked.port)
    writer.write(request(attacked, *headers, SIZED, start=start))
    line = await asyncio.wait_for(reader.readline(), 5)
    writer.close()
    assert line.startswith((b"HTTP/1.1 2", b"HTTP/1.1 4")), line


async def test_expect_when_it_is_100_continue_then_that_is_sent(attacked: RunningRelay) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", attacked.port)
    writer.write(request(attacked, SIZED, CLOSE, b"Expect: 100-continue", body=b""))
    assert await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5) == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(BODY)
    assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
    writer.close()


async def test_expect_when_it_is_unknown_then_417(attacked: RunningRelay, gemini: Backend) -> None:
    received = await attacked.raw(request(attacked, SIZED, CLOSE, b"Expect: a-cookie"))
    assert received.startswith(b"HTTP/1.1 417 ")
    assert gemini.seen == []


async def test_requests_when_they_are_pipelined_then_each_is_served_in_its_order(attacked: RunningRelay) -> None:
    sent = request(attacked, SIZED) * 3 + request(attacked, SIZED, CLOSE)
    received = await attacked.raw(sent)
    assert received.count(b"HTTP/1.1 200 OK") == 4
    assert await attacked.spent() == (4, 4)


async def test_requests_when_they_are_smuggled_behind_a_body_then_they_are_requests_of_their_own(
    attacked: RunningRelay, gemini: Backend
) -> None:
    inner = request(attacked, CLOSE, start=b"GET /v1/credits HTTP/1.1", body=b"")
    received = await attacked.raw(request(attacked, SIZED, body=BODY + inner))
    assert received.count(b"HTTP/1.1 200 OK") == 2
    assert [seen.path for seen in gemini.seen] == [CHAT]


# Slow readers, against a backend in a process of its own that pours as fast as it is taken


@pytest.fixture
async def pouring() -> AsyncIterator[str]:
    """The URL of a backend process."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.support.openai_backend", "--port", "0", cwd=ROOT, stdout=subprocess.PIPE
    )
    assert process.stdout
    yield f"http://127.0.0.1:{int(await process.stdout.readline())}"
    process.kill()
    await process.wait()


async def seen_by(url: str) -> list[dict[str, float]]:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/seen") as response:
        seen: list[dict[str, float]] = json.loads(await response.read())
        return seen


@pytest.mark.parametrize("kind", ["stream", "body"])
async def test_reader_when_it_does_not_read_then_the_backend_is_held_back_and_the_relay_does_not_grow(
    start_relay: StartRelay, pouring: str, kind: str
) -> None:
    relay = await start_relay(client_of("gemini", f"{pouring}/v1"), tiers=tiers(lifetime=9))

    async def taken() -> float:
        return (await seen_by(pouring))[0]["sent"]

    async with relay.connect(f"pour:{kind}") as (reader, _):
        await reader.readuntil(b"\r\n\r\n")
        before, same = -1.0, 0

        async def stands_still() -> bool:
            nonlocal before, same
            now = await taken()
            same, before = (same + 1 if now == before else 0), now
            return same >= 20

        await eventually(stands_still, what="the end of what the relay takes")
        assert before < 24 << 20  # buffers of three sockets and of this reader; a second of pouring is gigabytes
        await reader.readexactly(48 << 20)
        assert await taken() > 48 << 20  # it continues when the client reads

    async def has_ended() -> bool:
        return (await seen_by(pouring))[0]["gone_s"] is not None

    assert await eventually(has_ended, what="the end of the call") < 1
    assert await relay.spent() == (1, 1)


async def test_readers_when_many_leave_at_once_then_every_call_ends(start_relay: StartRelay, pouring: str) -> None:
    relay = await start_relay(client_of("gemini", f"{pouring}/v1"), tiers=tiers(lifetime=50))

    async def one() -> None:
        async with relay.connect("pour:stream") as (reader, _):
            await reader.readexactly(100_000)

    await asyncio.gather(*(one() for _ in range(30)))

    async def has_ended() -> bool:
        return all(seen["gone_s"] is not None for seen in await seen_by(pouring))

    await eventually(has_ended, what="the end of every call")
    assert await relay.spent() == (30, 30)


async def test_log_when_a_client_leaves_then_it_has_no_error(
    relay: RunningRelay, gemini: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    async with relay.connect("hang"):
        await gemini.arrived.wait()
    await gemini.last.gone.wait()
    assert await relay.spent() == (0, 0)
    assert caplog.records == []
