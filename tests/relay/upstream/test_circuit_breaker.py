"""The circuit breaker: by its clock alone, and in front of backends that really fail."""

import asyncio
import contextlib

import pytest

from limiter.relay.upstream.circuit_breaker import MAX_INSTALLS, WINDOW_S, CircuitBreaker, CircuitOpen, RecentInstalls
from tests.support.openai_backend import Backend
from tests.support.redis_servers import free_port
from tests.support.relay import ONE_SERVER, RunningRelay, StartRelay, client_of, new_install
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


def call(breaker: CircuitBreaker, *results: bool, by: str = "one") -> None:
    for good in results:
        attempt = breaker.enter(by)
        attempt.succeed() if good else attempt.fail()
        attempt.end()


def refused(breaker: CircuitBreaker, by: str = "one") -> int:
    with pytest.raises(CircuitOpen) as raised:
        breaker.enter(by)
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
    probe = breaker.enter("one")
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
    breaker.enter("one").end()
    assert state(breaker) == "half_open"
    call(breaker, True)
    assert state(breaker) == "closed"


def test_breaker_when_a_call_from_before_ends_late_then_it_changes_nothing(
    breaker: CircuitBreaker, seconds: Seconds
) -> None:
    early = [breaker.enter("one") for _ in range(8)]
    call(breaker, False, False, False)
    early.pop().succeed()
    assert state(breaker) == "open"
    seconds.now_s += 10
    probe = breaker.enter("one")
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


# Installs


def test_breaker_when_one_install_of_several_fails_then_it_stays_closed(
    breaker: CircuitBreaker, seconds: Seconds
) -> None:
    for _ in range(100):
        call(breaker, True, by="an honest one")
        call(breaker, *[False] * 50, by="the attacker")
        seconds.now_s += 1
    assert state(breaker) == "closed"


def test_breaker_when_one_install_fails_and_others_did_now_and_then_then_it_stays_closed(
    breaker: CircuitBreaker,
) -> None:
    for number in range(20):
        call(breaker, number < 16, by=f"honest {number}")
    call(breaker, *[False] * 500, by="the attacker")
    assert state(breaker) == "closed"


def test_breaker_when_three_installs_fail_then_it_opens(breaker: CircuitBreaker) -> None:
    call(breaker, True, by="a")
    for name in "bcd":
        assert state(breaker) == "closed"
        call(breaker, False, by=name)
    assert state(breaker) == "open"


@pytest.mark.parametrize("names", ["aaa", "aba"])
def test_breaker_when_fewer_than_three_call_and_all_fail_then_it_opens(breaker: CircuitBreaker, names: str) -> None:
    for name in names:
        assert state(breaker) == "closed"
        call(breaker, False, by=name)
    assert state(breaker) == "open"


def test_breaker_when_one_install_alone_fails_and_others_use_the_other_backend_then_it_stays_closed(
    seconds: Seconds,
) -> None:
    users = RecentInstalls()
    gemini, hardware = (CircuitBreaker(failures=3, reset_s=10, clock=seconds, users=users) for _ in range(2))
    call(gemini, True, by="an honest one")
    call(hardware, *[False] * 50, by="the attacker")
    assert state(hardware) == "closed"
    seconds.now_s += WINDOW_S
    call(hardware, *[False] * 3, by="the attacker")  # now it is the only user
    assert state(hardware) == "open"


def test_breaker_when_the_others_called_long_ago_then_one_install_opens_it(
    breaker: CircuitBreaker, seconds: Seconds
) -> None:
    call(breaker, True, by="another")
    call(breaker, False, False, False)
    assert state(breaker) == "closed"
    seconds.now_s += WINDOW_S
    call(breaker, False, False, False)
    assert state(breaker) == "open"


def test_breaker_when_a_probe_failed_and_others_wait_then_the_next_probe_is_not_by_the_same_install(
    breaker: CircuitBreaker, seconds: Seconds
) -> None:
    call(breaker, False, False, False)
    seconds.now_s += 10
    call(breaker, False, by="the attacker")
    assert refused(breaker, by="an honest one") == 10
    seconds.now_s += 10
    assert refused(breaker, by="the attacker") == 10
    call(breaker, True, by="an honest one")
    assert state(breaker) == "closed"


def test_breaker_when_a_probe_failed_and_nobody_else_comes_then_the_same_install_probes_again(
    breaker: CircuitBreaker, seconds: Seconds
) -> None:
    call(breaker, False, False, False, by="a")
    seconds.now_s += 10
    call(breaker, False, by="b")
    refused(breaker, by="a")
    seconds.now_s += 20  # whoever waited does not come any more
    call(breaker, True, by="b")
    assert state(breaker) == "closed"


def test_breaker_when_a_call_is_of_no_install_then_it_does_not_count_and_is_no_probe(
    breaker: CircuitBreaker, seconds: Seconds
) -> None:
    for _ in range(10):
        breaker.enter(None).fail()
    assert state(breaker) == "closed"
    call(breaker, False, False, False)
    with pytest.raises(CircuitOpen):
        breaker.enter(None)
    seconds.now_s += 10
    for _ in range(2):
        attempt = breaker.enter(None)
        attempt.succeed()
        attempt.end()
    assert state(breaker) == "half_open"
    call(breaker, True)
    assert state(breaker) == "closed"


def test_breaker_when_very_many_installs_call_then_memory_is_bounded(breaker: CircuitBreaker) -> None:
    for number in range(3 * MAX_INSTALLS):
        call(breaker, True, number % 2 == 0, by=str(number))
    assert len(breaker._latest) == MAX_INSTALLS
    assert breaker._failing == MAX_INSTALLS / 2


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


@ONE_SERVER
async def test_install_when_its_requests_make_both_backends_fail_then_others_are_still_served(
    start_relay: StartRelay, gemini: Backend, hardware: Backend
) -> None:
    users = RecentInstalls()
    relay = await start_relay(
        client_of("gemini", gemini.url, breaker=CircuitBreaker(failures=5, reset_s=10, users=users)),
        client_of("hardware", hardware.url, breaker=CircuitBreaker(failures=5, reset_s=10, users=users)),
    )
    honest = {"X-Install-Id": new_install()}
    assert (await relay.ask(headers=honest)).status == 200
    assert [(await relay.ask("status:500")).status for _ in range(12)] == [502] * 12
    answer = await relay.ask(headers=honest)
    assert (answer.status, answer.headers["X-Credits-Backend"]) == (200, "gemini")
    assert await states(relay) == {"gemini": "closed", "hardware": "closed"}
