"""What is read of an answer's bytes, however they are cut: never a crash, a hang, nor a byte of another's answer."""

import asyncio
from asyncio import AbstractEventLoop
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
import uvloop
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from yarl import URL

from limiter.relay.upstream.http_protocol import (
    MAX_HEAD_BYTES,
    MAX_HEADERS,
    AnswerTooLarge,
    HttpConnection,
    TransportError,
)
from limiter.relay.upstream.transport import HttpTransport
from tests.relay.upstream.conftest import MakeTransport
from tests.support.raw_backend import GOOD, Peer, Serve, raw_backend

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
VALID = [
    GOOD,
    OK + b"\r\nuntil the end",
    OK + b"Content-Length: 0\r\n\r\n",
    CHUNKED + b"4\r\ngood\r\n0\r\n\r\n",
    CHUNKED + b"2;a=b\r\ngo\r\n2\r\nod\r\n0\r\nX-Trailer: a\r\n\r\n",
    b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 4\r\n\r\ngood",
    b"HTTP/1.1 100 Continue\r\n\r\n" + GOOD,
    b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + GOOD,
    b"HTTP/1.1 204 No Content\r\n\r\n",
    b"HTTP/1.1 101 Switching\r\nConnection: Upgrade\r\nUpgrade: odd\r\n\r\nraw",
    OK + b"Keep-Alive: timeout=1\r\nConnection: close\r\nContent-Length: 4\r\n\r\ngood",
]


async def answer_of(transport: HttpTransport, body: bytes = b"{}", *, within_s: float = 5) -> tuple[int, bytes]:
    exchange = await transport.request("POST", "chat", {}, body, within_s=within_s)
    exchange.idle_s = within_s
    read = []
    try:
        while part := await exchange.read():
            read.append(part)
    finally:
        exchange.release()
    return exchange.status, b"".join(read)


def sending(*cut: bytes) -> Serve:
    async def serve(peer: Peer) -> None:
        await peer.request()
        for part in cut:
            peer.writer.write(part)
            await asyncio.sleep(0.001)

    return serve


# Cuts


@pytest.mark.parametrize("answer", VALID[:8], ids=lambda answer: ascii(answer[:50]))
async def test_answer_when_each_byte_comes_by_itself_then_it_is_the_same(
    transport_to: MakeTransport, answer: bytes
) -> None:
    async with raw_backend(sending(answer)) as whole, raw_backend(sending(*_each(answer))) as cut:
        assert await answer_of(transport_to(cut.port)) == await answer_of(transport_to(whole.port))


def _each(answer: bytes) -> list[bytes]:
    return [answer[at : at + 1] for at in range(len(answer))]


# Bounds


@pytest.mark.parametrize(
    "answer",
    [
        OK + b"X: " + b"x" * MAX_HEAD_BYTES + b"\r\nContent-Length: 0\r\n\r\n",
        OK + b"X" * MAX_HEAD_BYTES + b": x\r\nContent-Length: 0\r\n\r\n",
        OK + b"".join(b"X-%d: %s\r\n" % (n, b"x" * 1000) for n in range(70)) + b"Content-Length: 0\r\n\r\n",
        OK + b"X: x\r\n" * (MAX_HEADERS + 1) + b"Content-Length: 0\r\n\r\n",
        OK + b"X: " + b"x" * (8 << 20),
        b"HTTP/1.1 200 " + b"x" * (8 << 20),
        b"HTTP/1.1 103 Early Hints\r\n\r\n" * 10_000,
        CHUNKED + b"1\r\nx\r\n0\r\nX: " + b"x" * (8 << 20),
        CHUNKED + b"1\r\nx\r\n0\r\n" + b"X: x\r\n" * (MAX_HEADERS + 1) + b"\r\n",
        CHUNKED + b"1\r\nx\r\n5;" + b"x" * (8 << 20),
    ],
    ids=lambda answer: ascii(answer[17:60]),
)
@pytest.mark.parametrize("at_once", [True, False])
async def test_headers_when_they_are_too_large_then_that_is_the_error(
    transport_to: MakeTransport, answer: bytes, *, at_once: bool
) -> None:
    cut = [answer] if at_once else [answer[at : at + 30_000] for at in range(0, len(answer), 30_000)]
    async with raw_backend(sending(*cut)) as backend:
        transport = transport_to(backend.port)
        with pytest.raises(AnswerTooLarge):
            await asyncio.wait_for(answer_of(transport), 10)
        assert transport.connections == 0


async def test_headers_when_they_are_just_within_the_bounds_then_they_are_read(transport_to: MakeTransport) -> None:
    many = b"X: x\r\n" * (MAX_HEADERS - 2) + b"Y: " + b"y" * 60_000 + b"\r\nContent-Length: 2\r\n\r\nhi"
    async with raw_backend(sending(OK + many)) as backend:
        assert await answer_of(transport_to(backend.port)) == (200, b"hi")


# Strictness: no leniency of the parser is on


@pytest.mark.parametrize(
    "answer",
    [
        OK + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n4\r\ngood\r\n0\r\n\r\n",
        OK + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\ngood",
        OK + b"Content-Length: 4\r\nContent-Length: 4\r\n\r\ngood",
        OK + b"Content-Length: +4\r\n\r\ngood",
        OK + b"Content-Length: 4, 4\r\n\r\ngood",
        OK + b"Content-Length : 4\r\n\r\ngood",
        OK + b"Content-Length: 4\n\r\ngood",
        b"HTTP/1.1 200 OK\nContent-Length: 4\n\ngood",
        OK + b"X: a\r\n b\r\nContent-Length: 4\r\n\r\ngood",
        OK + b"X: a\rb\r\nContent-Length: 4\r\n\r\ngood",
        OK + b"X: a\0b\r\nContent-Length: 4\r\n\r\ngood",
        OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n4\r\ngood\r\n0\r\n\r\n",
        OK + b"Transfer-Encoding: chunked, identity\r\n\r\n4\r\ngood\r\n0\r\n\r\n",
        OK + b"Transfer-Encoding: identity\r\n\r\ngood",
        OK + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n4\r\ngood\r\n0\r\n\r\n",
        OK + b"Transfer-Encoding: xchunked\r\n\r\n4\r\ngood\r\n0\r\n\r\n",
        CHUNKED + b"4\ngood\n0\n\n",
        CHUNKED + b"4 \r\ngood\r\n0\r\n\r\n",
        CHUNKED + b"0x4\r\ngood\r\n0\r\n\r\n",
        CHUNKED + b"4\r\ngoodX0\r\n\r\n",
        CHUNKED + b"4\r\ngood0\r\n\r\n",
        b"HTTP/1.2 200 OK\r\nContent-Length: 4\r\n\r\ngood",
        b"HTTP/2.0 200 OK\r\nContent-Length: 4\r\n\r\ngood",
        b"HTTP/0.9 200 OK\r\n\r\ngood",
        b"http/1.1 200 OK\r\nContent-Length: 4\r\n\r\ngood",
        b"ICY 200 OK\r\nContent-Length: 4\r\n\r\ngood",
        b"HTTP/1.1 20 OK\r\nContent-Length: 4\r\n\r\ngood",
        b"HTTP/1.1 099 OK\r\nContent-Length: 4\r\n\r\ngood",
    ],
    ids=lambda answer: ascii(answer[:70]),
)
async def test_answer_when_two_readers_could_differ_about_it_then_it_is_an_error(
    transport_to: MakeTransport, answer: bytes
) -> None:
    async with raw_backend(sending(answer)) as backend:
        transport = transport_to(backend.port)
        with pytest.raises(TransportError):
            await asyncio.wait_for(answer_of(transport), 5)
        assert transport.connections == 0


# Fuzz


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Answers that are valid but for some bytes, or that are put together from valid ones."""
    data = bytearray(b"".join(draw(st.lists(st.sampled_from(VALID), min_size=1, max_size=3))))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(["insert", "delete", "replace", "cut"]))
        if kind == "insert":
            data[at:at] = draw(st.binary(max_size=6) | st.sampled_from([b"\r\n", b"\n", b"0", b"\r\n\r\n", *VALID]))
        elif kind == "delete":
            del data[at : at + draw(st.integers(1, 8))]
        elif kind == "replace":
            data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
        else:
            del data[at:]
    return bytes(data)


@given(
    answer=damaged() | st.binary(max_size=200),
    cuts=st.lists(st.integers(0, 400), max_size=5),
    ends=st.sampled_from(["closes", "resets", "stays"]),
)
@example(answer=GOOD + GOOD.replace(b"good", b"evil"), cuts=[len(GOOD)], ends="stays")
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_answer_when_it_is_any_bytes_then_it_ends_and_no_other_client_sees_them(
    new_loop: Callable[[], AbstractEventLoop], answer: bytes, cuts: list[int], ends: str
) -> None:
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(_fuzz(answer, sorted(cuts), ends))


async def _fuzz(answer: bytes, cuts: list[int], ends: str) -> None:
    """The first connection gets the bytes; later ones answer well, each with a text that its client alone asked for.

    The next request waits until all the bytes have arrived. What arrives behind it nobody can tell from its answer.
    """
    said = asyncio.Event()

    async def serve(peer: Peer) -> None:
        if peer.number == 1:
            try:
                parts = [answer[at:to] for at, to in pairwise([0, *cuts, None])]
                if not await _speaks(peer, parts, ends):
                    return
            finally:
                said.set()
        while True:
            _, body = await peer.request()
            await peer.send(OK + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))

    async with raw_backend(serve) as backend:
        files = _open_files()
        transport = HttpTransport(URL(f"http://127.0.0.1:{backend.port}/v1/"), connect_s=5, shortest_s=0.05)
        with suppress(TransportError, TimeoutError):
            await asyncio.wait_for(answer_of(transport, b"the first", within_s=0.05), 2)
        await asyncio.wait_for(said.wait(), 2)
        await asyncio.sleep(0.005)
        for number in range(2):
            mine = b"mine alone %d" % number
            assert await answer_of(transport, mine) == (200, mine)
        assert transport.connections == len(transport._idle) == 1
        await transport.aclose()
        assert not transport._open
        for peer in backend.peers:
            await asyncio.wait_for(peer.gone.wait(), 2)
        await asyncio.sleep(0.002)
        assert _open_files() <= files


async def _speaks(peer: Peer, answer: list[bytes], ends: str) -> bool:
    """Send the answer in its parts; tell whether the connection is still open then."""
    await peer.request()
    for part in answer:
        if not peer.writer.is_closing():
            await peer.send(part)
        await asyncio.sleep(0)
    if ends == "resets":
        peer.reset()
    return ends == "stays"


def _open_files() -> int:
    return len([*Path("/proc/self/fd").iterdir()])


@given(data=st.lists(damaged() | st.binary(max_size=40), min_size=1, max_size=4))
@settings(max_examples=300, deadline=None)
def test_parts_when_they_are_any_bytes_then_no_error_but_the_transports_own(data: list[bytes]) -> None:
    """Without sockets, so that each cut is where it is said to be."""

    async def parse() -> None:
        ended: list[HttpConnection] = []
        connection = HttpConnection(asyncio.get_running_loop(), ended.append)
        transport = _Transport()
        connection.connection_made(transport)
        exchange = connection.begin(1e9)
        for part in data:
            if transport.is_closing():
                break
            connection.data_received(part)
        if not transport.is_closing():
            connection.eof_received()
        connection.connection_lost(None)
        assert exchange.is_over
        with suppress(TransportError):
            await exchange.head()
            while await exchange.read():
                pass
        exchange.release()
        assert ended == [connection]
        assert not connection.is_idle(0, 1)

    asyncio.run(parse())


class _Transport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self._is_aborted = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert data

    def is_closing(self) -> bool:
        return self._is_aborted

    def abort(self) -> None:
        self._is_aborted = True

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass
