"""Every route, what passes on each, and what the relay adds on request: credits, traces, other origins."""

import asyncio
import gzip
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import openai
import orjson
import pytest

from limiter import CreditLimiter, connect
from limiter.config.loader import load_settings
from limiter.relay.process.relay_process import open_backends
from tests.support.openai_backend import CHUNK, Backend
from tests.support.redis_servers import Server, free_port
from tests.support.relay import CHAT, ONE_SERVER, Answer, RunningRelay, StartRelay, client_of, new_install, tiers
from tests.support.wait import eventually

pytestmark = ONE_SERVER
JSON_ROUTES = [CHAT, "/v1/completions", "/v1/responses"]
STREAM = b": a comment\n\n" + CHUNK % 0 + b"\n" + CHUNK % 1 + b"\n" + b"data: [DONE]\n\n"
APP = "https://app.example"
TRACE = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tracestate": "vendor=1"}


async def models_of(relay: RunningRelay) -> Answer:
    return await relay.send("GET", "/v1/models", X_Install_Id=relay.install_id)


def ids(answer: Answer) -> list[str]:
    return [model["id"] for model in answer.document["data"]]


# Forwarded


@pytest.mark.parametrize("path", [*JSON_ROUTES, "/v1/embeddings"])
async def test_route_when_it_is_requested_then_it_is_forwarded_and_debited(
    relay: RunningRelay, gemini: Backend, path: str
) -> None:
    assert (await relay.ask(path=path)).status == 200
    assert gemini.last.path == path
    assert await relay.spent() == (1, 1)


@pytest.mark.parametrize("path", JSON_ROUTES)
async def test_route_when_it_streams_then_the_bytes_are_the_backends(relay: RunningRelay, path: str) -> None:
    assert (await relay.ask("stream:2:0", path=path)).body == STREAM
    assert await relay.spent() == (1, 1)


async def test_traces_when_sent_then_hardware_gets_them_and_gemini_does_not(
    relay: RunningRelay, gemini: Backend, hardware: Backend
) -> None:
    gemini.always = "status:500"
    await relay.ask(headers=TRACE)
    assert not TRACE.keys() & {name.lower() for name in gemini.last.headers}
    assert {name: hardware.last.headers[name] for name in TRACE} == TRACE


# Models


async def test_models_when_listed_then_mapped_names_come_first_and_each_once(
    start_relay: StartRelay, gemini: Backend, hardware: Backend
) -> None:
    gemini.models, hardware.models = ["models/gemini-2.5-flash", "both"], ["llama3.1:8b", "both"]
    relay = await start_relay(
        client_of("gemini", gemini.url, models={"recap": "gemini-2.5-flash"}),
        client_of("hardware", hardware.url, models={"recap": "llama3.1:8b", "local": "llama3.1:8b"}),
    )
    answer = await models_of(relay)
    assert (answer.status, answer.document["object"]) == (200, "list")
    assert ids(answer) == ["recap", "local", "models/gemini-2.5-flash", "both", "llama3.1:8b"]
    assert answer.document["data"][3] == {"id": "both", "object": "model", "created": 7, "owned_by": "tests"}
    assert "secret" not in answer.body.decode()
    assert await relay.limiter.row(relay.install_id) is None


@pytest.mark.parametrize("behaviour", ["status:500", "status:401", "break-before", "bad-request", "redirect"])
async def test_models_when_a_backend_fails_then_it_is_left_out(
    relay: RunningRelay, gemini: Backend, hardware: Backend, behaviour: str
) -> None:
    gemini.always, gemini.models, hardware.models = behaviour, ["gone"], ["here"]
    assert ids(await models_of(relay)) == ["here"]


async def test_models_when_all_backends_fail_then_502_and_they_are_queried_again_after_seconds(
    start_relay: StartRelay, gemini: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("limiter.relay.handlers.models._FAILED_S", 1)
    relay = await start_relay(client_of("gemini", gemini.url, models={"recap": "x"}))
    gemini.always = "status:500"
    answer = await models_of(relay)
    assert (answer.status, answer.code, answer.headers["Retry-After"]) == (502, "backend_unavailable", "1")
    gemini.always = ""
    assert (await models_of(relay)).status == 502

    async def are_listed() -> bool:
        return (await models_of(relay)).status == 200

    await eventually(are_listed)
    assert ids(await models_of(relay)) == ["recap", "m"]
    assert len(gemini.seen) == 2


async def test_models_when_backends_hang_then_all_who_wait_share_one_failure(
    start_relay: StartRelay, gemini: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("limiter.relay.handlers.models._TIMEOUT_S", 0.5)
    gemini.always = "wait"
    relay = await start_relay(client_of("gemini", gemini.url))
    began_s = time.monotonic()
    answers = await asyncio.gather(*(models_of(relay) for _ in range(6)))
    assert {answer.status for answer in answers} == {502}
    assert time.monotonic() - began_s < 2
    assert len(gemini.seen) == 1


async def test_models_when_requested_often_then_the_backend_is_queried_once(
    relay: RunningRelay, gemini: Backend
) -> None:
    answers = await asyncio.gather(*(models_of(relay) for _ in range(20)))
    assert {answer.status for answer in answers} == {200}
    assert [seen.path for seen in gemini.seen] == ["/v1/models"]


async def test_models_when_there_is_no_install_id_then_400(relay: RunningRelay, gemini: Backend) -> None:
    answer = await relay.send("GET", "/v1/models")
    assert (answer.status, answer.code) == (400, "missing_install_id")
    assert gemini.seen == []


async def test_sdk_when_it_lists_models_then_it_reads_them(relay: RunningRelay) -> None:
    async with openai.AsyncOpenAI(base_url=f"{relay.url}/v1", api_key=relay.install_id) as client:
        assert [model.id async for model in client.models.list()] == ["m"]


@pytest.mark.parametrize(
    "name", ["m", "models/gemini-2.5-flash", "a/b:c@d", "two words", "ünï/%2F", "a?b#c", "{id}", "a/../b"]
)
async def test_sdk_when_it_retrieves_a_model_then_it_reads_that_one(
    relay: RunningRelay, gemini: Backend, name: str
) -> None:
    gemini.models = ["first", name, "last"]
    async with openai.AsyncOpenAI(base_url=f"{relay.url}/v1", api_key=relay.install_id) as client:
        model = await client.models.retrieve(name)
    assert (model.id, model.object, model.created, model.owned_by) == (name, "model", 7, "tests")


async def test_model_when_its_slashes_come_bare_then_it_is_shown(relay: RunningRelay, gemini: Backend) -> None:
    gemini.models = ["models/gemini-2.5-flash"]
    answer = await relay.send("GET", "/v1/models/models/gemini-2.5-flash", X_Install_Id=relay.install_id)
    assert (answer.status, answer.document["id"]) == (200, "models/gemini-2.5-flash")


async def test_sdk_when_it_retrieves_an_unknown_model_then_not_found(relay: RunningRelay) -> None:
    async with openai.AsyncOpenAI(base_url=f"{relay.url}/v1", api_key=relay.install_id) as client:
        with pytest.raises(openai.NotFoundError) as raised:
            await client.models.retrieve("nobody's")
    assert (raised.value.code, raised.value.param, raised.value.type) == (
        "model_not_found",
        "model",
        "invalid_request_error",
    )


# The echo


async def test_echo_when_an_sdk_uses_every_route_then_it_is_answered(start_relay: StartRelay) -> None:
    async with open_backends(load_settings(None, {})[0]) as clients:
        relay = await start_relay(*clients.values())
        async with openai.AsyncOpenAI(base_url=f"{relay.url}/v1", api_key=relay.install_id) as client:
            assert (await client.completions.create(model="m", prompt="to be")).choices[0].text == "to be"
            parts = [part async for part in await client.completions.create(model="m", prompt="to be", stream=True)]
            assert "".join(part.choices[0].text for part in parts) == "to be"
            assert (await client.responses.create(model="m", input="to be")).output_text == "to be"
            async with client.responses.stream(model="m", input="to be") as stream:
                assert (await stream.get_final_response()).output_text == "to be"
            heard = await client.audio.transcriptions.create(model="m", file=("a.wav", b"x" * 2_000_000))
            assert heard.text == "2000000 bytes"
            assert [model.id async for model in client.models.list()] == ["echo"]
        big = await relay.ask(input="x" * (2 << 20))
        assert big.status == 200
        assert await relay.spent() == (6, 6)


# Timeouts


@pytest.mark.parametrize(("name", "limits"), [("idle_s", {"idle_s": 0.2}), ("total_s", {"total_s": 0.4})])
async def test_stream_when_it_takes_too_long_after_its_first_byte_then_an_event_says_so_and_the_debit_stands(
    start_relay: StartRelay, gemini: Backend, name: str, limits: dict[str, Any]
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url, **limits))
    answer = await relay.ask("stepwise" if name == "idle_s" else "stream:1000:0.02")
    assert answer.status == 200
    event = orjson.loads(answer.body.rpartition(b"data: ")[2])
    assert event["error"]["code"] == "backend_timeout"
    await eventually(gemini.last.gone.is_set, what="the end of the call")
    assert await relay.spent() == (1, 1)


@pytest.mark.parametrize("limits", [{"timeout_s": 0.2}, {"total_s": 0.2}])
async def test_backend_when_its_first_byte_takes_too_long_then_504(
    start_relay: StartRelay, gemini: Backend, limits: dict[str, Any]
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url, **limits))
    answer = await relay.ask("hang")
    assert (answer.status, answer.code) == (504, "backend_timeout")
    assert await relay.spent() == (0, 0)


async def test_stream_when_it_goes_on_longer_than_the_first_byte_may_take_then_it_is_whole(
    start_relay: StartRelay, gemini: Backend
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url, timeout_s=0.3, idle_s=5))
    answer = await relay.ask("stream:20:0.03")
    assert answer.body.endswith(CHUNK % 19 + b"\n" + b"data: [DONE]\n\n")


async def test_backend_when_it_accepts_no_connection_then_504_after_connect_s(start_relay: StartRelay) -> None:
    """A port whose queue is full does not answer SYNs."""
    import socket  # noqa: PLC0415  only here

    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        relay = await start_relay(client_of("gemini", f"http://127.0.0.1:{full.getsockname()[1]}/v1", connect_s=0.2))
        took_s = await eventually(lambda: answered(relay, 504))
        for filler in fillers:
            filler.close()
    assert took_s < 5


async def answered(relay: RunningRelay, status: int) -> bool:
    return (await relay.ask()).status == status


# Credits at the end of a stream


async def test_credits_event_when_requested_then_the_last_comment_has_charge_and_balance(
    start_relay: StartRelay, gemini: Backend
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url), tiers=tiers(lifetime=10, gemini_cap=5), costs={CHAT: 3})
    answer = await relay.ask("stream:2:0", headers={"X-Credits-Event": "1"})
    summary = b'{"charged":3,"backend":"gemini","remaining":7,"gemini_remaining":2}'
    assert answer.body == STREAM + b": credits " + summary + b"\n\n"
    assert answer.headers["RateLimit"] == '"credits";r=7, "gemini";r=2'


async def test_credits_event_when_the_stream_breaks_then_it_stands_on_a_line_of_its_own(relay: RunningRelay) -> None:
    answer = await relay.ask("break-stream", headers={"X-Credits-Event": "1"})
    *_, error, comment, end = answer.body.split(b"\n\n")
    assert error.startswith(b'data: {"type"')
    assert comment.startswith(b': credits {"charged":1,')
    assert end == b""


@pytest.mark.parametrize("headers", [{}, {"X-Credits-Event": "0"}, {"X-Credits-Event": "true"}])
async def test_credits_event_when_not_requested_then_there_is_none(
    relay: RunningRelay, headers: dict[str, str]
) -> None:
    assert (await relay.ask("stream:2:0", headers=headers)).body == STREAM


async def test_credits_event_when_the_answer_is_packed_or_not_a_stream_then_there_is_none(
    relay: RunningRelay, gemini: Backend
) -> None:
    asked = {"X-Credits-Event": "1", "Accept-Encoding": "gzip"}
    assert b"credits" not in (await relay.ask(headers=asked)).body
    packed = await relay.ask("gzip-stream", headers=asked)
    assert packed.headers["Content-Type"] == "text/event-stream"
    assert gzip.decompress(packed.body) == STREAM
    assert gemini.last.sent == len(packed.body)


async def test_sdk_when_it_requests_the_credits_event_then_it_reads_its_stream_as_usual(relay: RunningRelay) -> None:
    async with openai.AsyncOpenAI(base_url=f"{relay.url}/v1", api_key=relay.install_id) as client:
        stream = await client.chat.completions.create(
            model="stream:2:0",
            messages=[{"role": "user", "content": "Hi"}],
            stream=True,
            extra_headers={"X-Credits-Event": "1"},
        )
        assert [chunk.choices[0].delta.content async for chunk in stream] == ["w0 ", "w1 "]


# Other origins


@pytest.fixture
async def open_to_app(start_relay: StartRelay, gemini: Backend) -> RunningRelay:
    return await start_relay(client_of("gemini", gemini.url), cors_origins=[APP], tiers=tiers(lifetime=3))


def cors(answer: Answer) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name.startswith("Access-Control-")}


async def preflight(relay: RunningRelay, path: str, origin: str, method: str = "POST") -> Answer:
    return await relay.send(
        "OPTIONS",
        path,
        Origin=origin,
        Access_Control_Request_Method=method,
        Access_Control_Request_Headers="authorization, x-install-id,x-stainless-os",
    )


async def test_preflight_when_the_origin_is_allowed_then_the_requested_headers_are(open_to_app: RunningRelay) -> None:
    answer = await preflight(open_to_app, CHAT, APP)
    assert (answer.status, answer.body) == (204, b"")
    allowed = cors(answer)
    assert allowed["Access-Control-Allow-Origin"] == APP
    assert allowed["Access-Control-Allow-Methods"] == "POST"
    assert allowed["Access-Control-Allow-Headers"] == "authorization, x-install-id,x-stainless-os"
    assert "Access-Control-Allow-Credentials" not in allowed
    assert "Origin" in answer.headers.getall("Vary")


@pytest.mark.parametrize("origin", ["https://app.example.evil", "http://app.example", APP + ":444", "null", "*"])
async def test_origin_when_it_is_another_then_no_answer_allows_it(open_to_app: RunningRelay, origin: str) -> None:
    refused = await preflight(open_to_app, CHAT, origin)
    assert (refused.status, cors(refused)) == (405, {})
    assert cors(await open_to_app.ask(headers={"Origin": origin})) == {}


@pytest.mark.parametrize("model", ["plain", "stream:1:0", "status:500"])
async def test_answer_when_the_origin_is_allowed_then_its_headers_can_be_read(
    open_to_app: RunningRelay, model: str
) -> None:
    answer = await open_to_app.ask(model, headers={"Origin": APP})
    assert answer.headers["Access-Control-Allow-Origin"] == APP
    exposed = answer.headers["Access-Control-Expose-Headers"].split(", ")
    assert {"X-Request-Id", "X-Credits-Backend", "RateLimit", "RateLimit-Policy", "Retry-After"} <= set(exposed)


async def test_refusal_when_the_origin_is_allowed_then_the_page_can_read_it(open_to_app: RunningRelay) -> None:
    for path, status in (("/nowhere", 404), ("/v1/credits", 400)):
        answer = await open_to_app.send("GET", path, Origin=APP)
        assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (status, APP)
    assert (await preflight(open_to_app, "/nowhere", APP)).status == 404


async def test_origins_when_none_is_set_then_no_answer_has_cors_headers(relay: RunningRelay) -> None:
    refused = await preflight(relay, CHAT, APP)
    assert (refused.status, cors(refused)) == (405, {})
    answer = await relay.ask(headers={"Origin": APP})
    assert cors(answer) == {}
    assert "Vary" not in answer.headers


# Another protocol


@pytest.mark.parametrize("start", ["POST /v1/chat/completions", "GET /v1/credits", "POST /v1/audio/transcriptions"])
async def test_upgrade_when_it_is_requested_then_400_and_nothing_is_reserved(
    relay: RunningRelay, gemini: Backend, start: str
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
    head = f"{start} HTTP/1.1\r\nHost: a\r\nX-Install-Id: {relay.install_id}\r\nContent-Type: application/json\r\n"
    inner = "GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"
    upgrade = f"Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nContent-Length: {len(inner)}\r\n\r\n"
    writer.write((head + upgrade + inner).encode())
    answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    assert answer.startswith(b"HTTP/1.1 400 ")
    rest = await asyncio.wait_for(reader.read(), 5)
    assert b"upgrade_not_offered" in rest
    assert b"HTTP/1.1 2" not in rest  # what was in the body was no request
    writer.close()
    assert await relay.limiter.row(relay.install_id) is None
    assert gemini.seen == []


async def test_upgrade_when_it_is_h2c_then_it_is_served_as_http_1_1(relay: RunningRelay) -> None:
    """Java's client, and others, offer it with each first request on a plain connection."""
    headers = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMAAABk"}
    assert (await relay.ask(headers=headers)).status == 200
    assert await relay.spent() == (1, 1)


async def test_body_when_it_is_over_the_limit_then_the_connection_is_closed_before_all_of_it(
    start_relay: StartRelay, gemini: Backend
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url), body_limit_mb=1)
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nX-Install-Id: {new_install()}\r\nContent-Type: application/json\r\n"
    writer.write((head + "Content-Length: 900000000\r\n\r\n").encode() + b"x" * (2 << 20))
    answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"Connection: close" in answer
    writer.close()


async def test_fallback_when_gemini_cannot_be_reached_then_every_route_is_served_by_hardware(
    start_relay: StartRelay, hardware: Backend
) -> None:
    relay = await start_relay(
        client_of("gemini", f"http://127.0.0.1:{free_port()}/v1"), client_of("hardware", hardware.url)
    )

    async def each() -> AsyncIterator[str]:
        for path in JSON_ROUTES:
            yield (await relay.ask("stream:1:0", path=path)).headers["X-Credits-Backend"]

    assert [backend async for backend in each()] == ["hardware"] * 3
    assert await relay.spent() == (3, 0)


# What only the operator's networks see


@pytest.mark.parametrize(
    ("client", "sees"),
    [("203.0.113.5", False), ("2001:db8::1", False), ("10.1.2.3", True), ("192.168.7.8", True), ("fd00::1", True)],
)
async def test_metrics_and_readiness_when_a_client_asks_then_only_one_inside_sees_more_than_a_status(
    start_relay: StartRelay, gemini: Backend, client: str, sees: bool
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url), trusted_proxies=["127.0.0.1"])
    metrics = await relay.send("GET", "/metrics", X_Forwarded_For=client)
    assert (metrics.status, b"limiter_" in metrics.body) == ((200, True) if sees else (404, False))
    ready = await relay.send("GET", "/readyz", X_Forwarded_For=client)
    assert ready.status == 200
    assert sees or ready.document == {"status": "ready"}
    assert ("backends" in ready.document) == sees


async def test_readiness_when_a_client_outside_asks_during_an_outage_then_it_is_a_bare_503(
    start_relay: StartRelay, gemini: Backend, own_server: Callable[..., Server], closing: AsyncExitStack
) -> None:
    server = own_server()
    redis = await connect(server.url, timeout_ms=200)
    closing.push_async_callback(redis.aclose)
    relay = await start_relay(
        client_of("gemini", gemini.url), on=CreditLimiter(redis, tiers(lifetime=9), timeout_ms=200), inside_networks=[]
    )
    server.kill()
    ready = await relay.send("GET", "/readyz")
    assert (ready.status, ready.document) == (503, {"status": "not ready"})
