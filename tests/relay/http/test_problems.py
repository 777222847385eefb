"""The status table of the relay: each status with its one error object, which serves RFC 9457 and OpenAI's SDKs."""

import asyncio
import io
import logging
import re
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from limiter import CreditLimiter, Tiers
from tests.support.licences import KEY, PUBLIC_KEY, licence_for
from tests.support.openai_backend import Backend, Document
from tests.support.relay import CHAT, ONE_SERVER, Answer, RunningRelay, StartRelay, client_of, new_install, tiers

pytestmark = ONE_SERVER
JSON = {"Content_Type": "application/json"}
TYPES = {400: "invalid_request_error", 401: "authentication_error", 402: "insufficient_quota", 429: "rate_limit_error"}


def assert_problem(answer: Answer, status: int, code: str, *, content_type: str = "application/json") -> Document:
    """Check that the error object is complete and consistent in both conventions, and return it."""
    document = answer.document
    assert (answer.status, answer.code) == (status, code)
    assert answer.headers["Content-Type"].partition(";")[0] == content_type
    assert document["status"] == status
    assert document["instance"] == f"urn:limiter:request:{answer.headers['X-Request-Id']}"
    assert re.fullmatch(r"[A-Z0-9].+", document["title"])
    assert document["detail"] == document["error"]["message"]
    assert document["detail"].endswith(".")
    assert set(document["error"]) == {"message", "type", "code", "param"}
    fallback = "server_error" if status >= 500 else "invalid_request_error"
    assert document["error"]["type"] == TYPES.get(status, fallback)
    if "violated-policies" not in document:
        assert document["type"] == f"urn:limiter:error:{code}"
    return document


async def test_out_of_credits_when_the_quota_is_lifetime_then_402_and_nothing_to_wait_for(
    start_relay: StartRelay, gemini: Backend
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url), tiers=tiers(lifetime=1))
    await relay.ask()
    await relay.settled()
    answer = await relay.ask()
    document = assert_problem(answer, 402, "out_of_credits")
    assert document["type"] == "https://iana.org/assignments/http-problem-types#quota-exceeded"
    assert (document["violated-policies"], document["renews_at"]) == (["credits"], None)
    assert answer.headers["x-should-retry"] == "false"
    assert "Retry-After" not in answer.headers
    assert len(gemini.seen) == 1


async def test_out_of_credits_when_the_quota_is_monthly_then_402_says_when_it_renews(
    start_relay: StartRelay, gemini: Backend
) -> None:
    quota = Tiers.from_mapping({"core": {"lifetime": 0}, "pro": {"monthly": 1}})
    relay = await start_relay(client_of("gemini", gemini.url), tiers=quota, public_keys=[PUBLIC_KEY])
    headers = {"Authorization": f"Bearer {licence_for('pro', KEY)}"}
    await relay.ask(headers=headers)
    await relay.settled()
    document = assert_problem(await relay.ask(headers=headers), 402, "out_of_credits")
    balance = await relay.limiter.balance(relay.install_id, tier="pro")
    assert document["renews_at"] == balance.renews_at
    assert balance.renews_at
    assert balance.renews_at in document["detail"]


async def test_gemini_cap_when_there_is_no_hardware_then_402(start_relay: StartRelay, gemini: Backend) -> None:
    relay = await start_relay(client_of("gemini", gemini.url), tiers=tiers(lifetime=5, gemini_cap=0))
    answer = await relay.ask()
    document = assert_problem(answer, 402, "gemini_cap_exceeded_no_hardware")
    assert document["violated-policies"] == ["gemini"]
    assert answer.headers["x-should-retry"] == "false"
    assert "Retry-After" not in answer.headers
    assert gemini.seen == []


@pytest.mark.parametrize(
    ("core", "code"),
    [
        ({"lifetime": 1}, "credits_in_flight"),
        ({"lifetime": 9, "max_in_flight": 1}, "too_many_in_flight"),
    ],
)
async def test_in_flight_when_another_request_runs_then_429_and_retry_after_1(
    start_relay: StartRelay, gemini: Backend, core: dict[str, int], code: str
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url), tiers=tiers(**core))
    async with relay.connect("wait") as (reader, _):
        await gemini.arrived.wait()
        answer = await relay.ask()
        assert_problem(answer, 429, code)
        assert answer.headers["Retry-After"] == "1"
        assert "x-should-retry" not in answer.headers
        gemini.go_on.set()
        assert b"200 OK" in await reader.readline()
    await relay.settled()
    assert (await relay.ask()).status == (402 if core["lifetime"] == 1 else 200)


@pytest.mark.parametrize(
    ("model", "retry_after"),
    [
        ("status:429:7", "7"),
        ("status:503:120", "120"),
        ("status:503:0.2", "1"),
        ("status:503:86400", "3600"),
        ("status:503:-5", "1"),
        ("status:503:nan", "1"),
        ("status:503:inf", "1"),
        ("status:503:Fri, 31 Dec 2027 23;59;59 GMT", "1"),
        ("status:500", "1"),
    ],
)
async def test_backend_when_it_sends_retry_after_then_the_502_has_it_too(
    start_relay: StartRelay, gemini: Backend, model: str, retry_after: str
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url))
    answer = await relay.ask(model)
    assert_problem(answer, 502, "backend_unavailable")
    assert answer.headers["Retry-After"] == retry_after


async def test_backend_when_it_times_out_then_504(start_relay: StartRelay, gemini: Backend) -> None:
    relay = await start_relay(client_of("gemini", gemini.url, timeout_s=0.1))
    answer = await relay.ask("hang")
    assert_problem(answer, 504, "backend_timeout")
    assert answer.headers["Retry-After"] == "1"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"[]", "invalid_json"),
        (b'"text"', "invalid_json"),
        (b"null", "invalid_json"),
        (b'{"model": NaN}', "invalid_json"),
        (b'{"model": "\xff"}', "invalid_json"),
        (b'\xef\xbb\xbf{"model": "m"}', "invalid_json"),
        (b'{"model": "m"} trailing', "invalid_json"),
        (b"{}", "missing_model"),
        (b'{"model": 5}', "missing_model"),
        (b'{"model": null}', "missing_model"),
    ],
)
async def test_body_when_it_cannot_be_read_then_400_and_nothing_is_reserved(
    relay: RunningRelay, gemini: Backend, body: bytes, code: str
) -> None:
    answer = await relay.send("POST", CHAT, body, X_Install_Id=relay.install_id, **JSON)
    document = assert_problem(answer, 400, code)
    assert document["error"]["param"] == ("model" if code == "missing_model" else None)
    assert await relay.limiter.row(relay.install_id) is None
    assert gemini.seen == []


@pytest.mark.parametrize("content_type", ["text/plain", "multipart/form-data; boundary=x", "application/jsonx", ""])
async def test_content_type_when_it_is_not_json_then_415(relay: RunningRelay, content_type: str) -> None:
    answer = await relay.send("POST", CHAT, b'{"model": "m"}', X_Install_Id=relay.install_id, Content_Type=content_type)
    assert_problem(answer, 415, "unsupported_media_type")


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/chat", "/v1/chat/completions/", "/v1/%63redits/x", "//"])
async def test_path_when_it_is_unknown_then_404(relay: RunningRelay, path: str) -> None:
    assert_problem(await relay.send("POST", path, b"{}", X_Install_Id=relay.install_id, **JSON), 404, "unknown_path")


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", CHAT, "POST"),
        ("DELETE", "/v1/embeddings", "POST"),
        ("POST", "/v1/credits", "GET,HEAD"),
        ("PUT", "/healthz", "GET,HEAD"),
        ("TRACE", CHAT, "POST"),
    ],
)
async def test_method_when_it_is_not_served_then_405_names_those_that_are(
    relay: RunningRelay, method: str, path: str, allow: str
) -> None:
    answer = await relay.send(method, path, X_Install_Id=relay.install_id)
    assert_problem(answer, 405, "method_not_allowed")
    assert answer.headers["Allow"] == allow


@pytest.mark.parametrize("sized", [True, False])
async def test_body_when_it_is_over_the_limit_then_413(start_relay: StartRelay, gemini: Backend, sized: bool) -> None:
    relay = await start_relay(client_of("gemini", gemini.url), body_limit_mb=1)
    exactly = b'{"model": "m", "x": "%s"}' % (b"x" * ((1 << 20) - 23))
    assert len(exactly) == 1 << 20

    async def send(body: bytes) -> Answer:
        async def parts() -> AsyncIterator[bytes]:
            yield body

        headers = {"X-Install-Id": relay.install_id, "Content-Type": "application/json"}
        data = io.BytesIO(body) if sized else parts()
        async with relay.session.post(relay.url + CHAT, data=data, headers=headers) as response:
            return Answer(response.status, response.headers, await response.read())

    assert (await send(exactly)).status == 200
    assert_problem(await send(exactly + b" "), 413, "request_too_large")
    assert await relay.spent() == (1, 1)


@pytest.mark.parametrize("accept", ["application/problem+json", "application/json;q=0.5, application/problem+json"])
async def test_accept_when_it_has_problem_json_then_errors_are_problem_json(relay: RunningRelay, accept: str) -> None:
    answer = await relay.send("GET", "/nowhere", Accept=accept)
    assert_problem(answer, 404, "unknown_path", content_type="application/problem+json")
    answer = await relay.ask("status:401", headers={"Accept": accept})
    assert_problem(answer, 502, "backend_unavailable", content_type="application/problem+json")


async def test_row_when_it_is_broken_then_500_without_details(
    relay: RunningRelay, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    key = relay.limiter.session.keys.install(relay.install_id)
    await relay.ask()
    await relay.settled()
    await redis.hset(key, "lifetime_consumed", "many")
    answer = await relay.ask()
    assert_problem(answer, 500, "broken_row")
    assert "many" not in answer.body.decode()
    assert "credits:" not in answer.body.decode()
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.getMessage().startswith(key)
    assert record.__dict__["request_id"] == answer.headers["X-Request-Id"]


async def test_bug_when_it_raises_then_500_and_only_the_log_has_the_cause(
    start_relay: StartRelay, gemini: Backend, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    class Faulty(CreditLimiter):
        async def balance(self, install_id: str, *, tier: str) -> None:  # type: ignore[override]
            raise RuntimeError(f"fault {install_id} {tier}")

    relay = await start_relay(client_of("gemini", gemini.url), on=Faulty(redis, tiers(lifetime=1)))
    answer = await relay.send("GET", "/v1/credits", X_Install_Id=relay.install_id)
    assert_problem(answer, 500, "internal_error")
    assert "fault" not in answer.body.decode()
    assert f"fault {relay.install_id}" in caplog.text
    (record,) = caplog.records
    assert record.__dict__["event"] == "unexpected_error"
    assert record.__dict__["request_id"] == answer.headers["X-Request-Id"]


async def test_settlement_when_it_fails_then_its_line_names_the_request_in_a_field(
    relay: RunningRelay, gemini: Backend, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    asking = asyncio.ensure_future(relay.ask("wait"))
    await gemini.arrived.wait()
    key = relay.limiter.session.keys.install(relay.install_id)
    await redis.hset(key, "lifetime_consumed", "many")
    gemini.go_on.set()
    answer = await asking
    await relay.settled()
    (record,) = caplog.records
    assert (record.__dict__["event"], record.getMessage()) == ("settlement_failed", "The commit of a hold failed")
    assert record.__dict__["request_id"] == answer.headers["X-Request-Id"]
    await redis.delete(key)


async def test_health_when_all_is_well_then_ready_says_which_backends(relay: RunningRelay, gemini: Backend) -> None:
    healthy = await relay.send("GET", "/healthz")
    assert (healthy.status, healthy.document) == (200, {"status": "ok"})
    ready = await relay.send("GET", "/readyz")
    assert (ready.status, ready.document["status"], ready.document["redis"]) == (200, "ready", "ok")
    assert ready.document["backends"]["gemini"] == gemini.url


async def test_ready_when_parts_report_then_it_carries_them(start_relay: StartRelay, gemini: Backend) -> None:
    relay = await start_relay(client_of("gemini", gemini.url), reports={"persister": lambda: {"rows": 5}})
    assert (await relay.send("GET", "/readyz")).document["persister"] == {"rows": 5}


async def test_error_when_a_licence_has_expired_then_a_refusal_has_the_header_too(
    start_relay: StartRelay, gemini: Backend
) -> None:
    """A client that is refused as core must see that its licence is the cause."""
    relay = await start_relay(client_of("gemini", gemini.url), tiers=tiers(lifetime=0), public_keys=[PUBLIC_KEY])
    headers = {"Authorization": f"Bearer {licence_for('core', KEY, valid_s=-3600)}"}
    answer = await relay.ask(headers=headers)
    assert_problem(answer, 402, "out_of_credits")
    assert answer.headers["X-Licence"] == "expired"


async def test_install_when_it_is_new_and_refused_then_nothing_but_a_row_is_left(
    start_relay: StartRelay, gemini: Backend
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url), tiers=tiers(lifetime=0))
    install_id = new_install()
    await relay.ask(headers={"X-Install-Id": install_id})
    assert await relay.spent(install_id) == (0, 0)
