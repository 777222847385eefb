"""What OpenAI's SDKs, both of them, make of each of the relay's refusals: the exception, and whether they try again.

Attempts are counted by the relay's own metrics, as an SDK does not report how often it has tried.
"""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from limiter import CreditLimiter, connect
from limiter.licences.keys import issue
from tests.support.licences import DAY_S, KEY, PUBLIC_KEY
from tests.support.openai_backend import Backend
from tests.support.openai_sdks import Call, Operation, PythonSdk, Sdk
from tests.support.redis_servers import Server
from tests.support.relay import CHAT, ONE_SERVER, RELAY_TIERS, RunningRelay, StartRelay, client_of, new_install, tiers
from tests.support.wait import eventually

pytestmark = ONE_SERVER


def call(relay: RunningRelay, model: str = "plain", operation: Operation = "chat", **more: Any) -> Call:
    return Call(
        **({"base_url": f"{relay.url}/v1", "api_key": relay.install_id} | more), model=model, operation=operation
    )


async def attempts(relay: RunningRelay, route: str = CHAT) -> dict[int, int]:
    """Return how many requests the relay has answered, by status."""
    text = (await relay.send("GET", "/metrics")).body.decode()
    lines = re.findall(r'^limiter_requests_total\{.*route="(.*?)",status="(\d+)"\} (\d+)', text, re.MULTILINE)
    return {int(status): int(number) for path, status, number in lines if path == route}


@pytest.mark.parametrize(
    ("model", "more", "error", "status", "code"),
    [
        ("bad-request", {}, "BadRequestError", 400, ""),
        ("plain", {"api_key": "sk-none-of-ours"}, "AuthenticationError", 401, "invalid_licence"),
        ("status:404", {}, "NotFoundError", 404, "bad"),
        ("plain", {"words": "x" * (1 << 20)}, "", 413, "request_too_large"),
        ("plain", {"headers": {"Content-Type": "text/plain"}}, "", 415, "unsupported_media_type"),
        ("status:422", {}, "UnprocessableEntityError", 422, "bad"),
    ],
)
async def test_sdk_when_it_is_to_blame_then_the_right_exception_after_one_attempt(
    sdk: Sdk,
    start_relay: StartRelay,
    gemini: Backend,
    model: str,
    more: dict[str, Any],
    error: str,
    status: int,
    code: str,
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url), body_limit_mb=1)
    outcome = await sdk.call(call(relay, model, max_retries=2, **more))
    assert (outcome.error, outcome.status, outcome.code) == (error or sdk.status_error, status, code)
    assert outcome.request_id
    assert await attempts(relay) == {status: 1}
    assert await relay.spent() == (0, 0)


async def test_sdk_when_credits_are_out_then_402_after_one_attempt(
    sdk: Sdk, start_relay: StartRelay, gemini: Backend
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url), tiers=tiers(lifetime=1))
    assert (await sdk.call(call(relay))).text == "Hello"
    await relay.settled()
    outcome = await sdk.call(call(relay, max_retries=2))
    assert (outcome.error, outcome.status, outcome.code) == (sdk.status_error, 402, "out_of_credits")
    assert await attempts(relay) == {200: 1, 402: 1}


async def test_sdk_when_the_seats_are_taken_then_permission_denied_after_one_attempt(
    sdk: Sdk, start_relay: StartRelay, gemini: Backend
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url), public_keys=[PUBLIC_KEY])
    licence = issue(KEY, tier="pro", subject="alice", valid_s=DAY_S, installs=1)

    def of(install_id: str) -> Call:
        return call(relay, api_key=licence, headers={"X-Install-Id": install_id}, max_retries=2)

    assert (await sdk.call(of(relay.install_id))).text == "Hello"
    outcome = await sdk.call(of(new_install()))
    assert (outcome.error, outcome.status, outcome.code) == ("PermissionDeniedError", 403, "licence_seats_taken")
    assert await attempts(relay) == {200: 1, 403: 1}


async def test_sdk_when_a_key_still_runs_then_it_retries_and_has_the_same_answer(
    sdk: Sdk, start_relay: StartRelay, gemini: Backend
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url))
    keyed: dict[str, Any] = {"headers": {"Idempotency-Key": "k"}}
    first = asyncio.create_task(PythonSdk().call(call(relay, "wait", **keyed)))
    await gemini.arrived.wait()
    refused = await sdk.call(call(relay, "wait", **keyed))
    assert (refused.error, refused.status, refused.code) == ("ConflictError", 409, "idempotency_in_progress")
    again = asyncio.create_task(sdk.call(call(relay, "wait", max_retries=2, **keyed)))
    await eventually(lambda: _counted(relay, 409, 2), what="the second attempt's refusal")
    gemini.go_on.set()
    assert (await first).text == (await again).text == "Hello"
    assert len(gemini.seen) == 1
    assert await relay.spent() == (1, 1)


async def test_sdk_when_a_key_was_used_for_something_else_then_unprocessable_after_one_attempt(
    sdk: Sdk, relay: RunningRelay
) -> None:
    keyed: dict[str, Any] = {"headers": {"Idempotency-Key": "k"}, "max_retries": 2}
    assert (await sdk.call(call(relay, words="this", **keyed))).text == "Hello"
    outcome = await sdk.call(call(relay, words="that", **keyed))
    assert (outcome.error, outcome.status) == ("UnprocessableEntityError", 422)
    assert outcome.code == "idempotency_key_reused"
    assert await attempts(relay) == {200: 1, 422: 1}
    assert await relay.spent() == (1, 1)


async def test_sdk_when_too_many_run_then_429_and_it_retries_until_served(
    sdk: Sdk, start_relay: StartRelay, gemini: Backend
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url), tiers=tiers(lifetime=9, max_in_flight=1))
    first = asyncio.create_task(PythonSdk().call(call(relay, "wait")))
    await gemini.arrived.wait()
    refused = await sdk.call(call(relay))
    assert (refused.error, refused.status, refused.code) == ("RateLimitError", 429, "too_many_in_flight")
    again = asyncio.create_task(sdk.call(call(relay, max_retries=2)))
    await eventually(lambda: _counted(relay, 429, 2), what="the second attempt's refusal")
    gemini.go_on.set()
    assert (await first).text == (await again).text == "Hello"
    assert await attempts(relay) == {200: 2, 429: 2}
    assert await relay.spent() == (2, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "status", "code"),
    [
        ("status:500", 502, "backend_unavailable"),
        ("break-before", 502, "backend_unavailable"),
        ("hang", 504, "backend_timeout"),
    ],
)
async def test_sdk_when_the_backend_fails_then_server_error_after_all_attempts_and_no_debit(
    sdk: Sdk, start_relay: StartRelay, gemini: Backend, model: str, status: int, code: str
) -> None:
    # Only who hangs is to time out: on a busy machine a backend that fails may take longer than that.
    relay = await start_relay(client_of("gemini", gemini.url, timeout_s=0.2 if model == "hang" else 10))
    outcome = await sdk.call(call(relay, model, max_retries=1))
    assert (outcome.error, outcome.status, outcome.code) == ("InternalServerError", status, code)
    assert await attempts(relay) == {status: 2}
    assert await relay.spent() == (0, 0)


@pytest.mark.slow
async def test_sdk_when_redis_is_unavailable_then_503_and_served_on_a_later_attempt(
    sdk: Sdk, start_relay: StartRelay, gemini: Backend, own_server: Any, closing: AsyncExitStack
) -> None:
    server: Server = own_server()
    redis: Redis = await connect(server.url)
    closing.push_async_callback(redis.aclose)
    relay = await start_relay(client_of("gemini", gemini.url), on=CreditLimiter(redis, RELAY_TIERS, timeout_ms=200))
    server.stop()
    refused = await sdk.call(call(relay))
    assert (refused.error, refused.status, refused.code) == ("InternalServerError", 503, "limiter_unavailable")
    again = asyncio.create_task(sdk.call(call(relay, max_retries=9)))
    await eventually(lambda: _counted(relay, 503, 2), what="the second attempt's refusal")
    await asyncio.to_thread(server.start)
    assert (await again).text == "Hello"
    assert await relay.spent() == (1, 1)


@pytest.mark.parametrize("operation", ["chat", "embed"])
async def test_sdk_when_the_answer_was_lost_then_it_retries_and_is_debited_once(
    sdk: Sdk, relay: RunningRelay, gemini: Backend, operation: Operation
) -> None:
    async with _losing_the_first_answer(relay) as port:
        url = f"http://127.0.0.1:{port}/v1"
        outcome = await sdk.call(call(relay, operation=operation, base_url=url, max_retries=2))
    assert outcome.text in ("Hello", "0.6 -0.8")
    assert await attempts(relay, gemini.last.path) == {200: 2}
    assert len(gemini.seen) == 1
    assert await relay.spent() == (1, 1)


async def test_sdk_when_it_times_out_then_it_retries_and_is_debited_once(
    sdk: Sdk, relay: RunningRelay, gemini: Backend
) -> None:
    impatient = asyncio.create_task(sdk.call(call(relay, "wait", max_retries=9, timeout_s=1)))
    await eventually(lambda: len(gemini.seen) == 2, what="the second attempt")
    gemini.go_on.set()
    assert (await impatient).text == "Hello"
    assert gemini.seen[0].gone.is_set()
    assert await relay.spent() == (1, 1)


async def test_sdk_when_an_upload_fails_then_its_error_says_so(
    sdk: Sdk, start_relay: StartRelay, gemini: Backend, tmp_path: Path
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url), upload_limit_mb=1)
    file = tmp_path / "speech.wav"
    file.write_bytes(b"RIFF" + bytes(2 << 20))
    outcome = await sdk.call(call(relay, operation="transcribe", file=str(file)))
    assert (outcome.error, outcome.status, outcome.code) == (sdk.status_error, 413, "request_too_large")
    assert await relay.spent() == (0, 0)


async def _counted(relay: RunningRelay, status: int, number: int) -> bool:
    return (await attempts(relay)).get(status, 0) >= number


@asynccontextmanager
async def _losing_the_first_answer(relay: RunningRelay) -> AsyncIterator[int]:
    """Put a TCP proxy before the relay that hangs up instead of passing on the first answer.

    It hangs up once the relay has recorded that answer: until then the next attempt would be refused with 409, and
    whether the relay or the SDK is faster is the machine's business.
    """
    lost = False

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal lost
        relay_reader, relay_writer = await asyncio.open_connection("127.0.0.1", relay.port)

        async def pass_on(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            nonlocal lost
            while chunk := await source.read(65536):
                if source is relay_reader and not lost:
                    lost = True
                    await relay.settled()
                    return
                target.write(chunk)

        both = [asyncio.create_task(pass_on(*ends)) for ends in ((reader, relay_writer), (relay_reader, writer))]
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        for task in both:
            task.cancel()
        await asyncio.gather(*both, return_exceptions=True)
        for end in (writer, relay_writer):
            end.close()

    async with await asyncio.start_server(accept, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]
