"""OpenAI's SDKs, through the relay, to a server that this project did not write: LiteLLM's proxy, as either backend."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from limiter.credits.models import Backend as BackendName
from limiter.relay.upstream.client import BackendClient
from tests.support.litellm import LITELLM_KEY, litellm_process
from tests.support.openai_sdks import Call, Operation, Sdk
from tests.support.relay import ONE_SERVER, RunningRelay, StartRelay

pytestmark = ONE_SERVER
WORDS = "Hello from LiteLLM"


@pytest.fixture(scope="module")
def litellm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with litellm_process(tmp_path_factory.mktemp("litellm")) as url:
        yield url


@pytest.fixture(params=["gemini", "hardware"])
async def relay(request: pytest.FixtureRequest, start_relay: StartRelay, litellm: str) -> RunningRelay:
    """A relay whose one backend is LiteLLM; `recap` is the operator's name for a model of it."""
    name: BackendName = request.param
    return await start_relay(
        BackendClient(name, litellm, api_key=LITELLM_KEY, timeout_s=60, models={"recap": "chat", "hear": "scribe"})
    )


def call(relay: RunningRelay, operation: Operation, model: str, **more: Any) -> Call:
    return Call(operation, f"{relay.url}/v1", relay.install_id, model, **more)


@pytest.mark.parametrize(
    ("operation", "model", "text"),
    [
        ("chat", "chat", WORDS),
        ("chat", "recap", WORDS),
        ("stream", "recap", WORDS),
        ("complete", "recap", WORDS),
        ("respond", "recap", WORDS),
        ("embed", "embed", "0.25 -0.5"),
    ],
)
async def test_sdk_when_litellm_serves_it_then_it_reads_the_answer_and_one_credit_is_debited(
    sdk: Sdk, relay: RunningRelay, operation: Operation, model: str, text: str
) -> None:
    outcome = await sdk.call(call(relay, operation, model))
    assert (outcome.text, outcome.detail) == (text, "")
    assert (await relay.spent())[0] == 1


@pytest.mark.parametrize("model", ["scribe", "hear"])
async def test_sdk_when_it_uploads_to_litellm_then_the_form_is_read_there_whole(
    sdk: Sdk, relay: RunningRelay, tmp_path: Path, model: str
) -> None:
    """LiteLLM reads the form and sends the file on in one of its own; who gets that counts the bytes."""
    file = tmp_path / "speech.wav"
    file.write_bytes(b"RIFF" + bytes(3 << 20))
    outcome = await sdk.call(call(relay, "transcribe", model, file=str(file)))
    assert outcome.detail == ""
    size = int(outcome.text.removesuffix(" bytes"))
    assert 0 <= size - file.stat().st_size < 2000
    assert (await relay.spent())[0] == 1


async def test_sdk_when_it_lists_models_then_litellms_are_included_at_no_cost(sdk: Sdk, relay: RunningRelay) -> None:
    listed = (await sdk.call(call(relay, "models", ""))).text.split()
    assert listed[:2] == ["recap", "hear"]
    assert {"chat", "embed", "scribe"} < set(listed)
    assert (await sdk.call(call(relay, "retrieve", "recap"))).text == "recap"
    assert (await sdk.call(call(relay, "retrieve", "none"))).error == "NotFoundError"
    assert await relay.spent() == (0, 0)


@pytest.mark.parametrize(
    ("model", "error", "status"),
    [("none", "BadRequestError", 400), ("busy", "InternalServerError", 502), ("broken", "InternalServerError", 502)],
)
async def test_sdk_when_litellm_refuses_then_the_exception_is_the_one_to_expect_and_nothing_is_debited(
    sdk: Sdk, relay: RunningRelay, model: str, error: str, status: int
) -> None:
    outcome = await sdk.call(call(relay, "chat", model))
    assert (outcome.error, outcome.status) == (error, status)
    assert await relay.spent() == (0, 0)


async def test_sdk_when_litellm_refuses_the_operator_then_502_that_does_not_say_why(
    sdk: Sdk, start_relay: StartRelay, litellm: str
) -> None:
    relay = await start_relay(BackendClient("hardware", litellm, timeout_s=60))
    outcome = await sdk.call(call(relay, "chat", "chat"))
    assert (outcome.error, outcome.status) == ("InternalServerError", 502)
    assert "key" not in outcome.detail
    assert await relay.spent() == (0, 0)
