"""What a backend's refusal says of waiting and of the operator; the texts are those that providers send."""

import json
import logging
import time
from email.utils import formatdate
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from limiter.config.settings import METERED_PATHS
from limiter.relay.upstream.circuit_breaker import CircuitBreaker
from limiter.relay.upstream.refusal import about_operator, wait_s
from tests.support.openai_backend import Backend
from tests.support.relay import GEMINI_KEY, RunningRelay, StartRelay, client_of

JSON_PATHS = [path for path in METERED_PATHS if path != "/v1/audio/transcriptions"]


def google(code: int, status: str, message: str, reason: str = "", **detail: str) -> dict[str, Any]:
    """An error in Google's form."""
    error: dict[str, Any] = {"code": code, "message": message, "status": status}
    if reason:
        domain = "googleapis.com"
        error["details"] = [{"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": reason, "domain": domain}]
    if detail:
        error.setdefault("details", []).append({"@type": "type.googleapis.com/google.rpc.RetryInfo", **detail})
    return {"error": error}


def openai(message: str, code: str | None = None, kind: str = "invalid_request_error") -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "code": code, "param": None}}


# How long to wait


def retry_info(delay: str) -> bytes:
    return json.dumps([google(429, "RESOURCE_EXHAUSTED", "Quota exceeded", retryDelay=delay)]).encode()


@pytest.mark.parametrize(
    ("headers", "body", "wait"),
    [
        ({}, b"", 1),
        ({"Retry-After": "30"}, b"", 30),
        ({"Retry-After": " 1.2 "}, b"", 2),
        ({"Retry-After": "0"}, b"", 1),
        ({"Retry-After": "-5"}, b"", 1),
        ({"Retry-After": "99999999"}, b"", 3600),
        ({"Retry-After": "9" * 400}, b"", 1),
        ({"Retry-After": "1_0"}, b"", 1),
        ({"Retry-After": "inf"}, b"", 1),
        ({"Retry-After": "soon"}, b"", 1),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT", "Date": "Wed, 21 Oct 2015 07:26:10 GMT"}, b"", 110),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT", "Date": "Wed, 21 Oct 2015 05:26:10 GMT"}, b"", 3600),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT", "Date": "never"}, b"", 1),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, b"", 1),
        ({"Retry-After": "Wed, 99 Oct 99999 07:28:00 GMT"}, b"", 1),
        ({"retry-after-ms": "20000"}, b"", 20),
        ({"retry-after-ms": "20001", "Retry-After": "7"}, b"", 21),
        ({"retry-after-ms": "no", "Retry-After": "7"}, b"", 7),
        ({}, retry_info("45.837906927s"), 46),
        ({}, retry_info("3s"), 3),
        ({}, retry_info("3s")[1:-1], 3),
        ({}, retry_info("s"), 1),
        ({"Retry-After": "7"}, retry_info("45s"), 7),
        ({"Retry-After": "soon"}, retry_info("45s"), 45),
        ({}, b'{"error": {"details": [{"@type": "x/google.rpc.RetryInfo", "retryDelay": 5}, 7, null]}}', 1),
    ],
)
def test_wait_when_a_backend_names_it_then_it_is_that_from_1_to_3600_seconds(
    headers: dict[str, str], body: bytes, wait: int
) -> None:
    assert wait_s(headers, body) == wait


def test_wait_when_a_date_comes_without_a_clock_then_it_is_by_this_machines() -> None:
    assert 118 <= wait_s({"Retry-After": formatdate(time.time() + 120, usegmt=True)}) <= 120


@given(
    st.one_of(st.binary(), st.recursive(st.none() | st.text() | st.floats(allow_nan=False), st.lists).map(orjson.dumps))
)
def test_refusal_when_its_body_is_anything_then_it_is_read_without_an_error(body: bytes) -> None:
    wrapped = b'{"error": {"message": %b, "details": %b, "code": %b}}' % (body, body, body)
    for each in (body, wrapped, b'[{"error": %b}]' % body):
        assert about_operator(401, each) is not None
        assert 1 <= wait_s({}, each) <= 3600
        about_operator(400, each)


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("path", JSON_PATHS)
async def test_answer_when_a_backend_names_a_wait_in_its_body_then_the_client_is_told(
    start_relay: StartRelay, gemini: Backend, status: int, path: str
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url))
    gemini.always = "refuse"
    gemini.refusal = (status, [google(status, "RESOURCE_EXHAUSTED", "Quota", retryDelay="45.8s")])
    answer = await relay.ask("plain", path)
    assert (answer.status, answer.code, answer.headers["Retry-After"]) == (502, "backend_unavailable", "46")
    assert await relay.spent() == (0, 0)


async def test_answer_when_the_text_of_a_failure_never_ends_then_it_is_not_waited_for(
    start_relay: StartRelay, gemini: Backend, hardware: Backend
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url), client_of("hardware", hardware.url))
    gemini.always = "refuse"
    gemini.refusal = (429, None)
    began_s = time.monotonic()
    assert (await relay.ask()).headers["X-Credits-Backend"] == "hardware"
    assert time.monotonic() - began_s < 5


# What is about the operator

OPERATOR = [
    (
        400,
        "key",
        [google(400, "INVALID_ARGUMENT", "API key not valid. Please pass a valid API key.", "API_KEY_INVALID")],
    ),
    (400, "key", google(400, "INVALID_ARGUMENT", "API key expired. Please renew the API key.", "API_KEY_INVALID")),
    (400, "key", google(400, "INVALID_ARGUMENT", "API Key not found. Please pass a valid API key.")),
    (403, "key", google(403, "PERMISSION_DENIED", "Your API key was reported as leaked. Please use another API key.")),
    (403, "key", google(403, "PERMISSION_DENIED", "Requests are blocked.", "API_KEY_SERVICE_BLOCKED")),
    (401, "key", openai("Incorrect API key provided: sk-***.", "invalid_api_key")),
    (404, "key", openai("API key not found")),
    (400, "place", [google(400, "FAILED_PRECONDITION", "User location is not supported for the API use.")]),
    (
        400,
        "place",
        google(
            400,
            "FAILED_PRECONDITION",
            "User location is not supported for the API use without a billing account linked.",
        ),
    ),
    (
        400,
        "place",
        google(
            400,
            "FAILED_PRECONDITION",
            "Gemini API free tier is not available in your country. Please enable billing on your project.",
        ),
    ),
    (403, "place", openai("Country, region, or territory not supported", "unsupported_country_region_territory")),
    (400, "billing", google(400, "FAILED_PRECONDITION", "Please enable billing on your project in Google AI Studio.")),
    (
        403,
        "billing",
        google(403, "PERMISSION_DENIED", "This API method requires billing to be enabled.", "BILLING_DISABLED"),
    ),
    (
        429,
        "billing",
        google(429, "RESOURCE_EXHAUSTED", "Your prepayment credits are depleted. Please go to AI Studio."),
    ),
    (
        429,
        "billing",
        openai("You exceeded your current quota, please check your plan and billing details.", "insufficient_quota"),
    ),
    (400, "billing", openai("Your credit balance is too low to access this API.")),
    (402, "billing", openai("Payment required")),
    (400, "billing", openai("Billing hard limit has been reached", "billing_hard_limit_reached")),
    (
        403,
        "account",
        google(403, "PERMISSION_DENIED", "Permission denied: Consumer has been suspended.", "CONSUMER_SUSPENDED"),
    ),
    (403, "account", google(403, "PERMISSION_DENIED", "Your project has been denied access. Please contact support.")),
    (
        403,
        "account",
        google(
            403,
            "PERMISSION_DENIED",
            "Generative Language API has not been used in project 1 before.",
            "SERVICE_DISABLED",
        ),
    ),
    (400, "account", openai("Your account is suspended.")),
    (407, "account", "proxy"),
    (403, "model", openai("Project `proj_1` does not have access to model `gpt-4o`", "model_not_found")),
    (400, "model", openai("Your organization must be verified to use the model `o3`.")),
    (400, "model", google(400, "INVALID_ARGUMENT", "This model is no longer available to new users.")),
    (401, "key", "<html>Unauthorized</html>"),
    (400, "key", {"detail": "Invalid API key"}),
    (400, "key", {"error": "Invalid API-Key"}),
    (400, "key", "invalid api key"),
]
CLIENTS = [
    (400, openai("max_tokens is too large")),
    (400, [google(400, "INVALID_ARGUMENT", "Invalid value at 'messages[0].role'")]),
    (400, google(400, "FAILED_PRECONDITION", "The file is not in an ACTIVE state.")),
    (404, openai("The model `x` does not exist", "model_not_found")),
    (404, [google(404, "NOT_FOUND", "models/x is not found for API version v1main")]),
    (413, openai("too large")),
    (422, {"detail": [{"loc": ["body", "messages"], "msg": "Field required"}]}),
    (
        429,
        google(
            429, "RESOURCE_EXHAUSTED", "You exceeded your current quota, please check your plan and billing details."
        ),
    ),
    (429, openai("Rate limit reached for requests", "rate_limit_exceeded")),
    (500, "<html>the api key of a page</html>"),
]


@pytest.mark.parametrize(("status", "cause", "document"), OPERATOR)
def test_refusal_when_it_is_about_the_operator_then_its_cause_is_named(
    status: int, cause: str, document: object
) -> None:
    body = document.encode() if isinstance(document, str) else json.dumps(document).encode()
    refusal = about_operator(status, body)
    assert refusal is not None
    assert refusal.cause == cause


@pytest.mark.parametrize(("status", "document"), CLIENTS)
def test_refusal_when_it_is_about_the_request_then_it_is_none(status: int, document: object) -> None:
    body = document.encode() if isinstance(document, str) else json.dumps(document).encode()
    assert about_operator(status, body) is None


@pytest.mark.parametrize(("status", "cause", "document"), OPERATOR)
@pytest.mark.parametrize("members", [{}, {"stream": True}], ids=["whole", "stream"])
async def test_relay_when_gemini_refuses_its_operator_then_hardware_serves_and_it_is_logged_once(
    relay: RunningRelay,
    gemini: Backend,
    caplog: pytest.LogCaptureFixture,
    status: int,
    cause: str,
    document: object,
    members: dict[str, Any],
) -> None:
    gemini.always, gemini.refusal = "refuse", (status, document)
    for _ in range(3):
        answer = await relay.ask(**members)
        assert (answer.status, answer.headers["X-Credits-Backend"]) == (200, "hardware")
    assert await relay.spent() == (3, 0)
    (line,) = [record for record in caplog.records if getattr(record, "event", "") == "backend_refuses_operator"]
    assert (line.levelno, line.__dict__["cause"], line.__dict__["status"]) == (logging.ERROR, cause, status)
    assert GEMINI_KEY not in line.getMessage()


@pytest.mark.parametrize(("status", "cause", "document"), OPERATOR)
@pytest.mark.parametrize("backend", ["gemini", "hardware"])
async def test_relay_when_its_only_backend_refuses_its_operator_then_the_client_reads_nothing_of_it(
    start_relay: StartRelay, gemini: Backend, status: int, cause: str, document: object, backend: Any
) -> None:
    relay = await start_relay(client_of(backend, gemini.url))
    gemini.always, gemini.refusal = "refuse", (status, document)
    answer = await relay.ask()
    assert (answer.status, answer.code) == (502, "backend_unavailable")
    words = answer.body.decode().lower()
    assert not [word for word in ("key", "billing", "account", "location", "country", cause) if word in words]
    assert await relay.spent() == (0, 0)


@pytest.mark.parametrize(("status", "document"), [each for each in CLIENTS if each[0] in (400, 413, 422)])
async def test_relay_when_a_backend_refuses_the_request_then_the_client_gets_that_and_hardware_is_not_asked(
    relay: RunningRelay, gemini: Backend, hardware: Backend, status: int, document: object
) -> None:
    gemini.always, gemini.refusal = "refuse", (status, document)
    answer = await relay.ask()
    assert (answer.status, answer.document) == (status, document)
    assert not hardware.seen


async def test_relay_when_a_model_is_not_for_the_account_and_there_is_no_other_backend_then_404_without_its_words(
    start_relay: StartRelay, gemini: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url))
    said = "The model `m` does not exist or you do not have access to it."
    gemini.always, gemini.refusal = "refuse", (404, openai(said, "model_not_found"))
    answer = await relay.ask()
    assert (answer.status, answer.code) == (404, "model_not_found")
    assert "access" not in answer.body.decode()
    assert said in caplog.text


async def test_breaker_when_a_key_is_refused_by_400_then_it_opens_but_not_by_words_that_a_client_may_have_sent(
    start_relay: StartRelay, gemini: Backend
) -> None:
    breaker = CircuitBreaker(failures=2, reset_s=60)
    relay = await start_relay(client_of("gemini", gemini.url, breaker=breaker))
    gemini.always, gemini.refusal = "refuse", (400, openai("Invalid value: 'my api key'"))
    for _ in range(4):
        assert (await relay.ask()).status == 502
    assert len(gemini.seen) == 4
    gemini.refusal = (400, google(400, "INVALID_ARGUMENT", "API key expired.", "API_KEY_INVALID"))
    for _ in range(8):
        assert (await relay.ask()).status == 502
    assert len(gemini.seen) < 12
