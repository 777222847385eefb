"""A credit is for an answer: what a backend says with status 200 is debited, kept and counted by what it carries."""

import asyncio
import gzip
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any

import openai
import pytest

from limiter.config.loader import load_settings
from limiter.credits.models import Backend as Name
from limiter.relay.process.relay_process import open_backends
from limiter.relay.upstream.circuit_breaker import CircuitBreaker
from tests.support.openai_backend import Backend, Document
from tests.support.relay import CHAT, ONE_SERVER, Answer, RunningRelay, StartRelay, client_of, new_install, tiers
from tests.support.scripted_backend import Script, ScriptedBackend, scripted_backend, stream, whole
from tests.support.wait import eventually

pytestmark = ONE_SERVER
COMPLETIONS, RESPONSES = "/v1/completions", "/v1/responses"
EMBEDDINGS, UPLOAD = "/v1/embeddings", "/v1/audio/transcriptions"
STREAMED = [CHAT, COMPLETIONS, RESPONSES]
WHOLE = [*STREAMED, EMBEDDINGS, UPLOAD]
PING, DONE = b": ping\n\n", b"data: [DONE]\n\n"


def event(document: object, name: str = "") -> bytes:
    line = f"event: {name}\n" if name else ""
    return f"{line}data: {json.dumps(document, ensure_ascii=False)}\n\n".encode()


def chat(finish_reason: str | None = None, **delta: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return event({"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]})


def text(words: str) -> bytes:
    choice = {"index": 0, "text": words, "finish_reason": None}
    return event({"id": "c", "object": "text_completion", "created": 1, "model": "m", "choices": [choice]})


def response(kind: str, **members: Any) -> bytes:
    return event({"type": kind, "sequence_number": 1, **members}, kind)


def delta(words: str) -> bytes:
    members = {"item_id": "i", "output_index": 0, "content_index": 0, "logprobs": []}
    return response("response.output_text.delta", delta=words, **members)


CONTENT = {CHAT: chat(content="Grüße"), COMPLETIONS: text("Grüße"), RESPONSES: delta("Grüße")}
EMPTY = {
    CHAT: chat(role="assistant", content=""),
    COMPLETIONS: text(""),
    RESPONSES: response("response.created", response={"id": "r"}) + response("response.in_progress"),
}
ERROR = event({"error": {"message": "overloaded", "type": "server_error", "code": 503}})
FAILED = response("response.failed", response={"error": {"code": "server_error", "message": "overloaded"}})
STREAM_FAILURES: Mapping[str, Script] = {
    "error": stream(ERROR, DONE),
    "event: error": stream(b"event: error\n" + ERROR),
    "event: error, plain words": stream(b"event: error\ndata: overloaded\n\n"),
    "pings, error": stream(PING, PING, ERROR),
    "error, break": stream(ERROR, ends=False),
    "response.failed": stream(EMPTY[RESPONSES], FAILED),
    "error of the Responses API": stream(response("error", message="overloaded")),
    "object: error": stream(event({"object": "error", "message": "overloaded", "type": "InternalError", "code": 500})),
    "field error": stream(b'error: {"code": 500, "message": "overloaded"}\n\n'),
    "array": stream(event([{"error": {"code": 503}}])),
    "no Content-Type": stream(ERROR, content_type=None),
    "text/plain": stream(PING, ERROR, content_type="text/plain"),
    "NDJSON": stream(b'{"error": "overloaded"}\n', content_type="application/x-ndjson"),
    "JSON": whole(b'{"error": {"message": "overloaded"}}'),
    "JSON of many lines": stream(b'[{\n "error": {\n  "code": 503\n', b" }\n}]\n", content_type="application/json"),
    "no byte": stream(),
    "pings": stream(PING, PING),
    "blank lines": stream(b"\n", b"\r\n\r\n"),
    "[DONE]": stream(DONE),
    "empty events": stream(*EMPTY.values(), DONE),
    "usage alone": stream(event({"choices": [], "usage": {"total_tokens": 1}}), DONE),
    "break": stream(ends=False),
    "pings, break": stream(PING, ends=False),
    "half an event, break": stream(CONTENT[CHAT][:50], ends=False),
    "half an event, end": stream(CONTENT[CHAT][:50]),
}
WHOLE_FAILURES: Mapping[str, Script] = {
    "object": whole(b'{"error": {"message": "overloaded", "code": 503}}'),
    "array": whole(b'[{\n  "error": {\n    "code": 503,\n    "status": "UNAVAILABLE"\n  }\n}\n]\n'),
    "words": whole(b'{"error": "overloaded"}'),
    "object: error": whole(b'{"object":"error","message":"overloaded","type":"InternalError","code":500}'),
    "failed response": whole(b'{"object":"response","status":"failed","error":{"code":"server_error"},"output":[]}'),
    "gzip": whole(gzip.compress(b'{"error": "overloaded"}'), more="Content-Encoding: gzip\r\n"),
    "empty": whole(b""),
    "blank": whole(b" \n"),
    "half": [b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n", b'{"id": "c"'],
}


@pytest.fixture
async def raw() -> AsyncIterator[ScriptedBackend]:
    async with scripted_backend() as backend:
        yield backend


async def ask(relay: RunningRelay, path: str, *, streams: bool, headers: Mapping[str, str] | None = None) -> Answer:
    if path == UPLOAD:
        part = b"--b\r\nContent-Disposition: form-data; name="
        form = part + b'"model"\r\n\r\nm\r\n' + part + b'"file"; filename="a.wav"\r\n\r\nxyz\r\n--b--\r\n'
        named = {"Content-Type": "multipart/form-data; boundary=b", "X-Install-Id": relay.install_id, **(headers or {})}
        return await relay.send("POST", path, form, **named)
    more: Document = {"stream": True} if streams else {}
    return await relay.ask("m", path, headers={"Accept-Encoding": "gzip", **(headers or {})}, **more)


# Nothing was delivered


async def fails_and_falls_back(
    start_relay: StartRelay, raw: ScriptedBackend, hardware: Backend, path: str, *, streams: bool
) -> None:
    key = {"Idempotency-Key": "k"}
    names: list[Name] = ["gemini", "hardware"]
    for name in names:
        alone = await start_relay(client_of(name, raw.url))
        answer = await ask(alone, path, streams=streams, headers=key)
        assert (answer.status, answer.code) == (502, "backend_unavailable")
        assert await alone.spent() == (0, 0)
        again = await ask(alone, path, streams=streams, headers=key)
        assert again.status == 502  # the backend was asked again: the failure was not kept
        assert raw.calls == 2
        raw.calls = 0
    both = await start_relay(client_of("gemini", raw.url), client_of("hardware", hardware.url))
    answer = await ask(both, path, streams=streams, headers=key)
    assert (answer.status, answer.headers["X-Credits-Backend"]) == (200, "hardware")
    assert await both.spent() == (1, 0)
    assert (await ask(both, path, streams=streams, headers=key)).headers["Idempotency-Replayed"] == "true"


@pytest.mark.parametrize("path", STREAMED)
@pytest.mark.parametrize("failure", STREAM_FAILURES)
async def test_stream_when_it_carries_nothing_then_it_is_a_failure_and_costs_nothing(
    start_relay: StartRelay, raw: ScriptedBackend, hardware: Backend, failure: str, path: str
) -> None:
    raw.script = STREAM_FAILURES[failure]
    await fails_and_falls_back(start_relay, raw, hardware, path, streams=True)


@pytest.mark.parametrize("path", WHOLE)
@pytest.mark.parametrize("failure", WHOLE_FAILURES)
async def test_body_when_it_is_an_error_then_it_is_a_failure_and_costs_nothing(
    start_relay: StartRelay, raw: ScriptedBackend, hardware: Backend, failure: str, path: str
) -> None:
    raw.script = WHOLE_FAILURES[failure]
    await fails_and_falls_back(start_relay, raw, hardware, path, streams=False)


async def test_error_when_it_is_about_the_request_then_the_breaker_does_not_count_it(
    start_relay: StartRelay, raw: ScriptedBackend
) -> None:
    """Or whoever sends bad requests would take the backend from everybody."""
    relay = await start_relay(client_of("gemini", raw.url, breaker=CircuitBreaker(failures=1, reset_s=60)))
    for code in (400, 429):
        raw.script = whole(json.dumps({"error": {"message": "no", "code": code}}).encode())
        assert (await ask(relay, CHAT, streams=False)).status == 502
        raw.script = stream(event({"error": {"message": "no", "code": str(code)}}))
        assert (await ask(relay, CHAT, streams=True)).status == 502
    assert raw.calls == 4
    relay = await start_relay(client_of("gemini", raw.url, breaker=CircuitBreaker(failures=1, reset_s=60)))
    raw.script = whole(b'{"error": {"message": "bad key", "code": 401}}')
    for _ in range(2):
        assert (await ask(relay, CHAT, streams=False)).status == 502
    assert raw.calls == 5  # that is about the relay


# Something was


@pytest.mark.parametrize("path", STREAMED)
@pytest.mark.parametrize("name", ["gemini", "hardware"])
async def test_stream_when_pings_precede_its_content_then_all_passes_and_it_is_debited_once(
    start_relay: StartRelay, raw: ScriptedBackend, path: str, name: Name
) -> None:
    relay = await start_relay(client_of(name, raw.url))
    raw.script = stream(PING, EMPTY[path], PING, 0.05, CONTENT[path], DONE)
    answer = await ask(relay, path, streams=True)
    assert answer.body == PING + EMPTY[path] + PING + CONTENT[path] + DONE
    assert answer.headers["X-Accel-Buffering"] == "no"
    assert await relay.spent() == (1, int(name == "gemini"))


@pytest.mark.parametrize(
    "only",
    [
        chat("stop"),
        chat("length"),
        chat(reasoning_content="Hm"),
        chat(refusal="No"),
        chat(tool_calls=[{"index": 0, "id": "a", "function": {"name": "f", "arguments": ""}}]),
        response("response.incomplete", response={"id": "r"}),
        response("response.completed", response={"id": "r"}),
        response("response.output_item.added", item={"type": "function_call", "name": "f", "arguments": ""}),
    ],
    ids=lambda only: only.decode()[:200],
)
async def test_stream_when_it_ends_without_words_then_what_it_carries_is_paid_for(
    start_relay: StartRelay, raw: ScriptedBackend, only: bytes
) -> None:
    relay = await start_relay(client_of("gemini", raw.url))
    raw.script = stream(only)
    assert (await ask(relay, CHAT, streams=True)).body == only
    assert await relay.spent() == (1, 1)


@pytest.mark.parametrize("path", STREAMED)
@pytest.mark.parametrize("content_type", ["text/plain", "application/octet-stream", "application/json", "", None])
async def test_stream_when_its_content_type_is_another_then_what_arrives_passes_at_once(
    start_relay: StartRelay, raw: ScriptedBackend, path: str, content_type: str | None
) -> None:
    relay = await start_relay(client_of("hardware", raw.url))
    raw.script = stream(PING, CONTENT[path], 30, CONTENT[path], content_type=content_type)
    async with asyncio.timeout(10), relay.post("m", path, stream=True) as streaming:
        assert await streaming.content.readexactly(len(PING + CONTENT[path])) == PING + CONTENT[path]
        assert streaming.headers["X-Accel-Buffering"] == "no"
        assert await relay.spent() == (1, 0)


@pytest.mark.parametrize("content_type", ["application/x-ndjson", "application/json", None])
async def test_stream_when_it_is_lines_of_json_then_each_passes_at_once(
    start_relay: StartRelay, raw: ScriptedBackend, content_type: str | None
) -> None:
    relay = await start_relay(client_of("hardware", raw.url))
    line = b'{"choices": [{"text": "Hi"}]}\n'
    raw.script = stream(line[:9], line[9:], 30, line, content_type=content_type)
    async with asyncio.timeout(10), relay.post("m", stream=True) as streaming:
        assert await streaming.content.readexactly(len(line)) == line
        assert await relay.spent() == (1, 0)


async def test_body_when_a_stream_was_asked_for_then_it_passes_whole_and_is_debited(
    start_relay: StartRelay, raw: ScriptedBackend
) -> None:
    relay = await start_relay(client_of("gemini", raw.url))
    raw.script = whole(b'{"choices": [{"message": {"content": "Hi"}}], "error": null}')
    answer = await ask(relay, CHAT, streams=True)
    assert (answer.status, answer.document["choices"][0]["message"]["content"]) == (200, "Hi")
    assert await relay.spent() == (1, 1)


# It breaks later


@pytest.mark.parametrize("path", STREAMED)
@pytest.mark.parametrize("name", ["gemini", "hardware"])
@pytest.mark.parametrize("end", ["break", "error", "error, [DONE]", "response.failed", "error in one chunk"])
async def test_stream_when_it_fails_after_content_then_the_debit_stands_and_no_repeat_gets_half_of_it(
    start_relay: StartRelay, raw: ScriptedBackend, path: str, name: Name, end: str
) -> None:
    relay = await start_relay(client_of(name, raw.url, breaker=CircuitBreaker(failures=2, reset_s=60)))
    content = CONTENT[path]
    raw.script = {
        "break": stream(content, content[:40], ends=False),
        "error": stream(content, ERROR),
        "error, [DONE]": stream(content, 0.02, ERROR, 0.02, DONE),
        "response.failed": stream(content, 0.02, FAILED),
        "error in one chunk": stream(content + ERROR + DONE),
    }[end]
    key = {"Idempotency-Key": "k"}
    answer = await ask(relay, path, streams=True, headers=key)
    assert answer.body.startswith(content)
    assert b"error" in answer.body
    assert await relay.spent() == (1, int(name == "gemini"))
    again = await ask(relay, path, streams=True, headers=key)
    assert (again.status, again.code) == (409, "idempotency_answer_not_kept")
    assert raw.calls == 1
    relay.install_id = new_install()
    await ask(relay, path, streams=True)  # the first call counts as good, and then as bad, too
    await ask(relay, path, streams=True)
    assert (await ask(relay, path, streams=True)).status == 502
    assert raw.calls <= 3


async def test_backend_when_it_breaks_after_its_first_byte_again_and_again_then_the_breaker_opens(
    start_relay: StartRelay, raw: ScriptedBackend, hardware: Backend
) -> None:
    breaker = CircuitBreaker(failures=3, reset_s=60)
    relay = await start_relay(client_of("gemini", raw.url, breaker=breaker), client_of("hardware", hardware.url))
    raw.script = stream(CONTENT[CHAT], ends=False)
    served = [(await ask(relay, CHAT, streams=True)).headers["X-Credits-Backend"] for _ in range(6)]
    assert served == ["gemini"] * 3 + ["hardware"] * 3
    assert breaker.state == "open"
    assert await relay.spent() == (6, 3)


def events_of(body: bytes) -> list[str]:
    """Return the data of each event, as a strict parser reads it."""
    read = body.decode().replace("\r\n", "\n")
    found = []
    for part in read.split("\n\n"):
        data = [line.removeprefix("data: ") for line in part.split("\n") if line.startswith("data: ")]
        if data:
            found.append("\n".join(data))
    return found


@pytest.mark.parametrize("path", STREAMED)
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
async def test_stream_when_it_breaks_anywhere_then_its_error_is_an_event_of_its_own(
    start_relay: StartRelay, raw: ScriptedBackend, path: str, ends: str
) -> None:
    content = CONTENT[path].replace(b"\n", ends.encode())
    relay = await start_relay(client_of("hardware", raw.url), tiers=tiers(lifetime=5000))
    for cut in range(0, len(content) + 1, 3):
        raw.script = stream(content, content[:cut], ends=False)
        body = (await ask(relay, path, streams=True)).body
        assert body.startswith(content)
        *before, last = events_of(body)
        assert json.loads(last)["error"]["code"] == "backend_unavailable"
        assert before in ([events_of(content)[0]], [events_of(content)[0]] * 2)
    assert (await relay.spent())[0] == len(range(0, len(content) + 1, 3))


@pytest.mark.parametrize(("path", "call"), [(CHAT, "chat"), (COMPLETIONS, "completions"), (RESPONSES, "responses")])
async def test_sdk_when_a_stream_breaks_within_a_line_or_a_character_then_it_raises_its_api_error(
    start_relay: StartRelay, raw: ScriptedBackend, path: str, call: str
) -> None:
    relay = await start_relay(client_of("hardware", raw.url))
    content = CONTENT[path]
    middle = content.index("ü".encode()) + 1
    async with openai.AsyncOpenAI(base_url=f"{relay.url}/v1", api_key=relay.install_id, max_retries=0) as client:

        async def read() -> int:
            streaming: Any
            if call == "chat":
                messages: Any = [{"role": "user", "content": "Hi"}]
                streaming = await client.chat.completions.create(model="m", messages=messages, stream=True)
            elif call == "completions":
                streaming = await client.completions.create(model="m", prompt="Hi", stream=True)
            else:
                streaming = await client.responses.create(model="m", input="Hi", stream=True)
            got: list[object] = []

            async def collect() -> None:
                async for each in streaming:
                    got.append(each)  # noqa: PERF401  an async for in a list would lose them at the error

            with pytest.raises(openai.APIError, match="hardware"):
                await collect()
            return len(got)

        for cut in (0, 6, content.index(b"data") + 5, middle, len(content) - 2, len(content) - 1):
            raw.script = stream(content, content[:cut], ends=False)
            assert await read() in {1, 2}


async def test_stream_when_it_ends_within_an_event_then_the_credits_comment_ends_no_event(
    start_relay: StartRelay, raw: ScriptedBackend
) -> None:
    relay = await start_relay(client_of("gemini", raw.url))
    raw.script = stream(CONTENT[CHAT], b'data: {"choices"')
    answer = await ask(relay, CHAT, streams=True, headers={"X-Credits-Event": "1"})
    assert answer.body.startswith(CONTENT[CHAT] + b'data: {"choices"\n: credits {"charged":1,')
    assert answer.body.endswith(b"}\n")
    assert answer.body.count(b"\n\n") == 1


# Pings for longer than they are held back


async def begins_with_pings(relay: RunningRelay, path: str = CHAT, key: str = "k") -> Answer:
    headers = {"X-Credits-Event": "1", "Idempotency-Key": key}
    async with asyncio.timeout(20), relay.post("m", path, headers, stream=True) as streaming:
        assert await streaming.content.readexactly(len(PING)) == PING
        assert streaming.headers["X-Credits-Backend"] == "gemini"
        row = await relay.limiter.row(relay.install_id)
        assert row
        assert (row.lifetime_consumed, len(row.holds)) == (0, 1)
        return Answer(streaming.status, streaming.headers, PING + await streaming.content.read())


@pytest.mark.parametrize("path", STREAMED)
async def test_pings_when_they_last_then_they_pass_and_content_after_them_is_debited(
    start_relay: StartRelay, raw: ScriptedBackend, path: str
) -> None:
    relay = await start_relay(client_of("gemini", raw.url, first_event_s=0.1))
    raw.script = stream(PING, 0.6, EMPTY[path], CONTENT[path])
    answer = await begins_with_pings(relay, path)
    assert answer.body.startswith(PING + EMPTY[path] + CONTENT[path] + b': credits {"charged":1,')
    assert await relay.spent() == (1, 1)
    again = await ask(relay, path, streams=True, headers={"Idempotency-Key": "k"})
    assert again.status == 422 or again.headers["Idempotency-Replayed"] == "true"


@pytest.mark.parametrize("path", STREAMED)
@pytest.mark.parametrize("failure", ["error", "failed", "end", "[DONE]", "break", "silence"])
async def test_pings_when_they_last_and_a_failure_follows_then_it_passes_and_nothing_is_debited(
    start_relay: StartRelay, raw: ScriptedBackend, hardware: Backend, path: str, failure: str
) -> None:
    breaker = CircuitBreaker(failures=1, reset_s=60)
    relay = await start_relay(
        client_of("gemini", raw.url, first_event_s=0.1, timeout_s=1.5, breaker=breaker),
        client_of("hardware", hardware.url),
    )
    raw.script = {
        "error": stream(PING, 0.6, ERROR, CONTENT[path]),
        "failed": stream(PING, 0.6, EMPTY[path], FAILED),
        "end": stream(PING, 0.6),
        "[DONE]": stream(PING, 0.6, DONE),
        "break": stream(PING, 0.6, ends=False),
        "silence": stream(PING, 30),
    }[failure]
    answer = await begins_with_pings(relay, path)
    code = (
        "backend_timeout" if failure == "silence" else "" if failure in {"error", "failed"} else "backend_unavailable"
    )
    assert code.encode() in answer.body
    assert b"error" in answer.body
    assert b': credits {"charged":0,"backend":"gemini","remaining":50,"gemini_remaining":20}\n\n' in answer.body
    assert await relay.spent() == (0, 0)
    assert (breaker.state, hardware.seen) == ("open", [])


async def test_pings_when_a_setting_says_how_long_then_they_are_held_back_so_long(
    start_relay: StartRelay, hardware: Backend
) -> None:
    for held_s, waits_s in ((0.1, 0.0), (15, 0.5)):
        told: dict[str, Any] = {
            "backends": {"hardware": {"url": hardware.url}},
            "relay": {"first_event_s": held_s},
        }
        async with open_backends(load_settings(None, told)[0]) as clients:
            relay = await start_relay(*clients.values())
            began_s = time.monotonic()
            async with relay.post("pings:6:0.1", stream=True) as streaming:
                assert await streaming.content.readexactly(len(PING)) == PING
                took_s = time.monotonic() - began_s
                await streaming.content.read()
        assert took_s >= waits_s
        assert held_s > 1 or took_s < 0.5
        assert await relay.spent() == (1, 0)


async def test_pings_when_they_never_end_then_the_call_does(
    start_relay: StartRelay, raw: ScriptedBackend, hardware: Backend
) -> None:
    raw.script = stream(*(PING, 0.05) * 400)
    for first_event_s in (15, 0.1):
        relay = await start_relay(client_of("gemini", raw.url, timeout_s=0.5, first_event_s=first_event_s))
        answer = await asyncio.wait_for(ask(relay, CHAT, streams=True), 5)
        assert b"backend_timeout" in answer.body
        assert answer.status == (504 if first_event_s == 15 else 200)
        assert await relay.spent() == (0, 0)
    both = await start_relay(client_of("gemini", raw.url, timeout_s=0.5), client_of("hardware", hardware.url))
    assert (await ask(both, CHAT, streams=True)).headers["X-Credits-Backend"] == "hardware"
    assert await both.spent() == (1, 0)


async def test_stream_when_it_goes_on_longer_than_timeout_s_after_its_first_event_then_it_is_whole(
    start_relay: StartRelay, raw: ScriptedBackend
) -> None:
    relay = await start_relay(client_of("gemini", raw.url, timeout_s=0.4, first_event_s=0.1, idle_s=5))
    raw.script = stream(PING, 0.2, CONTENT[CHAT], 0.5, CONTENT[CHAT], DONE)
    assert (await ask(relay, CHAT, streams=True)).body == PING + CONTENT[CHAT] * 2 + DONE
    assert await relay.spent() == (1, 1)


async def test_pings_when_there_are_many_then_what_is_held_back_of_them_is_bounded(
    start_relay: StartRelay, raw: ScriptedBackend
) -> None:
    relay = await start_relay(client_of("gemini", raw.url))
    pings = PING * 10_000
    raw.script = stream(pings, 30)
    async with asyncio.timeout(10), relay.post("m", stream=True) as streaming:
        assert await streaming.content.readexactly(len(pings)) == pings
        row = await relay.limiter.row(relay.install_id)
        assert row
        assert row.lifetime_consumed == 0
    assert await relay.spent() == (0, 0)


async def test_probe_when_its_client_leaves_among_pings_then_the_next_call_is_the_probe(
    start_relay: StartRelay, raw: ScriptedBackend
) -> None:
    breaker = CircuitBreaker(failures=1, reset_s=0.1)
    relay = await start_relay(client_of("gemini", raw.url, first_event_s=0.05, breaker=breaker))
    raw.scripts = [stream(ERROR), stream(PING, 30), stream(CONTENT[CHAT])]
    assert (await ask(relay, CHAT, streams=True)).status == 502
    await eventually(lambda: breaker.state == "half_open", what="the time of the probe")
    with suppress(TimeoutError):
        async with asyncio.timeout(5), relay.post("m", stream=True) as streaming:
            await streaming.content.readany()
    assert await relay.spent() == (0, 0)
    assert (await ask(relay, CHAT, streams=True)).body == CONTENT[CHAT]
    assert breaker.state == "closed"
