"""Which backend serves what: by its routes, by the models that are mapped, and by what Gemini does not know."""

from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest

from limiter.config.settings import METERED_PATHS, BackendsSettings, GeminiSettings, ModelNames, Settings
from limiter.relay.process.relay_process import open_backends
from limiter.relay.upstream.circuit_breaker import CircuitBreaker
from tests.support.openai_backend import Backend
from tests.support.relay import CHAT, Answer, RunningRelay, StartRelay, client_of, tiers

GEMINI_ROUTES = GeminiSettings().routes
UPLOAD = "/v1/audio/transcriptions"
FORM = (
    b'--B\r\nContent-Disposition: form-data; name="model"\r\n\r\n%s\r\n'
    b'--B\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\nRIFF\r\n--B--\r\n'
)
STREAMS = pytest.mark.parametrize("members", [{}, {"stream": True}], ids=["whole", "stream"])


async def ask(relay: RunningRelay, path: str, model: str = "plain", **members: Any) -> Answer:
    """Make a request to any metered path."""
    if path == UPLOAD:
        named = {"X_Install_Id": relay.install_id, "Content_Type": "multipart/form-data; boundary=B"}
        return await relay.send("POST", path, FORM % model.encode(), **named)
    return await relay.ask(model, path, **members)


# Routes


@pytest.mark.parametrize("path", METERED_PATHS)
async def test_route_when_gemini_lacks_it_then_hardware_serves_it_and_no_gemini_credit_is_held_or_spent(
    start_relay: StartRelay, gemini: Backend, hardware: Backend, path: str
) -> None:
    relay = await start_relay(
        client_of("gemini", gemini.url, routes=GEMINI_ROUTES), client_of("hardware", hardware.url)
    )
    answer = await ask(relay, path)
    serves = "gemini" if path in ("/v1/chat/completions", "/v1/embeddings") else "hardware"
    assert (answer.status, answer.headers["X-Credits-Backend"]) == (200, serves)
    assert (len(gemini.seen), len(hardware.seen)) == ((1, 0) if serves == "gemini" else (0, 1))
    assert await relay.spent() == (1, 1 if serves == "gemini" else 0)


async def test_route_when_gemini_lacks_it_then_a_running_request_takes_nothing_of_the_cap(
    start_relay: StartRelay, gemini: Backend, hardware: Backend
) -> None:
    relay = await start_relay(
        client_of("gemini", gemini.url, routes=GEMINI_ROUTES),
        client_of("hardware", hardware.url),
        tiers=tiers(lifetime=9, gemini_cap=1),
    )
    hardware.go_on.clear()
    async with relay.post("stepwise", "/v1/responses", stream=True) as running:
        assert running.status == 200
        answer = await relay.ask()
        assert (answer.status, answer.headers["X-Credits-Backend"]) == (200, "gemini")
        hardware.go_on.set()
        await running.read()
    assert await relay.spent() == (2, 1)


@pytest.mark.parametrize("path", [path for path in METERED_PATHS if path not in GEMINI_ROUTES])
async def test_route_when_no_backend_has_it_then_404_before_anything_is_held(
    start_relay: StartRelay, gemini: Backend, path: str
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url, routes=GEMINI_ROUTES))
    answer = await ask(relay, path)
    assert (answer.status, answer.code) == (404, "unknown_path")
    assert not gemini.seen
    assert await relay.limiter.row(relay.install_id) is None


async def test_route_when_hardware_lacks_it_then_a_failing_gemini_is_not_followed_by_it_and_its_cap_is_an_end(
    start_relay: StartRelay, gemini: Backend, hardware: Backend
) -> None:
    relay = await start_relay(
        client_of("gemini", gemini.url),
        client_of("hardware", hardware.url, routes=["/v1/embeddings"]),
        tiers=tiers(lifetime=9, gemini_cap=1),
    )
    assert (await relay.ask("status:500")).status == 502
    assert await relay.spent() == (0, 0)
    assert (await relay.ask("status:404")).status == 404
    assert await relay.spent() == (0, 0)
    assert (await relay.ask()).status == 200
    assert await relay.spent() == (1, 1)
    assert (await relay.ask()).code == "gemini_cap_exceeded_no_hardware"
    assert not hardware.seen
    assert (await relay.ask(path="/v1/embeddings")).headers["X-Credits-Backend"] == "hardware"


# Models


@STREAMS
@pytest.mark.parametrize("path", [path for path in METERED_PATHS if path != UPLOAD])
async def test_model_when_mapped_for_one_backend_alone_then_that_one_serves_it(
    start_relay: StartRelay, gemini: Backend, hardware: Backend, path: str, members: dict[str, Any]
) -> None:
    relay = await start_relay(
        client_of("gemini", gemini.url, models={"cloud": "m1"}, lacks={"local"}),
        client_of("hardware", hardware.url, models={"local": "m2"}, lacks={"cloud"}),
        tiers=tiers(lifetime=9, gemini_cap=1),
    )
    answer = await ask(relay, path, "local", **members)
    assert (answer.status, answer.headers["X-Credits-Backend"]) == (200, "hardware")
    assert (hardware.last.model, len(gemini.seen)) == ("m2", 0)
    assert await relay.spent() == (1, 0)
    answer = await ask(relay, path, "cloud", **members)
    assert (answer.status, answer.headers["X-Credits-Backend"]) == (200, "gemini")
    assert (gemini.last.model, len(hardware.seen)) == ("m1", 1)
    assert (await ask(relay, path, "cloud", **members)).code == "gemini_cap_exceeded_no_hardware"
    assert len(hardware.seen) == 1


async def test_model_when_mapped_for_a_backend_that_is_not_here_then_404_before_anything_is_held(
    start_relay: StartRelay, gemini: Backend
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url, lacks={"local"}))
    answer = await relay.ask("local")
    assert (answer.status, answer.code) == (404, "model_not_found")
    assert not gemini.seen
    assert await relay.limiter.row(relay.install_id) is None


@pytest.mark.parametrize("path", METERED_PATHS)
async def test_model_when_gemini_does_not_know_it_then_hardware_serves_it_under_the_same_hold(
    relay: RunningRelay, gemini: Backend, hardware: Backend, path: str
) -> None:
    gemini.always = "status:404"
    for _ in range(8):  # it is no failure: the breaker stays closed
        answer = await ask(relay, path)
        assert (answer.status, answer.headers["X-Credits-Backend"]) == (200, "hardware")
    assert (len(gemini.seen), len(hardware.seen)) == (8, 8)
    assert await relay.spent() == (8, 0)


@STREAMS
async def test_model_when_neither_knows_it_then_the_client_gets_one_404_and_nothing_is_debited(
    relay: RunningRelay, gemini: Backend, hardware: Backend, members: dict[str, Any]
) -> None:
    answer = await relay.ask("status:404", **members)
    assert (answer.status, answer.headers["X-Credits-Backend"]) == (404, "hardware")
    assert (len(gemini.seen), len(hardware.seen)) == (1, 1)
    assert await relay.spent() == (0, 0)


async def test_model_when_gemini_does_not_know_it_and_hardware_fails_then_it_may_be_asked_for_again(
    start_relay: StartRelay, gemini: Backend, hardware: Backend
) -> None:
    relay = await start_relay(
        client_of("gemini", gemini.url, breaker=CircuitBreaker(failures=1, reset_s=60)),
        client_of("hardware", hardware.url, models={"status:404": "status:500"}),
    )
    assert (await relay.ask("status:404")).status == 502
    assert (await relay.ask()).headers["X-Credits-Backend"] == "gemini"  # its breaker is closed
    assert await relay.spent() == (1, 1)


# From the settings


def settings_of(backends: Mapping[str, Any], models: Mapping[str, Any]) -> Settings:
    return Settings.model_construct(
        backends=BackendsSettings.model_validate(backends),
        models={name: ModelNames.model_validate(names) for name, names in models.items()},
    )


@pytest.fixture
async def from_settings(gemini: Backend, hardware: Backend, start_relay: StartRelay) -> AsyncIterator[RunningRelay]:
    """A relay with the backends that settings make: their routes are the defaults."""
    settings = settings_of(
        {"gemini": {"url": gemini.url, "api_key": "key"}, "hardware": {"url": hardware.url}},
        {"local": {"hardware": "m2"}, "cloud": {"gemini": "m1"}, "both": {"gemini": "b1", "hardware": "b2"}},
    )
    async with open_backends(settings) as clients:
        yield await start_relay(*clients.values())


@pytest.mark.parametrize(
    ("model", "path", "backend", "sent"),
    [
        ("local", CHAT, "hardware", "m2"),
        ("cloud", CHAT, "gemini", "m1"),
        ("both", CHAT, "gemini", "b1"),
        ("both", "/v1/responses", "hardware", "b2"),
        ("other", CHAT, "gemini", "other"),
        ("other", "/v1/completions", "hardware", "other"),
        ("both", "/v1/embeddings", "gemini", "b1"),
        ("scribe", UPLOAD, "hardware", "scribe"),
    ],
)
async def test_settings_when_loaded_then_each_request_goes_where_they_say(
    from_settings: RunningRelay, gemini: Backend, hardware: Backend, model: str, path: str, backend: str, sent: str
) -> None:
    answer = await ask(from_settings, path, model)
    assert (answer.status, answer.headers["X-Credits-Backend"]) == (200, backend)
    assert (gemini if backend == "gemini" else hardware).last.model == sent


async def test_settings_when_a_model_is_mapped_for_a_backend_without_the_route_then_404(
    from_settings: RunningRelay,
) -> None:
    answer = await from_settings.ask("cloud", "/v1/responses")
    assert (answer.status, answer.code) == (404, "model_not_found")


async def test_settings_when_an_entry_names_no_backend_then_it_says_nothing() -> None:
    settings = settings_of({"hardware": {"url": "http://h/v1"}}, {"odd": {}})
    async with open_backends(settings) as clients:
        assert clients["hardware"].has_model("odd")
