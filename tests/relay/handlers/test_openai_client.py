"""The real `openai` client against the relay: an OpenAI app works by its base_url, and its retries are as intended."""

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from tests.support.licences import KEY, PUBLIC_KEY, licence_for
from tests.support.openai_backend import Backend
from tests.support.relay import ONE_SERVER, RunningRelay, StartRelay, client_of, tiers

pytestmark = ONE_SERVER


def sdk(relay: RunningRelay, **options: Any) -> openai.AsyncOpenAI:
    named: dict[str, Any] = {"base_url": f"{relay.url}/v1", "api_key": relay.install_id, "max_retries": 2} | options
    return openai.AsyncOpenAI(**named)


@pytest.fixture
async def client(relay: RunningRelay) -> AsyncIterator[openai.AsyncOpenAI]:
    """A client whose API key is the install id."""
    async with sdk(relay) as client:
        yield client


async def ask(client: openai.AsyncOpenAI, model: str = "plain") -> str:
    answer = await client.chat.completions.create(model=model, messages=[{"role": "user", "content": "Hi"}])
    return str(answer.choices[0].message.content)


async def test_sdk_when_it_chats_then_it_reads_the_answer_and_one_credit_is_debited(
    client: openai.AsyncOpenAI, relay: RunningRelay
) -> None:
    assert await ask(client) == "Hello"
    assert await ask(client, "gzip") == "packed"
    assert await relay.spent() == (2, 2)


async def test_sdk_when_it_streams_then_it_reads_each_chunk(client: openai.AsyncOpenAI, relay: RunningRelay) -> None:
    stream = await client.chat.completions.create(
        model="stream:3:0", messages=[{"role": "user", "content": "Hi"}], stream=True
    )
    assert [chunk.choices[0].delta.content async for chunk in stream] == ["w0 ", "w1 ", "w2 "]
    assert await relay.spent() == (1, 1)


async def test_sdk_when_it_embeds_then_it_reads_the_vector(client: openai.AsyncOpenAI, relay: RunningRelay) -> None:
    answer = await client.embeddings.create(model="m", input="text", encoding_format="float")
    assert answer.data[0].embedding == [0.6, -0.8]
    assert await relay.spent() == (1, 1)


async def test_sdk_when_its_key_is_a_licence_then_the_install_id_is_a_header(
    start_relay: StartRelay, gemini: Backend
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url), public_keys=[PUBLIC_KEY])
    named = {"api_key": licence_for("pro", KEY), "default_headers": {"X-Install-Id": relay.install_id}}
    async with sdk(relay, **named) as client:
        assert await ask(client) == "Hello"
    await relay.settled()
    row = await relay.limiter.row(relay.install_id)
    assert row
    assert (row.tier_snapshot, row.monthly_consumed) == ("pro", 1)


async def test_sdk_when_credits_are_out_then_a_status_error_and_no_retry(
    start_relay: StartRelay, gemini: Backend
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url), tiers=tiers(lifetime=1))
    asked = 0

    async def count(_request: object) -> None:
        nonlocal asked
        asked += 1

    async with sdk(relay) as client:
        client._client.event_hooks["request"].append(count)
        await ask(client)
        await relay.settled()
        with pytest.raises(openai.APIStatusError) as raised:
            await ask(client)
    assert type(raised.value) is openai.APIStatusError
    assert raised.value.status_code == 402
    assert (raised.value.code, raised.value.type) == ("out_of_credits", "insufficient_quota")
    assert raised.value.request_id == raised.value.response.headers["X-Request-Id"]
    assert asked == 2


async def test_sdk_when_credits_are_in_flight_then_it_retries_and_is_served(
    start_relay: StartRelay, gemini: Backend
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url), tiers=tiers(lifetime=9, max_in_flight=1))
    statuses: list[int] = []

    async def note(response: object) -> None:
        statuses.append(response.status_code)  # type: ignore[attr-defined]
        gemini.go_on.set()

    async with sdk(relay) as client, relay.connect("wait") as (reader, _):
        client._client.event_hooks["response"].append(note)
        await gemini.arrived.wait()
        assert await ask(client) == "Hello"
        assert b"200 OK" in await reader.readline()
    assert statuses == [429, 200]
    assert await relay.spent() == (2, 2)


@pytest.mark.parametrize(
    ("model", "error"),
    [
        ("bad-request", openai.BadRequestError),
        ("status:404", openai.NotFoundError),
        ("status:422", openai.UnprocessableEntityError),
        ("status:401", openai.InternalServerError),
    ],
)
async def test_sdk_when_the_backend_fails_then_the_exception_is_the_one_to_expect(
    relay: RunningRelay, model: str, error: type[openai.APIStatusError]
) -> None:
    async with sdk(relay, max_retries=0) as client:
        with pytest.raises(error):
            await ask(client, model)
    assert await relay.spent() == (0, 0)


async def test_sdk_when_its_licence_is_bad_then_authentication_error(relay: RunningRelay) -> None:
    async with sdk(relay, api_key="sk-none-of-ours") as client:
        with pytest.raises(openai.AuthenticationError) as raised:
            await ask(client)
    assert raised.value.code == "invalid_licence"


async def test_sdk_when_a_stream_breaks_then_it_raises_instead_of_ending(
    client: openai.AsyncOpenAI, relay: RunningRelay
) -> None:
    stream = await client.chat.completions.create(
        model="break-stream", messages=[{"role": "user", "content": "Hi"}], stream=True
    )
    chunks = aiter(stream)
    assert (await anext(chunks)).choices[0].delta.content == "w0 "
    with pytest.raises(openai.APIError, match="the connection broke") as raised:
        await anext(chunks)
    assert raised.value.code == "backend_unavailable"
    assert await relay.spent() == (1, 1)


async def test_sdk_when_it_stops_reading_a_stream_then_the_backend_is_stopped(
    client: openai.AsyncOpenAI, relay: RunningRelay, gemini: Backend
) -> None:
    stream = await client.chat.completions.create(
        model="stepwise", messages=[{"role": "user", "content": "Hi"}], stream=True
    )
    async for _ in stream:
        break
    await stream.close()
    await gemini.last.gone.wait()
    assert await relay.spent() == (1, 1)
