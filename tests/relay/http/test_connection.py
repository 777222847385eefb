"""Invalid requests and idle clients: each gets the error object or a closed connection, never an HTML page."""

import asyncio
import json
import logging
import re
import socket
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from limiter.relay.app import routes
from limiter.relay.telemetry.metrics import METRICS
from tests.support.openai_backend import Backend, Document
from tests.support.relay import CHAT, ONE_SERVER, RunningRelay, StartRelay, client_of, new_install, tiers
from tests.support.wait import eventually

pytestmark = ONE_SERVER
UPLOAD = "/v1/audio/transcriptions"
LONG = b"x" * 9000


def problem_in(received: bytes) -> tuple[int, Document]:
    """Parse the one answer in the received bytes, and check that it is the error object with a request id."""
    assert len(re.findall(rb"HTTP/\d\.\d \d{3} ", received)) == 1, received
    head, _, body = received.partition(b"\r\n\r\n")
    start, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    status = int(start.split(" ")[1])
    document: Document = json.loads(body)
    assert headers["content-type"].partition(";")[0] == "application/json"
    assert document["status"] == status
    assert document["instance"] == f"urn:limiter:request:{headers['x-request-id']}"
    assert "server" not in headers
    return status, document


def counted(relay: RunningRelay, status: int) -> bool:
    sample = f'limiter_requests_total{{method="other",route="other",status="{status}"}} 1.0'
    return sample in relay.app[METRICS].render().decode()


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"GET /healthz HTTP/9.9\r\n\r\n", 400, "malformed_request"),
        (b"no http at all\r\n\r\n", 400, "malformed_request"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 64, 400, "malformed_request"),
        (b"GET /healthz HTTP/1.1\r\n\r\n", 400, "malformed_request"),
        (b"GET /healthz HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400, "malformed_request"),
        (b"GET /healthz HTTP/1.1\r\nHost: a\r\nX : a\r\n\r\n", 400, "malformed_request"),
        (b"GET /healthz HTTP/1.1\r\nHost: a\r\nX: a\r\n folded\r\n\r\n", 400, "malformed_request"),
        (b"POST /v1/credits HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n", 400, "malformed_request"),
        (
            b"POST /v1/credits HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
            400,
            "malformed_request",
        ),
        (
            b"POST /v1/credits HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
            400,
            "malformed_request",
        ),
        (b"GET /" + LONG + b" HTTP/1.1\r\nHost: a\r\n\r\n", 431, "head_too_large"),
        (b"GET /healthz HTTP/1.1\r\nHost: a\r\nX: " + LONG + b"\r\n\r\n", 431, "head_too_large"),
        (b"GET /healthz HTTP/1.1\r\nHost: a\r\n" + LONG + b": x\r\n\r\n", 431, "head_too_large"),
        (b"GET /healthz HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 200 + b"\r\n", 431, "head_too_large"),
    ],
    ids=lambda part: ascii(part[:40]) if isinstance(part, bytes) else None,
)
async def test_bytes_when_they_are_not_a_request_then_the_error_object_a_log_line_and_a_count(
    relay: RunningRelay, caplog: pytest.LogCaptureFixture, sent: bytes, status: int, code: str
) -> None:
    caplog.set_level(logging.INFO)
    answered, document = problem_in(await relay.raw(sent))
    assert (answered, document["error"]["code"]) == (status, code)
    (record,) = caplog.records
    assert (record.name, record.levelno, record.exc_info) == ("limiter.request", logging.INFO, None)
    assert record.__dict__["status"] == status
    assert record.__dict__["request_id"] in document["instance"]
    assert counted(relay, status)


@pytest.mark.parametrize(("method", "path"), [*routes(), ("GET", "/nowhere"), ("PUT", CHAT)])
async def test_expect_when_it_is_unknown_then_417_on_every_path(
    relay: RunningRelay, gemini: Backend, method: str, path: str
) -> None:
    head = f"{method} {path} HTTP/1.1\r\nHost: a\r\nX-Install-Id: {relay.install_id}\r\nConnection: close\r\n"
    status, document = problem_in(await relay.raw(f"{head}Expect: a-cookie\r\n\r\n".encode()))
    assert (status, document["error"]["code"]) == (417, "expectation_failed")
    assert gemini.seen == []


@pytest.mark.parametrize("expected", ["a-cookie", "100-continue"])
@pytest.mark.parametrize("path", [CHAT, UPLOAD])
async def test_expect_when_the_client_speaks_http_1_0_then_it_is_ignored(
    relay: RunningRelay, path: str, expected: str
) -> None:
    """A 100 would be taken for the answer."""
    kind, body = "application/json", b'{"model": "plain"}'
    if path == UPLOAD:
        kind = "multipart/form-data; boundary=b"
        body = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nplain\r\n--b--\r\n'
    head = f"POST {path} HTTP/1.0\r\nX-Install-Id: {relay.install_id}\r\nContent-Type: {kind}\r\nExpect: {expected}\r\n"
    received = await relay.raw(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    assert received.startswith(b"HTTP/1.0 200 ")
    assert received.count(b"HTTP/1.") == 1


@pytest.mark.parametrize(("method", "path"), routes())
async def test_method_when_a_path_does_not_take_it_then_405_with_those_that_it_does(
    relay: RunningRelay, method: str, path: str
) -> None:
    takes = {"GET", "HEAD"} if method == "GET" else {"POST"}
    for other in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"} - takes:
        answer = await relay.send(other, path.format(id="m"))
        assert answer.status == 405
        assert set(answer.headers["Allow"].split(",")) == takes
        assert answer.headers["Content-Type"] == "application/json"
        assert len(answer.headers["X-Request-Id"]) == 32
        if other != "HEAD":
            assert answer.code == "method_not_allowed"


@pytest.mark.parametrize(
    "path", ["/", "/v1", "/v1/", "/v1/models/", "//healthz", "/v1/chat/completions/", "/V1/models"]
)
async def test_path_when_it_is_unknown_then_404_whatever_the_method(relay: RunningRelay, path: str) -> None:
    for method in ("GET", "HEAD", "POST", "OPTIONS", "DELETE"):
        answer = await relay.send(method, path)
        assert (answer.status, len(answer.headers["X-Request-Id"])) == (404, 32)
        assert method == "HEAD" or answer.code == "unknown_path"


@pytest.mark.parametrize("path", [path.format(id="m") for method, path in routes() if method == "GET"])
async def test_head_when_the_path_can_be_read_with_get_then_only_its_head_is_sent(
    relay: RunningRelay, path: str
) -> None:
    answer = await relay.send("HEAD", path, None, X_Install_Id=relay.install_id)
    assert (answer.status, answer.body) == (200, b"")


async def test_failure_when_no_middleware_sees_it_then_the_error_object(
    relay: RunningRelay, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(_request: web.Request) -> web.StreamResponse:
        raise RuntimeError("of its own")

    assert relay.runner.server
    monkeypatch.setattr(relay.runner.server, "request_handler", broken)
    received = await relay.raw(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
    assert received.startswith(b"HTTP/1.1 500 ")
    assert json.loads(received.partition(b"\r\n\r\n")[2])["error"]["code"] == "internal_error"
    assert "of its own" in caplog.text


# Bodies that break, or arrive slowly


@pytest.mark.parametrize(
    "rest", [b"no chunk\r\n\r\n", b"zz\r\nabc\r\n", b"-1\r\n\r\n", b"fffffffffffffffffffff\r\na\r\n"]
)
@pytest.mark.parametrize(("path", "kind"), [(CHAT, "application/json"), (UPLOAD, "multipart/form-data; boundary=b")])
async def test_body_when_it_breaks_in_the_middle_then_400_at_once_and_no_other_answer(
    relay: RunningRelay, path: str, kind: str, rest: bytes
) -> None:
    """A second answer would be taken by a proxy for that to the next client's request."""
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nX-Install-Id: {relay.install_id}\r\nContent-Type: {kind}\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
    writer.write(f"{head}Transfer-Encoding: chunked\r\n\r\n9\r\n--b\r\nabcd\r\n".encode())
    server = relay.runner.server
    await eventually(lambda: bool(server and server.requests_count))
    writer.write(rest)
    status, document = problem_in(await asyncio.wait_for(reader.read(), 5))
    writer.close()
    assert (status, document["error"]["code"]) == (400, "invalid_body")
    assert await relay.spent() == (0, 0)


async def test_body_when_its_chunks_have_extensions_and_trailers_then_neither_passes(
    relay: RunningRelay, gemini: Backend
) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nX-Install-Id: {relay.install_id}\r\nContent-Type: application/json\r\n"
    chunks = b'12;ext="a;b"\r\n{"model": "plain"}\r\n0;last\r\nX-Install-Id: %s\r\nOpenAI-Beta: odd\r\n\r\n'
    sent = head.encode() + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n" + chunks % new_install().encode()
    received = await relay.raw(sent)
    assert received.startswith(b"HTTP/1.1 200 ")
    assert gemini.last.body == b'{"model": "plain"}'
    assert not {"Openai-Beta", "OpenAI-Beta", "X-Install-Id"} & set(gemini.last.headers)
    assert await relay.spent() == (1, 1)


async def test_model_when_its_name_contains_a_newline_then_it_adds_no_header(
    relay: RunningRelay, gemini: Backend
) -> None:
    assert (await relay.ask("plain\r\nX-Injected: a")).status == 200
    assert "X-Injected" not in gemini.last.headers
    assert gemini.last.document["model"] == "plain\r\nX-Injected: a"


@pytest.fixture
async def impatient(start_relay: StartRelay, gemini: Backend) -> RunningRelay:
    """A relay that waits for no client."""
    return await start_relay(
        client_of("gemini", gemini.url), tiers=tiers(lifetime=9), keepalive_s=0.4, write_idle_s=0.4, upload_s=0.4
    )


HEALTH = b"GET /healthz HTTP/1.1\r\nHost: a\r\n"
LARGE = b"".join(b"X-%d: %s\r\n" % (number, b"x" * 8000) for number in range(9))


@pytest.mark.parametrize("pause_s", [0, 0.02])
@pytest.mark.parametrize("end", [b"\r\n", b""], ids=["whole", "unfinished"])
async def test_head_when_all_its_headers_are_larger_than_64_kib_then_431_whether_or_not_it_ends(
    relay: RunningRelay, end: bytes, pause_s: float
) -> None:
    """Each header alone is small enough."""
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
    for part in (HEALTH, LARGE, end):
        writer.write(part)
        await asyncio.sleep(pause_s)
    status, document = problem_in(await asyncio.wait_for(reader.read(), 5))
    writer.close()
    assert (status, document["error"]["code"]) == (431, "head_too_large")
    assert await _none_open(relay)


async def test_head_when_it_is_too_large_behind_a_running_request_then_that_is_served_first(
    relay: RunningRelay, gemini: Backend
) -> None:
    async with relay.connect("wait") as (reader, writer):
        await eventually(lambda: len(gemini.seen) == 1)
        writer.write(HEALTH + LARGE)
        await writer.drain()
        await asyncio.sleep(0.05)
        gemini.go_on.set()
        received = await asyncio.wait_for(reader.read(), 5)
    assert [int(status) for status in re.findall(rb"HTTP/1\.\d (\d{3}) ", received)] == [200, 431]


async def test_body_when_it_is_large_then_its_end_is_not_taken_for_a_head(relay: RunningRelay) -> None:
    body = json.dumps({"model": "plain", "messages": [{"role": "user", "content": "x" * 300_000}]}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nX-Install-Id: {relay.install_id}\r\nContent-Type: application/json\r\n"
    one = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    received = await relay.raw(one * 3 + HEALTH + b"Connection: close\r\n\r\n")
    assert [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", received)] == [200] * 4


async def test_head_when_it_takes_longer_than_it_may_then_the_connection_ends_but_an_idle_one_stays(
    start_relay: StartRelay, gemini: Backend
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url), head_s=0.3)
    idle = await asyncio.open_connection("127.0.0.1", relay.port)
    slow = await asyncio.open_connection("127.0.0.1", relay.port)
    slow[1].write(HEALTH)
    assert await asyncio.wait_for(slow[0].read(), 5) == b""
    idle[1].write(HEALTH + b"\r\n")
    assert (await asyncio.wait_for(idle[0].readline(), 5)).startswith(b"HTTP/1.1 200 ")
    for _, writer in (idle, slow):
        writer.close()


async def test_head_when_it_begins_while_a_request_runs_then_that_request_is_served(
    start_relay: StartRelay, gemini: Backend
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url), head_s=0.2)
    async with relay.connect("wait") as (reader, writer):
        await eventually(lambda: len(gemini.seen) == 1)
        writer.write(HEALTH)
        await asyncio.sleep(0.5)
        gemini.go_on.set()
        assert (await asyncio.wait_for(reader.read(), 5)).startswith(b"HTTP/1.1 200 ")


# Expect: 100-continue


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        (f"Content-Length: {1 << 30}", 413, "request_too_large"),
        ("Content-Length: 100\r\nContent-Encoding: gzip", 415, "packed_body"),
        ("Content-Length: 100\r\nAuthorization: Bearer a.b.c", 401, "invalid_licence"),
    ],
)
async def test_expect_when_the_head_shows_that_a_request_is_refused_then_the_body_is_not_asked_for(
    relay: RunningRelay, headers: str, status: int, code: str
) -> None:
    """The connection closes, as nobody knows whether the body comes all the same."""
    head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nX-Install-Id: {relay.install_id}\r\nContent-Type: application/json\r\n"
    received = await relay.raw(f"{head}Expect: 100-continue\r\n{headers}\r\n\r\n".encode())
    answered, document = problem_in(received)
    assert (answered, document["error"]["code"]) == (status, code)
    assert b"\r\nConnection: close\r\n" in received


async def test_expect_when_the_head_is_right_then_the_body_is_asked_for_once(relay: RunningRelay) -> None:
    body = b'{"model": "plain"}'
    head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nX-Install-Id: {relay.install_id}\r\nContent-Type: application/json\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
    writer.write(f"{head}Expect: 100-continue\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode())
    assert await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5) == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(body)
    received = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    assert received.startswith(b"HTTP/1.1 200 ")
    assert received.count(b"HTTP/1.1 ") == 1


async def _none_open(relay: RunningRelay) -> bool:
    await eventually(lambda: relay.runner.connections() == 0)
    return True


async def connections(relay: RunningRelay) -> int:
    return len(relay.runner.server.connections) if relay.runner.server else 0


async def dribble(writer: asyncio.StreamWriter, sent: bytes) -> None:
    """Send byte by byte, for ever."""
    while not writer.is_closing():
        writer.write(sent)
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("begun", [b"", b"GET /heal", b"GET /healthz HTTP/1.1\r\nHost: a\r\nX: "])
async def test_head_when_it_arrives_byte_by_byte_then_the_connection_ends(
    impatient: RunningRelay, begun: bytes
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", impatient.port)
    writer.write(begun)
    dribbling = asyncio.create_task(dribble(writer, b"x" if begun else b""))
    try:
        assert await asyncio.wait_for(reader.read(), 5) == b""
    except ConnectionResetError:
        pass
    finally:
        dribbling.cancel()
        writer.close()


@pytest.mark.parametrize(("path", "kind"), [(CHAT, "application/json"), (UPLOAD, "multipart/form-data; boundary=b")])
async def test_body_when_it_arrives_byte_by_byte_then_408(impatient: RunningRelay, path: str, kind: str) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nX-Install-Id: {impatient.install_id}\r\nContent-Type: {kind}\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", impatient.port)
    writer.write(f"{head}Content-Length: 100000\r\n\r\n".encode())
    dribbling = asyncio.create_task(dribble(writer, b"x"))
    assert (await asyncio.wait_for(reader.readline(), 5)).startswith(b"HTTP/1.1 408 ")
    dribbling.cancel()
    writer.close()
    assert await impatient.spent() == (0, 0)


async def test_connection_when_it_is_idle_between_requests_then_it_ends(impatient: RunningRelay) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", impatient.port)
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
    received = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    assert received.startswith(b"HTTP/1.1 200 ")
    assert b"Connection: close" not in received


# Readers that do not read


@pytest.fixture
async def deaf(impatient: RunningRelay) -> AsyncIterator[socket.socket]:
    """A client that reads nothing, and whose system takes little for it."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", impatient.port))
        yield client


async def ask(relay: RunningRelay, client: socket.socket, model: str) -> None:
    body = json.dumps({"model": model}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nX-Install-Id: {relay.install_id}\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    await asyncio.get_running_loop().sock_sendall(client, request)


@pytest.mark.parametrize("model", ["pour:stream", "pour:body"])
async def test_reader_when_it_takes_nothing_then_the_connection_and_the_call_end_and_the_debit_stands(
    impatient: RunningRelay, gemini: Backend, deaf: socket.socket, model: str
) -> None:
    await ask(impatient, deaf, model)
    await eventually(lambda: bool(gemini.seen) and gemini.last.gone.is_set(), what="the end of the call")
    await eventually(lambda: _none(impatient), what="the end of the connection")
    assert await impatient.spent() == (1, 1)


async def _none(relay: RunningRelay) -> bool:
    return await connections(relay) == 0


async def test_reader_when_it_leaves_a_whole_answer_unread_then_the_connection_ends(
    impatient: RunningRelay, deaf: socket.socket
) -> None:
    """The handler is long done: what is left is in the buffers."""
    for _ in range(4):
        await ask(impatient, deaf, "huge:900000")
    await eventually(lambda: _none(impatient), what="the end of the connection")
    assert (await impatient.spent())[0] >= 1


async def test_reader_when_it_reads_on_then_its_stream_goes_on(impatient: RunningRelay) -> None:
    loop = asyncio.get_running_loop()
    async with impatient.connect("pour:stream") as (reader, _):
        ends_s = loop.time() + 1.5
        while loop.time() < ends_s:
            assert len(await reader.readexactly(20_000)) == 20_000
            await asyncio.sleep(0.01)


# Bounds


async def test_connections_when_there_are_as_many_as_may_be_then_the_next_is_told_and_closed(
    start_relay: StartRelay, gemini: Backend
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url), max_connections=2)
    async with relay.connect("wait"), relay.connect("wait"):
        await eventually(lambda: len(gemini.seen) == 2)
        assert "limiter_client_connections 2.0" in relay.app[METRICS].render().decode()
        status, document = problem_in(await relay.raw(b"GET /healthz HTTP/1.1\r\nHost: relay\r\n\r\n"))
        assert (status, document["error"]["code"]) == (503, "relay_busy")
        status, _ = problem_in(await relay.raw(b""))  # whatever it would ask
        assert status == 503
    gemini.go_on.set()

    async def served() -> bool:
        return b"HTTP/1.1 200" in await relay.raw(b"GET /healthz HTTP/1.1\r\nHost: relay\r\nConnection: close\r\n\r\n")

    await eventually(served)


# HTTP/1.0


def old_request(relay: RunningRelay, model: str, *headers: str, path: str = CHAT, **members: object) -> bytes:
    body = json.dumps({"model": model, **members})
    lines = [
        f"POST {path} HTTP/1.0",
        "Host: relay",
        "Content-Type: application/json",
        f"X-Install-Id: {relay.install_id}",
        f"Content-Length: {len(body)}",
        *headers,
    ]
    return "\r\n".join([*lines, "", body]).encode()


@pytest.mark.parametrize("headers", [(), ("Connection: keep-alive",), ("Connection: Keep-Alive", "Keep-Alive: 300")])
@pytest.mark.parametrize("backend", ["gemini", "hardware"])
@pytest.mark.parametrize(
    ("model", "ending"),
    [
        ("stream:3", b"data: [DONE]\n\n"),
        ("plain", b"data: [DONE]\n\n"),
        ("huge:3000000", b"}"),
        ("break-stream", b"}\n\n"),
    ],
)
async def test_old_client_when_an_answer_has_no_length_then_its_end_is_that_of_the_connection(
    start_relay: StartRelay, gemini: Backend, backend: str, model: str, ending: bytes, headers: tuple[str, ...]
) -> None:
    relay = await start_relay(client_of("gemini" if backend == "gemini" else "hardware", gemini.url))
    received = await relay.raw(old_request(relay, model, *headers, stream=model == "plain"))
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 200 ")
    assert b"transfer-encoding" not in head.lower()
    assert b"keep-alive" not in head.lower()
    assert b"content-length" not in head.lower()
    assert body.endswith(ending)


async def test_old_client_when_an_answer_has_a_length_then_the_connection_can_be_kept(relay: RunningRelay) -> None:
    kept = old_request(relay, "plain", "Connection: keep-alive")
    received = await relay.raw(kept + kept + old_request(relay, "plain"))
    assert received.count(b"HTTP/1.0 200 OK") == 3
    assert received.count(b"Connection: keep-alive") == 2
