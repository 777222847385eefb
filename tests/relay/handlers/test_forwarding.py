"""What passes through the relay unchanged, and what does not: credentials never pass."""

import asyncio
import gzip
import json
from collections.abc import Callable, Iterable

import pytest
from aiohttp.http import StreamWriter

from limiter.relay.upstream.client import BackendClient
from limiter.relay.upstream.response import BackendResponse
from tests.support.licences import KEY, PUBLIC_KEY, licence_for
from tests.support.openai_backend import CHUNK, Backend, Document, chat
from tests.support.relay import (
    CHAT,
    GEMINI_KEY,
    HARDWARE_KEY,
    ONE_SERVER,
    RunningRelay,
    StartRelay,
    client_of,
    new_install,
    tiers,
)

pytestmark = ONE_SERVER
SPACED = b'{ "model" : "plain",\r\n "messages": [{"role":"user","content":"\\u00e9 \xc3\xa9"}], "n": 1.0 }'
SECRETS = {
    "Cookie": "session=of-the-client",
    "Proxy-Authorization": "Basic b2Y6Y2xpZW50",
    "X-Api-Key": "key-of-the-client",
    "X-Goog-Api-Key": "key-of-the-client",
    "X-Forwarded-For": "10.1.2.3",
    "User-Agent": "client/1",
    "OpenAI-Organization": "org-of-the-client",
}


# Bytes


@pytest.mark.parametrize("path", [CHAT, "/v1/embeddings"])
async def test_body_when_it_is_sent_then_the_backend_gets_its_very_bytes(
    relay: RunningRelay, gemini: Backend, path: str
) -> None:
    answer = await relay.send("POST", path, SPACED, Content_Type="application/json", X_Install_Id=relay.install_id)
    assert answer.status == 200
    assert (gemini.last.path, gemini.last.body) == (path, SPACED)


async def test_body_when_it_is_big_then_it_passes_whole(relay: RunningRelay, gemini: Backend) -> None:
    assert (await relay.ask(input="x" * (5 << 20))).status == 200
    assert gemini.last.document["input"] == "x" * (5 << 20)
    assert gemini.last.headers["Content-Length"] == str(len(gemini.last.body))


async def test_embeddings_when_answered_then_the_answer_is_the_backends(relay: RunningRelay) -> None:
    answer = await relay.ask(path="/v1/embeddings", input="text")
    assert answer.headers["Content-Type"] == "application/json; charset=utf-8"
    assert answer.document["data"][0]["embedding"] == [0.6, -0.8]


async def test_stream_when_passed_then_comments_blank_lines_and_done_are_the_backends(relay: RunningRelay) -> None:
    answer = await relay.ask("stream:3:0.01", stream=True)
    chunks = b"".join(CHUNK % number + b"\n" for number in range(3))
    assert answer.body == b": a comment\n\n" + chunks + b"data: [DONE]\n\n"
    assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert "Content-Length" not in answer.headers


async def test_stream_when_a_chunk_arrives_then_it_passes_at_once(relay: RunningRelay, gemini: Backend) -> None:
    async with relay.post("stepwise") as response:
        assert await response.content.readany() == CHUNK % 0
        assert not gemini.go_on.is_set()
        gemini.go_on.set()
        assert await response.content.read() == CHUNK % 1 + b"data: [DONE]\n\n"


async def test_stream_when_the_relay_itself_fails_within_it_then_it_is_broken_off_and_no_second_answer_follows(
    relay: RunningRelay, gemini: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fault(_upstream: BackendResponse, _sink: Callable[[bytes], None]) -> None:
        raise RuntimeError("fault")

    monkeypatch.setattr(BackendResponse, "pipe", fault)
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
    body = b'{"model": "stepwise", "stream": true}'
    head = f"POST {CHAT} HTTP/1.0\r\nContent-Type: application/json\r\nX-Install-Id: {relay.install_id}\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    received = await reader.read()  # without a length, the body ends with the connection
    writer.close()
    assert received.partition(b"\r\n\r\n")[2] == CHUNK % 0
    gemini.go_on.set()


async def test_stream_when_it_begins_then_its_head_and_first_bytes_leave_in_one_write(
    relay: RunningRelay, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[bytes] = []
    write = StreamWriter._writelines

    def noting(writer: StreamWriter, parts: Iterable[bytes]) -> None:
        written.append(b"".join(parts))
        write(writer, parts)

    monkeypatch.setattr(StreamWriter, "_writelines", noting)
    async with relay.post("stepwise") as response:
        await response.content.readany()
    assert any(b"X-Credits-Backend: gemini" in one and one.endswith(CHUNK % 0 + b"\r\n") for one in written)


async def test_packed_answer_when_passed_then_it_stays_packed(relay: RunningRelay, gemini: Backend) -> None:
    answer = await relay.ask("gzip", headers={"Accept-Encoding": "gzip"})
    assert answer.headers["Content-Encoding"] == "gzip"
    assert json.loads(gzip.decompress(answer.body)) == chat("packed")
    assert len(answer.body) == gemini.last.sent
    assert gemini.last.headers["Accept-Encoding"] == "gzip"


async def test_client_when_it_accepts_no_compression_then_the_backend_is_sent_no_other_accept_encoding(
    relay: RunningRelay, gemini: Backend
) -> None:
    await relay.raw(
        b"POST /v1/embeddings HTTP/1.1\r\nHost: relay\r\nConnection: close\r\nContent-Type: application/json\r\n"
        b"X-Install-Id: %s\r\nContent-Length: 13\r\n\r\n"
        b'{"model":"m"}' % relay.install_id.encode()
    )
    assert gemini.last.headers["Accept-Encoding"] == "identity"


async def test_huge_answer_when_passed_then_it_is_whole(relay: RunningRelay) -> None:
    answer = await relay.ask("huge:3145728")
    assert answer.document == chat("y" * (3 << 20))
    assert await relay.spent() == (1, 1)


async def test_error_when_the_backend_sends_one_then_its_own_text_passes(relay: RunningRelay) -> None:
    answer = await relay.ask("bad-request")
    assert answer.status == 400
    assert answer.document == {
        "error": {
            "message": "max_tokens is too large",
            "type": "invalid_request_error",
            "code": None,
            "param": "max_tokens",
        }
    }


async def test_model_map_when_a_name_is_mapped_then_each_backend_gets_its_own(
    start_relay: StartRelay, gemini: Backend, hardware: Backend
) -> None:
    relay = await start_relay(
        client_of("gemini", gemini.url, models={"recap": "status:500"}),
        client_of("hardware", hardware.url, models={"recap": "llama3.1:8b"}),
    )
    document: Document = {"messages": [{"role": "user", "content": "é"}], "temperature": 0.25, "seed": 9007199254740993}
    assert (await relay.ask("recap", **document)).headers["X-Credits-Backend"] == "hardware"
    assert gemini.last.document == {"model": "status:500", **document}
    assert hardware.last.document == {"model": "llama3.1:8b", **document}


# Headers


async def test_headers_when_the_client_sends_secrets_then_no_backend_gets_them(
    start_relay: StartRelay, gemini: Backend, hardware: Backend
) -> None:
    relay = await start_relay(
        client_of("gemini", gemini.url, models={"m": "status:500"}),
        client_of("hardware", hardware.url),
        public_keys=[PUBLIC_KEY],
    )
    licence = licence_for("pro", KEY)
    answer = await relay.ask("m", headers={**SECRETS, "Authorization": f"Bearer {licence}"})
    assert answer.status == 200
    for backend, key in ((gemini, GEMINI_KEY), (hardware, HARDWARE_KEY)):
        headers = backend.last.headers
        assert headers.getall("Authorization") == [f"Bearer {key}"]
        assert set(headers) <= {"Host", "Accept", "Accept-Encoding", "Authorization", "Content-Type", "Content-Length"}
        everything = str(headers.items()) + backend.last.body.decode()
        assert licence not in everything
        assert relay.install_id not in everything


async def test_headers_when_a_backend_has_no_key_then_it_gets_no_authorization(
    start_relay: StartRelay, hardware: Backend
) -> None:
    relay = await start_relay(BackendClient("hardware", hardware.url, timeout_s=5))
    await relay.ask(headers={"Authorization": f"Bearer {relay.install_id}"})
    assert "Authorization" not in hardware.last.headers


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 407, 418, 422, 429, 500, 503])
async def test_headers_when_an_error_quotes_the_operators_key_then_the_client_does_not_see_it(
    start_relay: StartRelay, gemini: Backend, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url))
    answer = await relay.ask(f"status:{status}")
    assert gemini.last.headers["Authorization"] == f"Bearer {GEMINI_KEY}"
    assert GEMINI_KEY not in str(answer)
    assert GEMINI_KEY not in caplog.text
    assert answer.status == (status if status in {400, 404, 418, 422} else 502)


async def test_headers_when_the_backend_sends_its_own_then_only_known_ones_pass(relay: RunningRelay) -> None:
    """A header that is not ASCII is left out, as it could not be written again."""
    answer = await relay.ask("odd-headers")
    assert answer.status == 200
    assert "Set-Cookie" not in answer.headers
    assert "OpenAI-Version" not in answer.headers
    assert "secret-server" not in str(answer.headers)


async def test_redirect_when_a_backend_sends_one_then_it_is_not_followed(
    start_relay: StartRelay, gemini: Backend
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url))
    answer = await relay.ask("redirect")
    assert (answer.status, len(gemini.seen)) == (502, 1)
    assert "Location" not in answer.headers


async def test_request_id_when_answered_then_it_is_the_relays_and_another_each_time(relay: RunningRelay) -> None:
    answers = [
        await relay.ask(headers={"X-Request-Id": "mine"}),
        await relay.ask("stream:1:0"),
        await relay.ask("status:500"),
        await relay.send("GET", "/nowhere"),
        await relay.send("GET", "/healthz"),
    ]
    ids = {answer.headers["X-Request-Id"] for answer in answers}
    assert len(ids) == 5
    assert "mine" not in ids


async def test_request_id_when_the_request_is_held_then_it_is_the_hold_id(relay: RunningRelay, gemini: Backend) -> None:
    async with relay.connect("wait") as (reader, _):
        await gemini.arrived.wait()
        row = await relay.limiter.row(relay.install_id)
        assert row
        gemini.go_on.set()
        assert f"X-Request-Id: {row.holds[0].hold_id}".encode() in await reader.readuntil(b"\r\n\r\n")


# Rate limit headers


async def test_ratelimit_when_the_tier_is_lifetime_then_no_window_and_no_reset(relay: RunningRelay) -> None:
    answer = await relay.ask()
    assert answer.headers["RateLimit-Policy"] == '"credits";q=50, "gemini";q=20'
    assert answer.headers["RateLimit"] == '"credits";r=49, "gemini";r=19'


@pytest.mark.parametrize(
    ("tier", "policy", "left"),
    [
        ("pro", r'"credits";q=1000;w=W, "gemini";q=400;w=W', r'"credits";r=999;t=T, "gemini";r=399;t=T'),
        ("max", r'"gemini";q=2000;w=W', r'"gemini";r=1999;t=T'),
    ],
)
async def test_ratelimit_when_the_tier_is_monthly_then_window_and_reset_are_of_its_period(
    start_relay: StartRelay, gemini: Backend, tier: str, policy: str, left: str
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url), public_keys=[PUBLIC_KEY])
    headers = {"Authorization": f"Bearer {licence_for(tier, KEY)}"}
    answer = await relay.ask(headers=headers)
    period_s = int(answer.headers["RateLimit-Policy"].rpartition("w=")[2])
    reset_s = int(answer.headers["RateLimit"].rpartition("t=")[2])
    assert period_s % 86_400 == 0  # rounded up: a renewal drops the milliseconds that its period began with
    assert period_s // 86_400 in range(28, 32)
    assert period_s - 10 <= reset_s <= period_s
    assert answer.headers["RateLimit-Policy"] == policy.replace("W", str(period_s))
    assert answer.headers["RateLimit"] == left.replace("T", str(reset_s))


async def test_ratelimit_when_nothing_is_limited_then_there_is_no_header(
    start_relay: StartRelay, gemini: Backend
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url), public_keys=[PUBLIC_KEY])
    answer = await relay.ask(headers={"Authorization": f"Bearer {licence_for('free', KEY)}"})
    assert answer.status == 200
    assert "RateLimit" not in answer.headers
    assert "RateLimit-Policy" not in answer.headers


async def test_ratelimit_when_streamed_refused_or_only_queried_then_it_is_present_too(
    start_relay: StartRelay, gemini: Backend
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url), tiers=tiers(lifetime=1))
    assert (await relay.ask("stream:1:0")).headers["RateLimit"] == '"credits";r=0'
    await relay.settled()
    assert (await relay.ask()).headers["RateLimit"] == '"credits";r=0'
    asked = await relay.send("GET", "/v1/credits", X_Install_Id=relay.install_id)
    assert asked.headers["RateLimit"] == '"credits";r=0'


async def test_backend_when_its_url_ends_in_a_slash_or_not_then_the_path_is_the_same(
    start_relay: StartRelay, gemini: Backend
) -> None:
    for url in (gemini.url, gemini.url + "/"):
        relay = await start_relay(client_of("gemini", url))
        await relay.ask()
        assert gemini.last.path == CHAT


async def test_credits_when_requested_then_the_balance_is_returned_and_no_row_is_created(relay: RunningRelay) -> None:
    install_id = new_install()
    answer = await relay.send("GET", "/v1/credits", X_Install_Id=install_id.upper())
    assert (answer.status, answer.headers["Cache-Control"]) == (200, "no-store")
    assert answer.document == {
        "object": "credits",
        "install_id": install_id,
        "tier": "core",
        "capped": "lifetime",
        "quota": 50,
        "remaining": 50,
        "gemini_cap": 20,
        "gemini_remaining": 20,
        "held": 0,
        "renews_at": None,
    }
    assert await relay.limiter.row(install_id) is None


@pytest.mark.parametrize("packing", ["gzip", "deflate", "br"])
async def test_error_when_it_is_compressed_then_the_operators_key_is_masked_in_it(
    start_relay: StartRelay, gemini: Backend, packing: str
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url))
    answer = await relay.ask(f"packed-status:{packing}", headers={"Accept-Encoding": "gzip, deflate, br"})
    assert gemini.last.headers["Authorization"] == f"Bearer {GEMINI_KEY}"
    assert GEMINI_KEY.encode() not in answer.body
    assert "Content-Encoding" not in answer.headers
    assert answer.status == 400
    assert packing == "br" or json.loads(answer.body)["error"]["message"] == "no: you sent Bearer ***"
    assert await relay.spent() == (0, 0)
