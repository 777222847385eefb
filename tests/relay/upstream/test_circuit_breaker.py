"""The circuit breaker: by its clock alone, and in front of backends that really fail."""

import asyncio
import contextlib

import pytest

from limiter.relay.upstream.circuit_breaker import WINDOW_S, CircuitBreaker, CircuitOpen
from tests.support.openai_backend import Backend
from tests.support.redis_servers import free_port
from tests.support.relay import ONE_SERVER, RunningRelay, StartRelay, client_of
from tests.support.wait import eventually


class Seconds:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def seconds() -> Seconds:
    return Seconds()


@pytest.fixture
def breaker(seconds: Seconds) -> CircuitBreaker:
    return CircuitBreaker(failures=3, reset_s=10, clock=seconds)


def call(breaker: CircuitBreaker, *results: bool) -> None:
    for good in results:
        attempt = breaker.enter()
        attempt.succeed() if good else attempt.fail()
        attempt.end()


def refused(breaker: CircuitBreaker) -> int:
    with pytest.raises(CircuitOpen) as raised:
        breaker.enter()
    return raised.value.retry_after_s


def state(breaker: CircuitBreaker) -> str:
    return breaker.state


# By its clock


def test_breaker_when_enough_calls_fail_then_it_opens_for_a_known_time(
    breaker: CircuitBreaker, seconds: Seconds
) -> None:
    call(breaker, False, False)
    assert state(breaker) == "closed"
    call(breaker, False)
    assert state(breaker) == "open"
    assert refused(breaker) == 10
    seconds.now_s += 3.5
    assert refused(breaker) == 7


def test_breaker_when_the_failures_are_old_then_they_do_not_count(breaker: CircuitBreaker, seconds: Seconds) -> None:
    call(breaker, False, False)
    seconds.now_s += WINDOW_S
    call(breaker, False, False)
    assert state(breaker) == "closed"


def test_breaker_when_most_calls_are_good_then_it_stays_closed(breaker: CircuitBreaker) -> None:
    """One failure in a hundred, of a thousand requests a second, does not open the breaker."""
    for _ in range(10):
        call(breaker, True, True, True, False)
    assert state(breaker) == "closed"
    call(breaker, *[False] * 20)
    assert state(breaker) == "open"


def test_breaker_when_its_reset_time_is_over_then_one_probe_at_a_time_decides(
    breaker: CircuitBreaker, seconds: Seconds
) -> None:
    call(breaker, False, False, False)
    seconds.now_s += 10
    assert state(breaker) == "half_open"
    probe = breaker.enter()
    assert refused(breaker) == 1
    probe.fail()
    probe.end()
    assert (state(breaker), refused(breaker)) == ("open", 10)
    seconds.now_s += 10
    call(breaker, True)
    assert state(breaker) == "closed"
    call(breaker, False, False)
    assert state(breaker) == "closed"  # what was before the probe is forgotten


def test_breaker_when_the_probe_has_no_result_then_the_next_call_is_the_probe(
    breaker: CircuitBreaker, seconds: Seconds
) -> None:
    call(breaker, False, False, False)
    seconds.now_s += 10
    breaker.enter().end()
    assert state(breaker) == "half_open"
    call(breaker, True)
    assert state(breaker) == "closed"


def test_breaker_when_a_call_from_before_ends_late_then_it_changes_nothing(
    breaker: CircuitBreaker, seconds: Seconds
) -> None:
    early = [breaker.enter() for _ in range(8)]
    call(breaker, False, False, False)
    early.pop().succeed()
    assert state(breaker) == "open"
    seconds.now_s += 10
    probe = breaker.enter()
    for attempt in early[:3]:
        attempt.fail()
        attempt.end()
    assert refused(breaker) == 1
    probe.succeed()
    for attempt in early[3:]:
        attempt.fail()
    assert state(breaker) == "closed"


def test_breaker_when_failures_are_0_then_it_never_opens(seconds: Seconds) -> None:
    breaker = CircuitBreaker(failures=0, reset_s=10, clock=seconds)
    call(breaker, *[False] * 100)
    assert state(breaker) == "closed"


# In front of backends


async def states(relay: RunningRelay) -> dict[str, str]:
    document = (await relay.send("GET", "/readyz")).document
    return dict(document["breakers"])


@ONE_SERVER
async def test_gemini_when_it_is_dead_then_requests_go_straight_to_hardware_until_a_probe_succeeds(
    start_relay: StartRelay, gemini: Backend, hardware: Backend, seconds: Seconds
) -> None:
    relay = await start_relay(
        client_of("gemini", gemini.url, timeout_s=0.1, breaker=CircuitBreaker(failures=2, reset_s=10, clock=seconds)),
        client_of("hardware", hardware.url),
    )
    gemini.always = "hang"
    for _ in range(5):
        assert (await relay.ask()).headers["X-Credits-Backend"] == "hardware"
    assert (len(gemini.seen), len(hardware.seen)) == (2, 5)
    assert await states(relay) == {"gemini": "open", "hardware": "closed"}
    seconds.now_s += 10
    assert (await states(relay))["gemini"] == "half_open"
    await relay.ask()
    assert len(gemini.seen) == 3
    await relay.ask()
    assert len(gemini.seen) == 3
    gemini.always = ""
    seconds.now_s += 10
    assert [(await relay.ask()).headers["X-Credits-Backend"] for _ in range(3)] == ["gemini"] * 3
    assert await states(relay) == {"gemini": "closed", "hardware": "closed"}
    assert await relay.spent() == (10, 3)


@ONE_SERVER
async def test_breaker_when_it_opens_and_closes_then_each_change_is_logged_once_with_its_cause(
    start_relay: StartRelay,
    gemini: Backend,
    hardware: Backend,
    seconds: Seconds,
    caplog: pytest.LogCaptureFixture,
) -> None:
    relay = await start_relay(
        client_of("gemini", gemini.url, breaker=CircuitBreaker(failures=2, reset_s=10, clock=seconds)),
        client_of("hardware", hardware.url),
    )

    async def logged(asked: int) -> list[tuple[str, str]]:
        caplog.clear()
        for _ in range(asked):
            assert (await relay.ask()).status == 200
        return [(record.__dict__["event"], record.getMessage()) for record in caplog.records]

    gemini.always = "status:500"
    failed = "The backend 'gemini' answered 500."
    fell_back = ("backend_failed", f"{failed} Falling back to hardware.")
    opened = (
        "circuit_breaker_opened",
        f"Circuit breaker opened: the backend 'gemini' keeps failing and is not called for now: {failed}",
    )
    assert await logged(5) == [fell_back, opened, fell_back]  # and nothing for those that were not sent
    seconds.now_s += 10
    assert await logged(3) == [fell_back]  # a probe
    gemini.always = ""
    seconds.now_s += 10
    assert await logged(3) == [("circuit_breaker_closed", "Circuit breaker closed: the backend 'gemini' works again")]


@ONE_SERVER
async def test_backend_when_it_is_the_only_one_and_its_breaker_is_open_then_502_at_once_with_retry_after(
    start_relay: StartRelay, seconds: Seconds
) -> None:
    breaker = CircuitBreaker(failures=1, reset_s=7, clock=seconds)
    relay = await start_relay(client_of("hardware", f"http://127.0.0.1:{free_port()}/v1", breaker=breaker))
    await relay.ask()
    answer = await relay.ask()
    assert (answer.status, answer.code, answer.headers["Retry-After"]) == (502, "backend_unavailable", "7")
    assert "is not called for now" in answer.document["detail"]
    assert await relay.spent() == (0, 0)
    assert (await relay.send("GET", "/readyz")).status == 200


@ONE_SERVER
@pytest.mark.parametrize("model", ["status:400", "status:404", "status:429", "bad-request", "redirect"])
async def test_backend_when_it_answers_but_not_well_then_its_breaker_stays_closed(
    start_relay: StartRelay, gemini: Backend, model: str
) -> None:
    breaker = CircuitBreaker(failures=1, reset_s=10)
    relay = await start_relay(client_of("gemini", gemini.url, breaker=breaker))
    await relay.ask(model)
    assert state(breaker) == "closed"
    assert (await relay.ask()).status == 200


@ONE_SERVER
@pytest.mark.parametrize(
    "model", ["status:500", "status:503", "status:401", "status:403", "break-before", "break-head", "empty", "switch"]
)
async def test_backend_when_it_fails_then_its_breaker_opens(
    start_relay: StartRelay, gemini: Backend, model: str
) -> None:
    breaker = CircuitBreaker(failures=1, reset_s=10)
    relay = await start_relay(client_of("gemini", gemini.url, breaker=breaker))
    await relay.ask(model)
    assert state(breaker) == ("closed" if model == "switch" else "open")


@ONE_SERVER
async def test_client_when_it_leaves_the_probe_then_the_next_request_is_the_probe(
    start_relay: StartRelay, gemini: Backend, seconds: Seconds
) -> None:
    breaker = CircuitBreaker(failures=1, reset_s=10, clock=seconds)
    relay = await start_relay(client_of("gemini", gemini.url, breaker=breaker))
    await relay.ask("status:500")
    seconds.now_s += 10
    gemini.arrived.clear()
    asking = asyncio.ensure_future(relay.ask("hang"))
    await gemini.arrived.wait()
    assert (await relay.ask()).status == 502  # a probe is under way
    asking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asking
    await eventually(gemini.seen[-1].gone.is_set)

    async def answered() -> bool:
        return (await relay.ask()).status == 200

    await eventually(answered)
    assert state(breaker) == "closed"
