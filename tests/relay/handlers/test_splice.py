"""A stream passes from the backend's callback to the client's transport: what must hold with no task in between."""

import asyncio
import json
import random
import re
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest

from tests.support.openai_backend import Backend
from tests.support.raw_backend import Peer, RawBackend, Serve, raw_backend
from tests.support.relay import CHAT, ONE_SERVER, RunningRelay, StartRelay, client_of, new_install
from tests.support.wait import eventually

pytestmark = ONE_SERVER
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"
DONE = b"data: [DONE]\n\n"
_BIG = 32 << 10


def event(content: str) -> bytes:
    choice = {"index": 0, "delta": {"content": content}, "finish_reason": None}
    return b"data: " + json.dumps({"object": "chat.completion.chunk", "choices": [choice]}).encode() + b"\n\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def request(relay: RunningRelay, *headers: str, version: str = "1.1") -> bytes:
    body = b'{"model": "m", "stream": true}'
    lines = [f"POST {CHAT} HTTP/{version}", "Host: relay", "Content-Type: application/json", *headers]
    lines += [f"X-Install-Id: {relay.install_id}", f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body


def body_of(received: bytes) -> bytes:
    """Return the body of a chunked answer, which ends with what was received."""
    _, _, rest = received.partition(b"\r\n\r\n")
    body = b""
    while True:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        if not length:
            assert rest == b"\r\n"
            return body
        body, rest = body + rest[:length], rest[length:].removeprefix(b"\r\n")


class Endless:
    """A backend that streams as fast as it is let, and counts."""

    def __init__(self) -> None:
        self.sent = 0
        self.peer: Peer | None = None

    async def serve(self, peer: Peer) -> None:
        await peer.request()
        self.peer = peer
        await peer.send(HEAD + chunk(event("begins")))
        data = chunk(event("x" * _BIG))
        with suppress(ConnectionError):
            while True:
                await peer.send(data)
                self.sent += len(data)


@pytest.fixture
async def endless() -> AsyncIterator[tuple[Endless, RawBackend]]:
    backend = Endless()
    async with raw_backend(backend.serve) as raw:
        yield backend, raw


def url(raw: RawBackend) -> str:
    return f"http://127.0.0.1:{raw.port}/v1"


async def stands_still(backend: Endless) -> int:
    """Wait until a backend is not let send on; return how much it has sent."""
    sent = -1
    while sent != backend.sent:
        sent = backend.sent
        await asyncio.sleep(0.3)
    return sent


async def test_stream_when_its_client_does_not_read_then_the_backend_is_paused_and_goes_on_later(
    start_relay: StartRelay, endless: tuple[Endless, RawBackend]
) -> None:
    backend, raw = endless
    relay = await start_relay(client_of("gemini", url(raw)))
    async with relay.connect("m") as (reader, _):
        await reader.readuntil(b"begins")
        sent = await stands_still(backend)
        assert sent < 32 << 20  # what two sockets and the relay's buffers hold, not all that there is
        read = 0
        while read < sent + (8 << 20):
            read += len(await reader.read(1 << 20))
        assert backend.sent > sent
    assert backend.peer is not None
    async with asyncio.timeout(2):  # the client has left
        await backend.peer.gone.wait()
    assert await relay.spent() == (1, 1)


async def test_stream_when_its_client_never_reads_then_both_connections_end(
    start_relay: StartRelay, endless: tuple[Endless, RawBackend]
) -> None:
    backend, raw = endless
    relay = await start_relay(client_of("gemini", url(raw)), write_idle_s=0.5)
    async with relay.connect("m") as (reader, _):
        await reader.readuntil(b"begins")
        assert backend.peer is not None
        async with asyncio.timeout(10):
            await backend.peer.gone.wait()


async def test_stream_when_its_client_reads_slowly_then_the_total_time_still_ends_it(
    start_relay: StartRelay, endless: tuple[Endless, RawBackend]
) -> None:
    backend, raw = endless
    relay = await start_relay(client_of("gemini", url(raw), total_s=1.0))
    async with relay.connect("m") as (reader, _):
        await reader.readuntil(b"begins")
        await stands_still(backend)
        rest = b""
        async with asyncio.timeout(20):
            while not rest.endswith(END):
                rest = (rest + await reader.read(1 << 20))[-4096:]
                await asyncio.sleep(0.001)
    assert b'"code":"backend_timeout"' in rest


async def served(serve: Serve, start_relay: StartRelay, *headers: str, idle_s: float = 10) -> bytes:
    async with raw_backend(serve) as raw:
        relay = await start_relay(client_of("gemini", url(raw), idle_s=idle_s))
        reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
        writer.write(request(relay, *headers))
        received = await reader.readuntil(b"\r\n" + END)
        writer.close()
        return received


async def test_stream_when_the_backend_falls_silent_then_the_error_is_on_a_line_of_its_own(
    start_relay: StartRelay,
) -> None:
    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(HEAD + chunk(event("one")), chunk(b'data: {"choices": [{"del'), pause_s=0.1)
        await peer.gone.wait()

    body = body_of(await served(serve, start_relay, idle_s=0.5))
    first, error, end = body.split(b"\n\n")
    assert first + b"\n\n" == event("one")
    assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == "backend_timeout"
    assert end == b""


@pytest.mark.parametrize("seed", range(8))
async def test_stream_when_it_is_cut_anywhere_then_it_is_whole(start_relay: StartRelay, seed: int) -> None:
    dice = random.Random(seed)
    told = b"".join(event("ä€x" * dice.randrange(1, 200)) for _ in range(20)) + b": c\r\n\r\ndata:x\rdata:y\r\r" + DONE
    cuts = sorted(dice.sample(range(1, len(told)), 60))
    parts = [told[start:end] for start, end in zip([0, *cuts], [*cuts, len(told)], strict=True)]

    async def serve(peer: Peer) -> None:
        await peer.request()
        framed = HEAD + b"".join(chunk(part) for part in parts) + END
        at = 0
        while at < len(framed):
            size = dice.choice([1, 7, 100, 4096])
            await peer.send(framed[at : at + size])
            at += size
            await asyncio.sleep(0)

    assert body_of(await served(serve, start_relay)) == told


async def test_stream_when_several_chunks_come_in_one_read_then_they_leave_in_one(start_relay: StartRelay) -> None:
    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(HEAD + chunk(event("one")), pause_s=0.2)
        await peer.send(chunk(event("two")) + chunk(event("three")), pause_s=0.2)
        await peer.send(chunk(DONE) + END)

    received = await served(serve, start_relay)
    sizes = [int(size, 16) for size in re.findall(rb"\r\n([0-9a-f]+)\r\ndata", received)]
    assert sizes == [len(event("one")), len(event("two")) + len(event("three")), len(DONE)]


async def test_connection_when_a_stream_has_ended_on_it_then_it_serves_the_next_request(
    start_relay: StartRelay,
) -> None:
    async def serve(peer: Peer) -> None:
        for number in (1, 2):
            await peer.request()
            await peer.send(HEAD + chunk(event(f"of {number}")), chunk(DONE) + END, pause_s=0.05)

    async with raw_backend(serve) as raw:
        relay = await start_relay(client_of("gemini", url(raw)))
        reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
        for number in (1, 2):
            writer.write(request(relay))
            assert body_of(await reader.readuntil(b"\r\n" + END)) == event(f"of {number}") + DONE
        writer.close()
        assert [len(peer.requests) for peer in raw.peers] == [2]
        assert await relay.spent() == (2, 2)


async def test_stream_when_it_is_recorded_then_its_repeat_is_the_same(start_relay: StartRelay, gemini: Backend) -> None:
    relay = await start_relay(client_of("gemini", gemini.url))
    named = {"Idempotency-Key": "k"}
    first = await relay.ask("stream:20", headers=named, stream=True)
    await relay.settled()
    again = await relay.ask("stream:20", headers=named, stream=True)
    assert again.body == first.body
    assert again.headers["Idempotency-Replayed"] == "true"
    assert first.body.count(b"data: ") == 21
    assert await relay.spent() == (1, 1)


async def test_stream_when_it_is_too_long_to_be_kept_then_it_passes_whole_and_its_repeat_is_a_409(
    start_relay: StartRelay, gemini: Backend
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url), answer_limit_kb=1)
    named = {"Idempotency-Key": "k"}
    first = await relay.ask("stream:50", headers=named, stream=True)
    assert first.body.count(b"data: ") == 51
    await relay.settled()
    assert (await relay.ask("stream:50", headers=named, stream=True)).code == "idempotency_answer_not_kept"


async def test_streams_when_many_run_then_each_client_gets_its_own(start_relay: StartRelay) -> None:
    async def serve(peer: Peer) -> None:
        _, body = await peer.request()
        name = json.loads(body)["model"]
        await peer.send(HEAD)
        for number in range(20):
            await peer.send(chunk(event(f"{name} {number}")))
            await asyncio.sleep(random.random() / 100)
        await peer.send(chunk(DONE) + END)

    async with raw_backend(serve) as raw:
        relay = await start_relay(client_of("hardware", url(raw)))

        async def one(name: str) -> None:
            answer = await relay.ask(name, headers={"X-Install-Id": new_install()}, stream=True)
            assert answer.body == b"".join(event(f"{name} {number}") for number in range(20)) + DONE

        await asyncio.gather(*(one(f"model-{number}") for number in range(100)))
        await eventually(lambda: all(peer.gone.is_set() or peer.requests for peer in raw.peers))
