"""Responses of misbehaving backends: a client gets an error or its own answer, never another's, and never a key."""

import asyncio
import gzip
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress

import pytest

from tests.support.relay import GEMINI_KEY, ONE_SERVER, RunningRelay, StartRelay, client_of

pytestmark = ONE_SERVER
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
GOOD = b'{"id": "good"}'
WHOLE = OK + b"Content-Length: %d\r\n\r\n%s" % (len(GOOD), GOOD)
EVIL = OK + b'Content-Length: 14\r\n\r\n{"id": "evil"}'


class Raw:
    """A backend that answers each request with the next of its scripts, byte for byte, and can then hang up."""

    def __init__(self) -> None:
        self.url = ""
        self.scripts: list[bytes | Iterator[bytes]] = []
        self.closes = False
        self.requests = 0
        self.connections = 0
        self.writer: asyncio.StreamWriter | None = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writer = writer
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                await reader.readexactly(int(head.partition(b"content-length: ")[2].split(b"\r\n")[0]))
                self.requests += 1
                script = self.scripts.pop(0)
                for part in [script] if isinstance(script, bytes) else script:
                    writer.write(part)
                    await writer.drain()
                if self.closes:
                    break
        writer.close()


@pytest.fixture
async def raw() -> AsyncIterator[Raw]:
    backend = Raw()
    server = await asyncio.start_server(backend.serve, "127.0.0.1", 0)
    backend.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    yield backend
    server.close()


@pytest.fixture
async def relay(start_relay: StartRelay, raw: Raw) -> RunningRelay:
    return await start_relay(client_of("gemini", raw.url, timeout_s=1))


def endless(part: bytes, start: bytes = b"") -> Iterator[bytes]:
    yield start
    for _ in range(200_000):
        yield part


@pytest.mark.parametrize(
    ("script", "status"),
    [
        (OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n0\r\n\r\n", 502),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n-5\r\nabc\r\n0\r\n\r\n", 502),
        (OK + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\nabc\r\n", 502),
        (OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!", 502),
        (OK + b"Content-Length: -5\r\n\r\nhello", 502),
        (OK + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 502),
        (OK + b"X: " + b"x" * 100_000 + b"\r\n\r\n", 502),
        (OK + b"X" * 100_000 + b": x\r\n\r\n", 502),
        (OK + b"".join(b"X-%d: x\r\n" % n for n in range(5000)) + b"\r\n", 502),
        (b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\nhello", 502),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 502),
        (b"HTTP/1.1 304 Not Modified\r\n\r\n", 502),
        (b"HTTP/1.1 999 Odd\r\nContent-Length: 2\r\n\r\n{}", 502),
        (b"HTTP/1.1 000 Odd\r\nContent-Length: 2\r\n\r\n{}", 502),
        (b"HTTP/1.1 2000 OK\r\nContent-Length: 2\r\n\r\n{}", 502),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 502),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 502),
        (b"{}", 502),
        (b"", 502),
    ],
    ids=lambda part: ascii(part[17:70]) if isinstance(part, bytes) else None,
)
async def test_answer_when_it_is_not_http_then_502_and_nothing_is_debited(
    relay: RunningRelay, raw: Raw, script: bytes, status: int
) -> None:
    raw.scripts, raw.closes = [script], True
    answer = await relay.ask()
    assert (answer.status, answer.code) == (status, "backend_unavailable")
    assert await relay.spent() == (0, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "script",
    [
        lambda: endless(b"X-Endless: x\r\n", OK),
        lambda: endless(b"x" * 1000, OK + b"X: "),
        lambda: endless(b"HTTP/1.1 100 Continue\r\n\r\n"),
        lambda: endless(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"),
        lambda: endless(b"x" * 1000, OK + b"Transfer-Encoding: chunked\r\n\r\n5;"),
    ],
    ids=["headers", "header", "100", "103", "chunk extension"],
)
async def test_head_when_it_never_ends_then_an_error_within_the_backends_time(
    relay: RunningRelay, raw: Raw, script: Callable[[], Iterator[bytes]]
) -> None:
    raw.scripts = [script()]
    answer = await asyncio.wait_for(relay.ask(), 8)
    assert answer.status in {502, 504}
    assert await relay.spent() == (0, 0)


@pytest.mark.parametrize("early", [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"])
async def test_answer_when_an_interim_one_precedes_it_then_it_is_passed(
    relay: RunningRelay, raw: Raw, early: bytes
) -> None:
    raw.scripts = [early + WHOLE]
    answer = await relay.ask()
    assert (answer.status, answer.body) == (200, GOOD)
    assert "Link" not in answer.headers
    assert await relay.spent() == (1, 1)


@pytest.mark.parametrize(
    "first",
    [
        WHOLE + EVIL,
        WHOLE + b"garbage",
        OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n" + EVIL,
        b"HTTP/1.1 204 No Content\r\n\r\n" + EVIL,
        b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}" + EVIL,
    ],
    ids=["another answer", "garbage", "after chunks", "after 204", "after 400"],
)
async def test_connection_when_surplus_bytes_arrive_on_it_then_no_other_client_gets_them(
    relay: RunningRelay, raw: Raw, first: bytes
) -> None:
    raw.scripts = [first, WHOLE, WHOLE]
    before = await relay.ask()
    assert b"evil" not in before.body
    for _ in range(2):
        assert (await relay.ask()).body == GOOD
    assert raw.requests == 3


@pytest.mark.parametrize("size", [10, 100_000], ids=["in one write", "bit by bit"])
@pytest.mark.parametrize("unasked", [EVIL, b"garbage"])
async def test_connection_when_an_unsolicited_response_arrives_then_no_client_gets_it_and_another_connection_serves(
    relay: RunningRelay, raw: Raw, unasked: bytes, size: int
) -> None:
    raw.scripts = [WHOLE, WHOLE, WHOLE]
    assert (await relay.ask()).body == GOOD
    assert raw.writer
    raw.writer.write(unasked)
    await raw.writer.drain()
    for _ in range(2):
        asked = await relay.ask(user="x" * size)
        assert (asked.status, asked.body) == (200, GOOD)


@pytest.mark.parametrize("cut", [b'{"id', b""])
async def test_body_when_it_is_shorter_than_it_says_then_502_and_nothing_is_debited(
    relay: RunningRelay, raw: Raw, cut: bytes
) -> None:
    raw.scripts, raw.closes = [OK + b"Content-Length: 100\r\n\r\n" + cut], True
    assert (await relay.ask()).status == 502
    assert await relay.spent() == (0, 0)


@pytest.mark.parametrize(
    "header",
    [
        b"OpenAI-Version: a\r\n X-Injected: b",
        b"OpenAI-Version: a\rX-Injected: b",
        b"OpenAI-Version: a\0b",
        b"X-Request-Id: theirs\r\nX-Credits-Backend: theirs\r\nRateLimit: theirs\r\nIdempotency-Replayed: true",
        b"Set-Cookie: session=theirs\r\nConnection: X-Odd\r\nX-Odd: theirs\r\nLocation: http://theirs",
        b"Access-Control-Allow-Origin: *\r\nRetry-After: theirs\r\nX-Licence: theirs\r\nx-should-retry: theirs",
    ],
    ids=["folded", "bare CR", "NUL", "the relay's own", "cookie", "other"],
)
async def test_headers_when_a_backend_sends_unknown_ones_then_the_client_sees_none_of_them(
    relay: RunningRelay, raw: Raw, header: bytes
) -> None:
    raw.scripts = [OK + header + b"\r\nContent-Length: 2\r\n\r\n{}"]
    raw.closes = True
    answer = await relay.ask()
    assert answer.status in {200, 502}
    assert "X-Injected" not in answer.headers
    assert "theirs" not in str(answer.headers)
    assert all(value.isprintable() for value in answer.headers.values())


@pytest.mark.parametrize("status", [b"200 OK", b"400 Bad Request", b"422 Odd"])
async def test_headers_when_one_quotes_the_operators_key_then_the_client_does_not_see_it(
    relay: RunningRelay, raw: Raw, status: bytes
) -> None:
    key = GEMINI_KEY.encode()
    head = b"HTTP/1.1 " + status + b"\r\nContent-Type: application/json; x=" + key + b"\r\nOpenAI-Version: " + key
    raw.scripts = [head + b"\r\nCache-Control: " + key + b"\r\nContent-Length: 2\r\n\r\n{}"]
    answer = await relay.ask()
    assert answer.status == int(status[:3])
    assert GEMINI_KEY not in str(answer.headers)


async def test_refusal_when_it_is_a_bomb_then_it_is_not_unpacked_whole(relay: RunningRelay, raw: Raw) -> None:
    bomb = gzip.compress(b"x" * (64 << 20), 9)
    head = b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nContent-Encoding: gzip\r\n"
    raw.scripts = [head + b"Content-Length: %d\r\n\r\n" % len(bomb) + bomb]
    answer = await relay.ask()
    assert answer.status == 400  # it stays a refusal, or hardware would serve and debit it
    assert len(answer.body) < 10_000


async def test_answer_when_it_is_a_bomb_then_it_passes_packed(relay: RunningRelay, raw: Raw) -> None:
    bomb = gzip.compress(b"x" * (64 << 20), 9)
    raw.scripts = [OK + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb) + bomb]
    assert (await relay.ask(headers={"Accept-Encoding": "gzip"})).body == bomb
