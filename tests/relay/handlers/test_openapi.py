"""/openapi.json is correct: it has every route and every error code of the program, and real answers conform to it."""

import ast
import io
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from openapi_schema_validator import OAS31Validator
from openapi_spec_validator import validate
from redis.asyncio import Redis

import limiter.relay
from limiter import CreditLimiter, Reason, connect
from limiter.relay.handlers.openapi_schema import CODES, MEANING, OPERATIONS
from tests.support.openai_backend import Backend, Document
from tests.support.redis_servers import Server
from tests.support.relay import CHAT, ONE_SERVER, Answer, RunningRelay, StartRelay, client_of, relays_on, tiers

pytestmark = ONE_SERVER
SOURCES = sorted(Path(limiter.relay.__file__).parent.rglob("*.py"))
JSON = "application/json"
FORM = "multipart/form-data; boundary=b"


@pytest.fixture
async def document(relay: RunningRelay) -> Document:
    return (await relay.send("GET", "/openapi.json")).document


@pytest.fixture
async def poor(start_relay: StartRelay, gemini: Backend, redis: Redis) -> RunningRelay:
    """A relay without hardware, whose tier has no credits."""
    return await start_relay(client_of("gemini", gemini.url, timeout_s=0.2), on=CreditLimiter(redis, tiers(lifetime=0)))


def served(relay: RunningRelay) -> set[tuple[str, str]]:
    routes = (route for route in relay.app.router.routes() if route.resource is not None)
    return {(route.method, route.resource.canonical) for route in routes if route.resource and route.method != "HEAD"}


def resolved(document: Document, part: Any) -> Any:
    """Follow a part's own $ref."""
    while isinstance(part, dict) and "$ref" in part:
        found = document
        for name in part["$ref"].removeprefix("#/").split("/"):
            found = found[name]
        part = found
    return part


def check(document: Document, method: str, path: str, answer: Answer) -> None:
    """Compare an answer with the description: the most specific entry for its status, its headers, its body."""
    responses = document["paths"][path][method.lower()]["responses"]
    names = (str(answer.status), f"{answer.status // 100}XX", "default")
    response = next(responses[name] for name in names if name in responses)
    for name, header in response["headers"].items():
        described = resolved(document, header)
        if name in answer.headers:
            is_number = resolved(document, described["schema"]).get("type") == "integer"
            value: Any = int(answer.headers[name]) if is_number else answer.headers[name]
            conforms(document, described["schema"], value)
        assert name in answer.headers or not described.get("required"), f"{name} is missing"
    kind = answer.headers["Content-Type"].partition(";")[0]
    content = response["content"]
    assert kind in content or "*/*" in content, f"{kind} is not described for {answer.status}"
    schema = content.get(kind, content.get("*/*"))["schema"]
    conforms(document, schema, answer.document if kind.endswith("json") else answer.body.decode())


def conforms(document: Document, schema: Document, value: object) -> None:
    OAS31Validator({**schema, "components": document["components"]}).validate(value)


def codes_in_source() -> Iterator[tuple[int, str]]:
    """Find each status and code that the relay's modules answer with."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and len(node.args) > 1:
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if (at := _STATUS_AT.get(name)) is None:
                    continue
                status, code = node.args[at : at + 2]
                if isinstance(status, ast.Constant) and isinstance(code, ast.Attribute):
                    yield status.value, str(getattr(Reason, code.attr))  # type: ignore[misc]
                elif isinstance(status, ast.Constant) and isinstance(code, ast.Constant):
                    yield status.value, str(code.value)  # type: ignore[misc]


_STATUS_AT = {"Problem": 0, "fail": 0, "backend_problem": 1}  # which argument of these the status is


# The document


async def test_document_when_requested_then_it_is_valid_openapi_3_1(document: Document) -> None:
    assert document["openapi"] == "3.1.0"
    validate(document)


async def test_document_when_it_is_compared_with_the_app_then_it_has_its_routes_and_no_others(
    relay: RunningRelay, document: Document
) -> None:
    described = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    assert described == served(relay)
    assert described == set(OPERATIONS), "the table has a route that is not served"


async def test_codes_when_compared_with_the_program_then_they_are_the_same(
    document: Document,
) -> None:
    found: dict[int, set[str]] = defaultdict(set)
    for status, code in codes_in_source():
        found[status].add(code)
    assert found == {status: {str(code) for code in codes} for status, codes in CODES.items()}
    for status in MEANING:
        own = document["components"]["schemas"][f"Error{status}"]["allOf"][1]["properties"]
        assert set(own["error"]["properties"]["code"]["enum"]) == found[status]


async def test_statuses_when_they_have_codes_then_a_route_says_so(document: Document) -> None:
    said = {status for item in document["paths"].values() for one in item.values() for status in one["responses"]}
    assert {str(status) for status in MEANING} <= said
    assert set(CODES) - set(MEANING) == {405, 417, 431}, "what belongs to no route"


# Real answers


@pytest.mark.parametrize(
    "path", ["/v1/credits", "/v1/models", "/v1/models/{id}", "/healthz", "/readyz", "/metrics", "/openapi.json"]
)
async def test_get_when_it_is_served_then_the_answer_is_as_described(
    relay: RunningRelay, document: Document, path: str
) -> None:
    answer = await relay.send("GET", path.format(id="m"), X_Install_Id=relay.install_id)
    assert answer.status == 200
    check(document, "GET", path, answer)


@pytest.mark.parametrize(("name", "who", "status"), [("other", "", 404), ("m", "me", 400), ("m", "Bearer x", 401)])
async def test_model_when_it_is_not_shown_then_the_error_is_as_described(
    relay: RunningRelay, document: Document, name: str, who: str, status: int
) -> None:
    header = "Authorization" if " " in who else "X_Install_Id"
    answer = await relay.send("GET", f"/v1/models/{name}", None, **{header: who or relay.install_id})
    assert answer.status == status
    check(document, "GET", "/v1/models/{id}", answer)


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/embeddings", "/v1/responses"])
@pytest.mark.parametrize(
    ("model", "status"),
    [
        ("plain", 200),
        ("stream", 200),
        ("bad-request", 400),
        ("status:404", 404),
        ("status:409", 409),
        ("status:422", 422),
        ("status:500", 502),
        ("break-before", 502),
    ],
)
async def test_post_when_a_backend_serves_it_then_the_answer_is_as_described(
    relay: RunningRelay, document: Document, path: str, model: str, status: int
) -> None:
    answer = await relay.ask(model, path)
    assert answer.status == status
    check(document, "POST", path, answer)


@pytest.mark.parametrize("accept", [JSON, "application/problem+json"])
@pytest.mark.parametrize(
    ("status", "body", "headers"),
    [
        (400, b"{}", {"X-Install-Id": "me"}),
        (400, b"{}", {"X-Install-Id": ""}),
        (400, b"{}", {}),
        (400, b"[", {}),
        (400, b"{}", {"Upgrade": "websocket", "Connection": "upgrade"}),
        (401, b"{}", {"Authorization": "Bearer nothing"}),
        (413, b" " * (2 << 20), {}),
        (415, b"{}", {"Content-Type": "text/plain"}),
    ],
)
async def test_post_when_the_request_is_wrong_then_the_error_is_as_described(
    start_relay: StartRelay,
    gemini: Backend,
    document: Document,
    accept: str,
    status: int,
    body: bytes,
    headers: dict[str, str],
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url), body_limit_mb=1)
    given = {"X-Install-Id": relay.install_id, "Content-Type": JSON, "Accept": accept, **headers}
    async with relay.session.post(relay.url + CHAT, data=io.BytesIO(body), headers=given) as response:
        answer = Answer(response.status, response.headers, await response.read())
    assert answer.status == status
    assert answer.headers["Content-Type"].partition(";")[0] == accept
    check(document, "POST", CHAT, answer)


async def test_upload_when_it_is_served_or_wrong_then_the_answer_is_as_described(
    relay: RunningRelay, document: Document
) -> None:
    path = "/v1/audio/transcriptions"
    parts = (("model", "whisper"), ("file", "sound"))
    body = "".join(f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{text}\r\n' for name, text in parts)
    for kind, status in ((FORM, 200), (JSON, 415), ("multipart/form-data", 400)):
        answer = await relay.send(
            "POST", path, (body + "--b--\r\n").encode(), X_Install_Id=relay.install_id, Content_Type=kind
        )
        assert answer.status == status
        check(document, "POST", path, answer)


async def test_post_when_the_credits_are_used_up_then_402_is_as_described(
    poor: RunningRelay, document: Document
) -> None:
    answer = await poor.ask()
    assert answer.status == 402
    check(document, "POST", CHAT, answer)
    with pytest.raises(Exception, match="renews_at"):
        check(document, "POST", CHAT, without(answer, b'"renews_at"'))


async def test_post_when_the_backend_is_too_slow_then_504_is_as_described(
    start_relay: StartRelay, gemini: Backend, document: Document
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url, timeout_s=0.1))
    answer = await relay.ask("hang")
    assert answer.status == 504
    check(document, "POST", CHAT, answer)


async def test_post_when_too_many_are_in_flight_then_429_is_as_described(
    start_relay: StartRelay, gemini: Backend, redis: Redis, document: Document
) -> None:
    limiter = CreditLimiter(redis, tiers(lifetime=1))
    relay = await start_relay(client_of("gemini", gemini.url), on=limiter)
    await limiter.reserve(relay.install_id, tier="core", has_hardware=False, hold_id="h")
    answer = await relay.ask()
    assert answer.status == 429
    check(document, "POST", CHAT, answer)
    await limiter.release(relay.install_id, "h")


async def test_answers_when_redis_is_unavailable_then_503_is_as_described(
    own_server: Callable[..., Server], document: Document, gemini: Backend
) -> None:
    server = own_server()
    async with AsyncExitStack() as stack:
        redis = await connect(server.url, timeout_ms=100)
        stack.push_async_callback(redis.aclose)
        async with relays_on(redis) as start:
            limiter = CreditLimiter(redis, tiers(lifetime=1), timeout_ms=100, deadline_ms=200)
            relay = await start(client_of("gemini", gemini.url), on=limiter)
            server.kill()
            for method, path, answer in (
                ("POST", CHAT, await relay.ask()),
                ("GET", "/v1/credits", await relay.send("GET", "/v1/credits", X_Install_Id=relay.install_id)),
                ("GET", "/readyz", await relay.send("GET", "/readyz")),
            ):
                assert answer.status == 503
                check(document, method, path, answer)
            server.start()


def without(answer: Answer, member: bytes) -> Answer:
    """Return an answer that lacks a member, which the check must notice."""
    return Answer(answer.status, answer.headers, answer.body.replace(member, b'"other"'))
