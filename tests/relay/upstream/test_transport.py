"""The pool of connections to a backend, against servers of raw bytes."""

import asyncio
import random
import socket
import struct
import time
from collections.abc import AsyncIterator
from contextlib import nullcontext, suppress
from typing import Any

import pytest
import uvloop
from yarl import URL

from limiter.relay.upstream.http_protocol import Exchange, TransportError
from limiter.relay.upstream.transport import HttpTransport, NoConnectionFree
from tests.relay.upstream.conftest import MakeTransport
from tests.support.raw_backend import GOOD, Peer, Serve, good, raw_backend
from tests.support.redis_servers import free_port
from tests.support.wait import eventually

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


async def read_all(exchange: Exchange) -> bytes:
    parts = []
    while part := await exchange.read():
        parts.append(part)
    return b"".join(parts)


async def ask(transport: HttpTransport, body: bytes = b"{}", *, within_s: float = 10, path: str = "chat") -> bytes:
    """Make a request to its end; give the body of the answer."""
    exchange = await transport.request("POST", path, {}, body, within_s=within_s)
    try:
        return await read_all(exchange)
    finally:
        exchange.release()


async def parts(*chunks: bytes, pause_s: float = 0.0) -> AsyncIterator[bytes]:
    for number, chunk in enumerate(chunks):
        await asyncio.sleep(pause_s if number else 0)
        yield chunk


def scripts(*answers: bytes) -> Serve:
    """Answer the requests of each connection by the next of these, then close."""
    left = list(answers)

    async def serve(peer: Peer) -> None:
        while left:
            await peer.request()
            await peer.send(left.pop(0))

    return serve


# Keeping connections


async def test_connection_when_an_answer_is_read_then_it_is_used_again(transport_to: MakeTransport) -> None:
    async with raw_backend(good) as backend:
        transport = transport_to(backend.port)
        for _ in range(5):
            assert await ask(transport) == b"good"
        assert (len(backend.peers), backend.requests) == (1, 5)
        head = backend.peers[0].requests[0][0]
        assert head == b"POST /v1/chat HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Length: 2\r\n\r\n" % backend.port


async def test_connections_when_several_are_idle_then_the_one_used_last_is_taken(transport_to: MakeTransport) -> None:
    async with raw_backend(good) as backend:
        transport = transport_to(backend.port)
        exchanges = [await transport.request("POST", "chat", {}, b"{}") for _ in range(3)]
        for exchange in (exchanges[2], exchanges[0], exchanges[1]):
            await read_all(exchange)
            exchange.release()
        for _ in range(4):
            await ask(transport)
        assert [len(peer.requests) for peer in backend.peers] == [1, 5, 1]
        assert transport.connections == 3


@pytest.mark.parametrize("header", ["", "Keep-Alive: timeout=60\r\n"])
async def test_connection_when_it_is_idle_for_too_long_then_it_is_closed(
    transport_to: MakeTransport, header: str
) -> None:
    async with raw_backend(scripts(GOOD.replace(b"\r\n\r\n", b"\r\n" + header.encode() + b"\r\n"), GOOD)) as backend:
        transport = transport_to(backend.port, keepalive_s=0.2)
        await ask(transport)
        await eventually(lambda: transport.connections == 0)
        await asyncio.wait_for(backend.peers[0].gone.wait(), 2)
        await ask(transport)
        assert len(backend.peers) == 2


@pytest.mark.parametrize(
    ("value", "kept"),
    [("timeout=5", 4), ("max=10, timeout=3", 2), ("Timeout=1", 0), ("timeout=0", 0), ("timeout=x", 9), ("odd", 9)],
)
async def test_connection_when_the_backend_says_how_long_it_keeps_it_then_that_lowers_the_time(
    transport_to: MakeTransport, value: str, kept: float
) -> None:
    answer = GOOD.replace(b"\r\n\r\n", b"\r\nKeep-Alive: " + value.encode() + b"\r\n\r\n")
    async with raw_backend(scripts(answer, GOOD)) as backend:
        transport = transport_to(backend.port, keepalive_s=9)
        exchange = await transport.request("POST", "chat", {}, b"{}")
        connection = exchange._connection
        await read_all(exchange)
        now_s = asyncio.get_running_loop().time()
        connection.idle_since_s = now_s
        assert not kept or connection.is_idle(now_s + kept - 0.01, 9)
        assert not connection.is_idle(now_s + kept + 0.01, 9)
        exchange.release()


@pytest.mark.parametrize(
    ("answer", "body", "connections"),
    [
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nhi", b"hi", 2),
        (b"HTTP/1.1 200 OK\r\nConnection: Keep-Alive, Close\r\nContent-Length: 2\r\n\r\nhi", b"hi", 2),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nhi", b"hi", 2),
        (b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nhi", b"hi", 1),
        (
            b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
            b"hi",
            2,
        ),
        (CHUNKED + b"2\r\nhi\r\n0\r\n\r\n", b"hi", 1),
        (CHUNKED + b'2;a=b;c="d e"\r\nhi\r\n0;x\r\n\r\n', b"hi", 1),
        (CHUNKED + b"2\r\nhi\r\n0\r\nX-Trailer: a\r\nY: b\r\n\r\n", b"hi", 1),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + GOOD, b"good", 1),
        (b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n" + GOOD, b"good", 1),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b"", 1),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b"", 1),
        (GOOD + b"\r\n", b"good", None),
        (GOOD + b"HTT", b"good", 2),
        (GOOD + GOOD.replace(b"good", b"evil"), b"good", 2),
    ],
    ids=lambda part: ascii(part[9:60]) if isinstance(part, bytes) else None,
)
async def test_answer_when_it_has_a_form_then_its_body_is_read_and_its_connection_kept_if_it_may_be(
    transport_to: MakeTransport, answer: bytes, body: bytes, connections: int | None
) -> None:
    left = [answer, GOOD]

    async def serve(peer: Peer) -> None:
        while left:
            await peer.request()
            await peer.send(left.pop(0))
        await peer.reader.read()

    async with raw_backend(serve) as backend:
        transport = transport_to(backend.port)
        assert await ask(transport) == body
        assert await ask(transport) == b"good"
        assert connections in {len(backend.peers), None}


async def test_body_when_it_has_no_length_then_it_ends_with_the_connection(transport_to: MakeTransport) -> None:
    async with raw_backend(scripts(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 300_000)) as backend:
        transport = transport_to(backend.port)
        assert await asyncio.wait_for(ask(transport), 5) == b"x" * 300_000
        assert transport.connections == 0


async def test_body_when_it_has_no_length_and_is_reset_then_it_is_broken_off(transport_to: MakeTransport) -> None:
    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\n\r\nhalf")
        await asyncio.sleep(0.1)
        linger = struct.pack("ii", 1, 0)  # a close is a reset then
        peer.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        peer.reset()

    async with raw_backend(serve) as backend:
        transport = transport_to(backend.port)
        exchange = await transport.request("POST", "chat", {}, b"{}")
        assert await exchange.read() == b"half"
        with pytest.raises(TransportError):
            await asyncio.wait_for(exchange.read(), 5)
        exchange.release()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf",
        CHUNKED + b"4\r\nhalf\r\n",
        CHUNKED + b"4\r\nhalf\r\n0\r\n",
        CHUNKED + b"4\r\nhalf\r\n0\r\nX: ",
    ],
)
async def test_body_when_the_connection_ends_within_it_then_what_came_is_read_and_then_the_error(
    transport_to: MakeTransport, answer: bytes
) -> None:
    async with raw_backend(scripts(answer)) as backend:
        transport = transport_to(backend.port)
        exchange = await transport.request("POST", "chat", {}, b"{}")
        assert await asyncio.wait_for(exchange.read(), 5) == b"half"
        with pytest.raises(TransportError):
            await asyncio.wait_for(exchange.read(), 5)
        exchange.release()


async def test_connection_when_the_backend_closes_it_idle_then_it_leaves_the_pool_at_once(
    transport_to: MakeTransport,
) -> None:
    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(GOOD)

    async with raw_backend(serve) as backend:
        transport = transport_to(backend.port, keepalive_s=60)
        await ask(transport)
        await eventually(lambda: transport.connections == 0)
        assert not transport._idle


async def test_connection_when_it_speaks_unasked_then_it_is_closed_and_never_used(transport_to: MakeTransport) -> None:
    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(GOOD)
        if peer.number == 1:
            await asyncio.sleep(0.1)
            await peer.send(GOOD.replace(b"good", b"evil"))
        await peer.request()
        await peer.send(GOOD)

    async with raw_backend(serve) as backend:
        transport = transport_to(backend.port, keepalive_s=60)
        await ask(transport)
        await eventually(lambda: transport.connections == 0)
        assert await ask(transport) == b"good"
        assert [len(peer.requests) for peer in backend.peers] == [1, 1]


async def test_connection_when_it_speaks_before_it_is_asked_then_an_error_and_not_an_answer(
    transport_to: MakeTransport,
) -> None:
    async def serve(peer: Peer) -> None:
        await peer.send(GOOD)
        await peer.reader.read()

    async with raw_backend(serve) as backend:
        transport = transport_to(backend.port)
        for _ in range(5):  # whether the bytes come before the request is a race
            with suppress(TransportError, TimeoutError):
                await asyncio.wait_for(ask(transport, within_s=0.5), 5)
        await asyncio.sleep(0.05)
        assert transport.connections == len(transport._idle)


# Asking again


def closing_second(how: Serve, *, first: bytes = GOOD) -> Serve:
    """Answer the first request; close the connection at the second, in some way. Later connections are well."""

    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(first)
        if peer.number == 1:
            await peer.request()
            await how(peer)
            return
        await good(peer)

    return serve


async def close(_peer: Peer) -> None:
    return


async def reset(peer: Peer) -> None:
    peer.reset()


async def one_byte(peer: Peer) -> None:
    await peer.send(b"H")


@pytest.mark.parametrize("how", [close, reset])
@pytest.mark.parametrize("size", [2, 1 << 20])
async def test_request_when_a_used_connection_closes_without_a_byte_then_it_is_sent_once_more(
    transport_to: MakeTransport, how: Serve, size: int
) -> None:
    async with raw_backend(closing_second(how)) as backend:
        transport = transport_to(backend.port)
        assert await ask(transport) == b"good"
        assert await ask(transport, b"x" * size) == b"good"
        assert [len(peer.requests) for peer in backend.peers] == [2, 1]


async def test_request_when_a_byte_of_an_answer_came_then_it_is_not_sent_again(transport_to: MakeTransport) -> None:
    async with raw_backend(closing_second(one_byte)) as backend:
        transport = transport_to(backend.port)
        await ask(transport)
        with pytest.raises(TransportError):
            await ask(transport)
        assert backend.requests == 2


async def test_request_when_a_new_connection_closes_without_a_byte_then_it_is_not_sent_again(
    transport_to: MakeTransport,
) -> None:
    async def serve(peer: Peer) -> None:
        await peer.request()

    async with raw_backend(serve) as backend:
        with pytest.raises(TransportError):
            await ask(transport_to(backend.port))
        assert backend.requests == 1


async def test_request_when_both_connections_close_then_it_is_not_sent_a_third_time(
    transport_to: MakeTransport,
) -> None:
    async def serve(peer: Peer) -> None:
        await peer.request()
        if peer.number <= 2:
            await peer.send(GOOD)
            await peer.request()

    async with raw_backend(serve) as backend:
        transport = transport_to(backend.port)
        exchanges = [await transport.request("POST", "chat", {}, b"{}") for _ in range(2)]
        for exchange in exchanges:
            await read_all(exchange)
            exchange.release()
        with pytest.raises(TransportError):
            await ask(transport)
        assert sorted(len(peer.requests) for peer in backend.peers) == [1, 1, 2]  # not on the other used one, either


async def test_upload_when_connections_are_idle_then_it_gets_a_new_one_and_is_sent_once(
    transport_to: MakeTransport,
) -> None:
    async with raw_backend(closing_second(close)) as backend:
        transport = transport_to(backend.port)
        await ask(transport)
        exchange = await transport.request("POST", "audio", {}, parts(b"one", b"two"))
        assert await read_all(exchange) == b"good"
        exchange.release()
        assert [len(peer.requests) for peer in backend.peers] == [1, 1]
        assert backend.peers[1].requests[0][1] == b"onetwo"


async def test_idle_close_when_requests_race_with_it_then_none_fails(transport_to: MakeTransport) -> None:
    idle_s = 0.03

    async def serve(peer: Peer) -> None:
        await peer.request()  # a slow machine may take longer than idle_s to send it
        with suppress(TimeoutError):
            while True:
                await peer.send(GOOD)
                await asyncio.wait_for(peer.request(), idle_s)

    async with raw_backend(serve) as backend:
        transport = transport_to(backend.port)
        for number in range(60):
            assert await ask(transport) == b"good"
            await asyncio.sleep(idle_s + (number % 11 - 8) / 4000)
        assert backend.requests >= 60


# Requests


@pytest.mark.parametrize("size", [0, 1, 65_536, 65_537, 20 << 20])
async def test_body_when_it_is_of_any_size_then_the_backend_gets_it(transport_to: MakeTransport, size: int) -> None:
    async with raw_backend(good) as backend:
        transport = transport_to(backend.port)
        body = random.randbytes(size)
        assert await ask(transport, body) == b"good"
        assert backend.peers[0].requests[0][1] == body
        assert await ask(transport) == b"good"
        assert len(backend.peers) == 1


async def test_upload_when_it_has_a_length_then_it_is_sent_as_it_is(transport_to: MakeTransport) -> None:
    async with raw_backend(good) as backend:
        transport = transport_to(backend.port)
        exchange = await transport.request(
            "POST", "audio", {"Content-Length": "6"}, parts(b"abc", b"def", pause_s=0.05)
        )
        assert await read_all(exchange) == b"good"
        exchange.release()
        head, body = backend.peers[0].requests[0]
        assert body == b"abcdef"
        assert b"Transfer-Encoding" not in head
        assert await ask(transport) == b"good"
        assert len(backend.peers) == 1


async def test_upload_when_the_backend_reads_slowly_then_the_client_waits(transport_to: MakeTransport) -> None:
    taken = 0
    go_on = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        for _ in range(400):
            taken += 1
            yield b"x" * 65_536

    async def serve(peer: Peer) -> None:
        peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await go_on.wait()
        peer.writer.transport.resume_reading()  # type: ignore[attr-defined]
        await good(peer)

    async with raw_backend(serve) as backend:
        transport = transport_to(backend.port)
        asking = asyncio.create_task(transport.request("POST", "audio", {}, endless(), within_s=20))
        await asyncio.sleep(0.5)
        assert 0 < taken < 200
        go_on.set()
        exchange = await asking
        assert await read_all(exchange) == b"good"
        exchange.release()
        assert len(backend.peers[0].requests[0][1]) == 400 * 65_536


async def deaf(peer: Peer) -> None:
    """Read nothing of a request but its head."""
    await peer.head()
    await asyncio.sleep(30)


@pytest.mark.parametrize("streamed", [False, True])
async def test_body_when_the_backend_never_reads_it_then_it_ends_in_time(
    transport_to: MakeTransport, *, streamed: bool
) -> None:
    async with raw_backend(deaf) as backend:
        transport = transport_to(backend.port)
        body = b"x" * (16 << 20)
        began_s = time.monotonic()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(
                transport.request("POST", "a", {}, parts(*[body] * 3) if streamed else body, within_s=0.5), 10
            )
        assert time.monotonic() - began_s < 5
        assert transport.connections == 0


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("closes", [False, True])
async def test_refusal_when_it_comes_before_the_body_is_read_then_it_is_the_answer(
    transport_to: MakeTransport, *, streamed: bool, closes: bool
) -> None:
    async def serve(peer: Peer) -> None:
        await peer.head()
        await peer.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 5\r\n\r\nlarge")
        if closes:
            peer.writer.write_eof()
        await asyncio.sleep(5)

    async with raw_backend(serve) as backend:
        transport = transport_to(backend.port)
        body = b"x" * (16 << 20)
        exchange = await asyncio.wait_for(
            transport.request("POST", "a", {}, parts(*[body] * 3) if streamed else body, within_s=4), 3
        )
        assert exchange.status == 413
        assert await read_all(exchange) == b"large"
        exchange.release()
        assert transport.connections == 0


async def test_upload_when_a_good_head_comes_early_then_the_rest_is_still_sent(transport_to: MakeTransport) -> None:
    async def serve(peer: Peer) -> None:
        head = await peer.head()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n")
        body = await peer.reader.readexactly(6)
        peer.requests.append((head, body))
        await peer.send(body)
        await good(peer)

    async with raw_backend(serve) as backend:
        transport = transport_to(backend.port)
        exchange = await transport.request("POST", "a", {"Content-Length": "6"}, parts(b"abc", b"def", pause_s=0.2))
        assert not backend.requests
        assert await read_all(exchange) == b"abcdef"
        exchange.release()
        assert transport.connections == 0


async def test_upload_when_a_good_head_comes_early_and_the_client_is_slow_then_the_answer_is_read_all_the_same(
    transport_to: MakeTransport,
) -> None:
    ended = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        try:
            yield b"half"
            await asyncio.sleep(30)
        finally:
            ended.set()

    async def serve(peer: Peer) -> None:
        await peer.head()
        await peer.send(GOOD)
        await peer.reader.read()

    async with raw_backend(serve) as backend:
        transport = transport_to(backend.port)
        exchange = await asyncio.wait_for(transport.request("POST", "a", {}, slow()), 2)
        assert await asyncio.wait_for(read_all(exchange), 2) == b"good"
        exchange.release()
        await asyncio.wait_for(ended.wait(), 2)
        assert transport.connections == 0


async def test_upload_when_its_client_breaks_off_then_that_error_is_raised_and_the_backend_is_left(
    transport_to: MakeTransport,
) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"half"
        await asyncio.sleep(0.05)
        raise ValueError("the client")

    async def serve(peer: Peer) -> None:
        await peer.reader.read()

    async with raw_backend(serve) as backend:
        transport = transport_to(backend.port)
        with pytest.raises(ValueError, match="the client"):
            await transport.request("POST", "a", {}, broken())
        await asyncio.wait_for(backend.peers[0].gone.wait(), 2)


async def test_upload_when_the_backend_closes_while_the_client_is_slow_then_an_error_at_once(
    transport_to: MakeTransport,
) -> None:
    async def serve(peer: Peer) -> None:
        await peer.head()

    async with raw_backend(serve) as backend:
        transport = transport_to(backend.port)
        with pytest.raises(TransportError):
            await asyncio.wait_for(transport.request("POST", "a", {}, parts(b"a", b"b", pause_s=30)), 3)


# Time and back-pressure


async def test_answer_when_its_head_does_not_come_then_timeout(transport_to: MakeTransport) -> None:
    async with raw_backend(deaf) as backend:
        transport = transport_to(backend.port)
        began_s = time.monotonic()
        with pytest.raises(TimeoutError):
            await ask(transport, within_s=0.3)
        assert 0.25 < time.monotonic() - began_s < 2
        await asyncio.wait_for(backend.peers[0].reader.read(), 2)


async def test_body_when_nothing_more_comes_then_timeout_and_the_backend_is_left(transport_to: MakeTransport) -> None:
    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(CHUNKED + b"2\r\nhi\r\n")
        await peer.reader.read()

    async with raw_backend(serve) as backend:
        transport = transport_to(backend.port)
        exchange = await transport.request("POST", "chat", {}, b"{}")
        exchange.idle_s = 0.3
        assert await exchange.read() == b"hi"
        with pytest.raises(TimeoutError):
            await exchange.read()
        exchange.release()
        await asyncio.wait_for(backend.peers[0].gone.wait(), 2)


async def test_backend_when_nobody_reads_then_it_has_to_wait_and_memory_stays_flat(
    transport_to: MakeTransport,
) -> None:
    sent = 0
    total = 64 << 20

    async def serve(peer: Peer) -> None:
        nonlocal sent
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % total)
        while sent < total:
            await peer.send(b"x" * 65_536)
            sent += 65_536
        await good(peer)

    async with raw_backend(serve) as backend:
        transport = transport_to(backend.port)
        exchange = await transport.request("POST", "chat", {}, b"{}")
        await asyncio.sleep(0.5)
        assert sent < 32 << 20
        assert exchange._size < 1 << 20
        read = 0
        while part := await exchange.read():
            read += len(part)
        assert read == total
        exchange.release()
        assert await ask(transport) == b"good"
        assert len(backend.peers) == 1


# Ends


@pytest.mark.parametrize("seed", range(3))
async def test_requests_when_they_are_cancelled_anywhere_then_nothing_is_left_behind(
    transport_to: MakeTransport, seed: int
) -> None:
    chance = random.Random(seed)

    async def serve(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.send(CHUNKED, b"2\r\nhi\r\n", b"0\r\n\r\n", pause_s=chance.choice([0, 0.001, 0.004]))

    async with raw_backend(serve) as backend:
        transport = transport_to(backend.port, max_connections=8)

        async def one() -> None:
            body = chance.choice([b"{}", b"x" * 300_000])
            if chance.random() < 0.3:
                exchange = await transport.request("POST", "a", {}, parts(body, body, pause_s=0.001), within_s=5)
            else:
                exchange = await transport.request("POST", "a", {}, body, within_s=5)
            try:
                assert await read_all(exchange) == b"hi"
            finally:
                exchange.release()

        for _ in range(25):
            tasks = [asyncio.create_task(one()) for _ in range(6)]
            await asyncio.sleep(chance.random() * 0.015)
            for task in tasks:
                if chance.random() < 0.7:
                    task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            assert {type(each) for each in ended} <= {type(None), asyncio.CancelledError}
        assert await ask(transport) == b"hi"
        assert transport.connections <= 8


async def test_transport_when_it_closes_then_what_runs_ends_with_an_error(transport_to: MakeTransport) -> None:
    async with raw_backend(deaf) as backend:
        transport = transport_to(backend.port)
        asking = asyncio.create_task(ask(transport))
        await eventually(lambda: len(backend.peers) == 1)
        await transport.aclose()
        with pytest.raises(TransportError):
            await asyncio.wait_for(asking, 2)
        with pytest.raises(TransportError):
            await ask(transport)
        assert transport.connections == 0


async def test_exchange_when_it_ended_long_ago_then_closing_it_leaves_the_next_one_alone(
    transport_to: MakeTransport,
) -> None:
    async with raw_backend(good) as backend:
        transport = transport_to(backend.port)
        first = await transport.request("POST", "chat", {}, b"{}")
        await read_all(first)
        first.release()
        second = await transport.request("POST", "chat", {}, b"{}")
        first.close()
        first.release()
        assert await read_all(second) == b"good"
        second.release()
        assert len(backend.peers) == 1


# Connecting


async def test_backend_when_nobody_listens_then_os_error(transport_to: MakeTransport) -> None:
    transport = transport_to(free_port())
    with pytest.raises(OSError, match=r"refused|Connect"):
        await ask(transport)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "x" * 70 + ".invalid", "a..b"])
async def test_backend_when_its_name_leads_nowhere_then_os_error(transport_to: MakeTransport, host: str) -> None:
    with pytest.raises(OSError):  # noqa: PT011  the text is the resolver's
        await ask(transport_to(80, host))


async def test_backend_when_it_takes_no_connection_then_timeout(transport_to: MakeTransport) -> None:
    with full_listener("127.0.0.1") as port:
        transport = transport_to(port, connect_s=0.3)
        began_s = time.monotonic()
        with pytest.raises(TimeoutError):
            await ask(transport)
        assert time.monotonic() - began_s < 3


class full_listener:  # noqa: N801  reads as a function
    """A port that takes no connection: the next one hangs."""

    def __init__(self, host: str, port: int = 0) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.socket(family)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind((host, port))
        self._listener.listen(0)
        self._clients: list[socket.socket] = []
        address = self._listener.getsockname()
        for _ in range(3):
            client = socket.socket(family)
            client.setblocking(False)
            client.connect_ex(address)
            self._clients.append(client)
        self._port: int = address[1]

    def __enter__(self) -> int:
        return self._port

    def __exit__(self, *_: object) -> None:
        for each in (*self._clients, self._listener):
            each.close()


@pytest.fixture
def two_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let two.example lead to ::1 first, and to 127.0.0.1 then."""
    for kind in (asyncio.BaseEventLoop, uvloop.Loop):

        async def getaddrinfo(loop: Any, host: str, port: int, *, real: Any = kind.getaddrinfo, **more: Any) -> Any:
            if host != "two.example":
                return await real(loop, host, port, **more)
            return [
                (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", port, 0, 0)),
                (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)),
            ]

        monkeypatch.setattr(kind, "getaddrinfo", getaddrinfo)


@pytest.mark.usefixtures("two_addresses")
@pytest.mark.parametrize("dead", ["refuses", "hangs"])
async def test_backend_when_one_of_its_addresses_is_dead_then_the_other_is_used(
    transport_to: MakeTransport, dead: str
) -> None:
    if not has_ipv6():
        pytest.skip("this machine has no ::1")
    async with raw_backend(good) as backend:
        with full_listener("::1", backend.port) if dead == "hangs" else nullcontext():
            transport = transport_to(backend.port, "two.example")
            began_s = time.monotonic()
            assert await ask(transport) == b"good"
            assert time.monotonic() - began_s < 2


async def test_backend_when_it_listens_on_ipv6_alone_then_it_is_asked(transport_to: MakeTransport) -> None:
    if not has_ipv6():
        pytest.skip("this machine has no ::1")
    async with raw_backend(good, "::1") as backend:
        assert await ask(transport_to(backend.port, "::1")) == b"good"
        assert b"Host: [::1]:%d\r\n" % backend.port in backend.peers[0].requests[0][0]


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


# Bounds


async def test_connections_when_all_are_in_use_then_the_next_waits_for_one(transport_to: MakeTransport) -> None:
    async with raw_backend(good) as backend:
        transport = transport_to(backend.port, max_connections=2)
        held = [await transport.request("POST", "chat", {}, b"{}") for _ in range(2)]
        asking = asyncio.create_task(ask(transport))
        await asyncio.sleep(0.1)
        assert not asking.done()
        await read_all(held[0])
        held[0].release()
        assert await asyncio.wait_for(asking, 0.5) == b"good"
        held[1].close()
        assert await ask(transport) == b"good"
        assert max(transport.connections, len(backend.peers)) == 2


async def test_connections_when_none_comes_free_then_busy_within_a_second_or_so(transport_to: MakeTransport) -> None:
    async with raw_backend(good) as backend:
        transport = transport_to(backend.port, max_connections=1)
        held = await transport.request("POST", "chat", {}, b"{}")
        began_s = time.monotonic()
        with pytest.raises(NoConnectionFree):
            await ask(transport)
        assert 0.9 < time.monotonic() - began_s < 2
        held.close()
        assert await ask(transport) == b"good"


async def test_connections_when_an_idle_one_fills_the_bound_then_an_upload_takes_its_place(
    transport_to: MakeTransport,
) -> None:
    async with raw_backend(good) as backend:
        transport = transport_to(backend.port, max_connections=1)
        await ask(transport)
        exchange = await transport.request("POST", "audio", {}, parts(b"one"))
        assert transport.connections == 1
        assert await read_all(exchange) == b"good"
        exchange.release()
        assert await ask(transport) == b"good"
        assert len(backend.peers) == 2


async def test_connections_when_making_one_fails_then_its_place_is_free_again(transport_to: MakeTransport) -> None:
    transport = transport_to(free_port(), max_connections=1)
    for _ in range(3):
        with pytest.raises(OSError, match=r"refused|Connect"):
            await ask(transport)


async def test_query_when_the_base_has_one_then_it_is_sent_as_it_is(transport_to: MakeTransport) -> None:
    async with raw_backend(good) as backend:
        transport = transport_to(backend.port)
        transport._base = URL(f"{transport._base}?a=b%26c", encoded=True)
        await ask(transport)
        assert backend.peers[0].requests[0][0].startswith(b"POST /v1/chat?a=b%26c HTTP/1.1\r\n")
