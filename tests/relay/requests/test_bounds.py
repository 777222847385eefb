"""What one credit buys is bounded: a dear model, many answers, inputs or tokens are refused, and others are served."""

import json
from typing import Any

import pytest

from limiter.config.settings import TierSettings
from tests.support.openai_backend import Backend
from tests.support.relay import CHAT, ONE_SERVER, Answer, RunningRelay, StartRelay, client_of
from tests.support.wait import eventually

pytestmark = ONE_SERVER
EMBEDDINGS, COMPLETIONS = "/v1/embeddings", "/v1/completions"
UPLOAD = "/v1/audio/transcriptions"
OVER: list[tuple[str, str, str, dict[str, Any]]] = [
    (CHAT, "max_n", "n", {"n": 5}),
    (CHAT, "max_n", "n", {"n": 128.0}),
    (CHAT, "max_n", "n", {"n": "128"}),
    (CHAT, "max_n", "n", {"n": 10**300}),
    (CHAT, "max_n", "n", {"n": [1]}),
    (COMPLETIONS, "max_n", "best_of", {"best_of": 128}),
    (CHAT, "max_output_tokens", "max_tokens", {"max_tokens": 1_000_000_000}),
    (CHAT, "max_output_tokens", "max_completion_tokens", {"max_completion_tokens": 32_769}),
    ("/v1/responses", "max_output_tokens", "max_output_tokens", {"max_output_tokens": 1e9}),
    (EMBEDDINGS, "max_inputs", "input", {"input": ["x" * 5000] * 2048}),
    (EMBEDDINGS, "max_inputs", "input", {"input": [[1, 2]] * 257}),
    (EMBEDDINGS, "max_inputs", "input", {"input": [1, *["x"] * 257]}),
    (COMPLETIONS, "max_inputs", "prompt", {"prompt": ["x"] * 257}),
]
WITHIN = [
    (CHAT, {"n": 4, "max_tokens": 32_768, "max_completion_tokens": None}),
    (CHAT, {"tools": [{"n": 128, "required": ["n", "max_tokens"]}], "input": ["x"] * 300}),
    (EMBEDDINGS, {"input": ["x"] * 256}),
    (EMBEDDINGS, {"input": list(range(8000))}),
    (EMBEDDINGS, {"input": [list(range(100))] * 256}),
    (EMBEDDINGS, {"input": "x"}),
    (COMPLETIONS, {"prompt": ["x"] * 256, "best_of": 4}),
    ("/v1/responses", {"input": [{"role": "user", "content": "x"}] * 300, "max_output_tokens": 16}),
]


@pytest.mark.parametrize(("path", "bound", "member", "members"), OVER)
async def test_request_when_it_is_over_a_bound_then_a_400_names_it_and_nothing_is_spent(
    start_relay: StartRelay, hardware: Backend, path: str, bound: str, member: str, members: dict[str, Any]
) -> None:
    relay = await start_relay(client_of("hardware", hardware.url))
    answer = await relay.ask(path=path, **members)
    assert (answer.status, answer.code, answer.document["error"]["param"]) == (400, "request_over_bound", member)
    assert bound in answer.document["detail"]
    assert hardware.seen == []
    assert f'limiter_requests_over_bound_total{{bound="{bound}"}} 1.0' in await metrics_of(relay)
    assert (await relay.ask(path=path, n=1)).status == 200
    assert await relay.spent() == (1, 0)


@pytest.mark.parametrize(("path", "members"), WITHIN)
async def test_request_when_it_is_within_the_bounds_then_it_is_served_as_it_is(
    start_relay: StartRelay, hardware: Backend, path: str, members: dict[str, Any]
) -> None:
    relay = await start_relay(client_of("hardware", hardware.url))
    assert (await relay.ask(path=path, **members)).status == 200
    sent = json.loads(hardware.last.body)
    assert {name: sent[name] for name in members} == members


@pytest.mark.parametrize("repeated", ['"n":128,"n":1', '"n":1,"n":128', '"\\u006e":128,"n":1'])
async def test_bound_when_its_member_is_repeated_or_escaped_then_nothing_slips_by(
    relay: RunningRelay, gemini: Backend, repeated: str
) -> None:
    body = f'{{"model":"plain",{repeated}}}'.encode()
    assert (await post(relay, CHAT, body)).code == "invalid_json"
    assert (await post(relay, CHAT, b'{"model":"plain","\\u006e":128}')).code == "request_over_bound"
    assert gemini.seen == []


async def test_bounds_when_a_tier_sets_them_then_they_are_its_own(start_relay: StartRelay, gemini: Backend) -> None:
    own = TierSettings(lifetime=50, max_n=0, max_output_tokens=10)
    relay = await start_relay(client_of("gemini", gemini.url), tier_settings={"core": own})
    assert (await relay.ask(n=1000)).status == 200
    assert (await relay.ask(max_tokens=11)).code == "request_over_bound"


async def test_bounds_when_they_are_only_logged_then_all_is_served_and_counted(
    start_relay: StartRelay, hardware: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    relay = await start_relay(client_of("hardware", hardware.url), bounds="log", models="listed", listed=["plain"])
    for path, _, _, members in OVER:
        assert (await relay.ask(path=path, **members)).status == 200
    assert (await relay.ask("stream:1:0")).status == 200
    assert await relay.spent() == (len(OVER) + 1, 0)
    found = await metrics_of(relay)
    for bound in ("max_n", "max_inputs", "max_output_tokens"):
        count = sum(1 for each in OVER if each[1] == bound)
        assert f'limiter_requests_over_bound_total{{bound="{bound}"}} {count}.0' in found
    assert 'limiter_requests_over_bound_total{bound="models"} 1.0' in found
    assert sum(getattr(each, "event", "") == "request_over_bound" for each in caplog.records) == len(OVER) + 1


async def test_model_when_it_is_not_listed_then_404_and_a_listed_one_is_served(
    start_relay: StartRelay, gemini: Backend
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url), models="listed", listed=["plain", "m"])
    answer = await relay.ask("gemini-2.5-pro-expensive")
    assert (answer.status, answer.code) == (404, "model_not_found")
    for body in (b'{"model":"plain","model":"dear"}', b'{"model":"dear","\\u006dodel":"plain"}'):
        assert (await post(relay, CHAT, body)).code == "invalid_json"
    assert gemini.seen == []
    assert (await post(relay, CHAT, b'{"\\u006dodel":"\\u0070lain"}')).status == 200
    assert (await relay.ask("plain")).status == 200
    listed = await relay.send("GET", "/v1/models", X_Install_Id=relay.install_id)
    assert {each["id"] for each in listed.document["data"]} <= {"plain", "m"}
    assert await relay.spent() == (2, 2)


def form(*models: bytes) -> bytes:
    return b"".join(b"--b\r\n%s\r\n" % model for model in models) + b"--b--\r\n"


FIELD = b'Content-Disposition: form-data; name="model"\r\n\r\n'


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (form(FIELD + b"dear"), "model_not_found"),
        (form(FIELD + b"plain", FIELD + b"dear"), "model_not_found"),
        (form(b'Content-Disposition: form-data; name="x"\r\n' + FIELD + b"dear"), "model_not_found"),
        (form(b"X: " + b"x" * 10_000 + b"\r\n" + FIELD + b"dear"), "invalid_body"),
        (form(FIELD + b"\xff"), "invalid_body"),
        (form(FIELD + b"x" * 5000), "invalid_body"),
    ],
    ids=["not listed", "the second", "by its second line", "a long head", "no text", "too long"],
)
async def test_upload_when_its_model_is_not_listed_then_it_is_refused_and_nothing_is_debited(
    start_relay: StartRelay, hardware: Backend, body: bytes, code: str
) -> None:
    relay = await start_relay(client_of("hardware", hardware.url), models="listed", listed=["plain"])
    kind = "multipart/form-data; boundary=b"
    assert (await post(relay, UPLOAD, body, kind)).code == code
    assert (await post(relay, UPLOAD, form(FIELD + b"plain"), kind)).status == 200
    assert await relay.spent() == (1, 0)


async def post(relay: RunningRelay, path: str, body: bytes, kind: str = "application/json") -> Answer:
    return await relay.send("POST", path, body, X_Install_Id=relay.install_id, Content_Type=kind)


async def metrics_of(relay: RunningRelay) -> str:
    text = ""

    async def is_there() -> bool:
        nonlocal text
        text = (await relay.send("GET", "/metrics")).body.decode()
        return "limiter_requests_over_bound_total{" in text

    await eventually(is_there, what="the metric")
    return text
