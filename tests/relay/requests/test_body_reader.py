"""Bodies that arrive slowly, or from nobody who is known: they are refused early, while an honest install is served."""

import asyncio
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from limiter.relay.handlers.context import RELAY
from tests.support.openai_backend import Backend
from tests.support.relay import CHAT, ONE_SERVER, Answer, RunningRelay, StartRelay, client_of, new_install
from tests.support.wait import eventually

pytestmark = ONE_SERVER
UPLOAD = "/v1/audio/transcriptions"
MIB = 1 << 20
KINDS = {CHAT: "application/json", UPLOAD: "multipart/form-data; boundary=b"}
BEGINNINGS = {
    CHAT: b'{"model":"plain","messages":[],"x":"',
    UPLOAD: b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nplain\r\n'
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n',
}
ENDS = {CHAT: b'"}', UPLOAD: b"\r\n--b--\r\n"}


@asynccontextmanager
async def sending(
    relay: RunningRelay, path: str, length: int = 10 * MIB, install_id: str = "", *more: str
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Send the head of a request and the beginning of its body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
    lines = [f"POST {path} HTTP/1.1", "Host: relay", f"X-Install-Id: {install_id or relay.install_id}"]
    lines += [f"Content-Type: {KINDS[path]}", f"Content-Length: {length}", *more]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    try:
        yield reader, writer
    finally:
        writer.close()


async def answer_to(reader: asyncio.StreamReader) -> Answer:
    status = int((await reader.readline()).split()[1])
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(int(line.split(b":")[1]) for line in head.lower().splitlines() if line.startswith(b"content-length"))
    return Answer(status, None, await reader.readexactly(length))  # type: ignore[arg-type]


async def code_of(reader: asyncio.StreamReader) -> tuple[int, str]:
    answer = await asyncio.wait_for(answer_to(reader), 10)
    return answer.status, json.loads(answer.body)["error"]["code"]


@pytest.mark.parametrize("path", KINDS)
async def test_body_when_it_stands_still_then_408_and_nothing_is_debited(
    start_relay: StartRelay, gemini: Backend, path: str
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url), body_idle_s=0.3)
    async with sending(relay, path) as (reader, writer):
        writer.write(BEGINNINGS[path] + b"x" * 200_000)
        assert await code_of(reader) == (408, "request_timeout")
    assert (await relay.ask()).status == 200
    assert await relay.spent() == (1, 1)


@pytest.mark.parametrize("path", KINDS)
async def test_body_when_it_dribbles_then_408_long_before_its_whole_time_is_over(
    start_relay: StartRelay, gemini: Backend, path: str
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url), body_idle_s=0.4, body_min_rate_kb=1)

    async def dribble(writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(b"x")
            await asyncio.sleep(0.05)

    async with sending(relay, path) as (reader, writer):
        writer.write(BEGINNINGS[path])
        dribbling = asyncio.create_task(dribble(writer))
        assert await code_of(reader) == (408, "request_timeout")
        dribbling.cancel()
    assert await relay.spent() == (0, 0)


@pytest.mark.parametrize("path", KINDS)
async def test_body_when_it_arrives_at_the_least_rate_then_it_is_served_however_long_it_takes(
    start_relay: StartRelay, gemini: Backend, path: str
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url), body_idle_s=0.5, body_min_rate_kb=1)
    body = BEGINNINGS[path] + b"x" * 3000 + ENDS[path]
    async with sending(relay, path, len(body)) as (reader, writer):
        for begin in range(0, len(body), 200):
            writer.write(body[begin : begin + 200])
            await asyncio.sleep(0.06)
        assert (await asyncio.wait_for(answer_to(reader), 10)).status == 200
    assert await relay.spent() == (1, 1)


async def test_large_body_when_its_install_is_new_and_may_not_be_created_then_it_is_refused_before_the_rest_is_read(
    start_relay: StartRelay, gemini: Backend
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url), mint_overall=1)
    assert (await relay.ask()).status == 200
    for _ in range(3):
        async with sending(relay, CHAT, 10 * MIB, new_install()) as (reader, writer):
            writer.write(BEGINNINGS[CHAT] + b"x" * 200_000)
            assert await code_of(reader) == (429, "install_mint_limited")
    assert (await relay.ask(input="x" * 2 * MIB)).status == 200
    assert len(gemini.seen) == 2
    assert await relay.spent() == (2, 2)


async def test_large_body_when_its_install_is_new_then_it_is_served_for_one_debit(
    start_relay: StartRelay, gemini: Backend
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url))
    answer = await relay.ask(input="x" * 2 * MIB)
    assert (answer.status, answer.headers["RateLimit"]) == (200, '"credits";r=49, "gemini";r=19')
    assert await relay.spent() == (1, 1)


async def test_large_body_when_it_is_repeated_by_its_key_without_credits_then_its_answer_is_replayed(
    start_relay: StartRelay, gemini: Backend
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url))
    headers = {"Idempotency-Key": "k"}
    first = await relay.ask(headers=headers, input="x" * MIB)
    while (await relay.ask()).status == 200:
        pass
    again = await relay.ask(headers=headers, input="x" * MIB)
    assert (again.status, again.body, again.headers["Idempotency-Replayed"]) == (200, first.body, "true")


@pytest.mark.parametrize("path", KINDS)
async def test_expect_when_the_head_is_refused_then_no_100_is_sent(relay: RunningRelay, path: str) -> None:
    async with sending(relay, path, 1 << 40, "", "Expect: 100-continue") as (reader, _):
        assert await code_of(reader) == (413, "request_too_large")
    body = BEGINNINGS[path] + ENDS[path]
    async with sending(relay, path, len(body), "", "Expect: 100-continue") as (reader, writer):
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(body)
        assert (await answer_to(reader)).status == 200


async def test_body_when_its_document_would_be_huge_then_it_is_served_and_only_its_model_changes(
    start_relay: StartRelay, gemini: Backend
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url, models={"m": "plain"}, timeout_s=60))
    body = b'{"x":[' + b"[]," * 500_000 + b'0],"model":"m"}'
    headers = {"X-Install-Id": relay.install_id, "Content-Type": "application/json"}
    async with relay.session.post(relay.url + CHAT, data=io.BytesIO(body), headers=headers) as answer:
        assert answer.status == 200
    assert gemini.last.body == body[:-3] + b'plain"}'
    await eventually(lambda: relay.app[RELAY].memory.held_b == 0)
