"""Outages of Redis: what is refused, what is settled later, and that no relay needs a restart."""

import asyncio
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import pytest

from limiter import CreditLimiter, connect
from tests.support.cli import Relay
from tests.support.openai_backend import Backend, running_backend
from tests.support.redis_servers import Server
from tests.support.relay import CHAT, RELAY_TIERS, Answer, RunningRelay, client_of, new_install, relays_on, tiers
from tests.support.wait import eventually


class Outage:
    """A relay on a server that the test may stop."""

    def __init__(self, server: Server, relay: RunningRelay, gemini: Backend) -> None:
        self.server, self.relay, self.gemini = server, relay, gemini

    async def spent_now(self) -> tuple[int, int]:
        async with asyncio.timeout(20):
            return await self.relay.spent()


@pytest.fixture
async def outage(own_server: Callable[..., Server]) -> AsyncIterator[Outage]:
    server = own_server()
    async with AsyncExitStack() as stack:
        gemini = await stack.enter_async_context(running_backend())
        redis = await connect(server.url, timeout_ms=400)
        stack.push_async_callback(redis.aclose)
        start = await stack.enter_async_context(relays_on(redis))
        limiter = CreditLimiter(redis, tiers(lifetime=5), timeout_ms=400, deadline_ms=800)
        yield Outage(server, await start(client_of("gemini", gemini.url), on=limiter), gemini)


@pytest.mark.parametrize("how", ["kill", "pause"])
async def test_redis_when_it_becomes_unavailable_after_the_reserve_then_the_answer_is_sent_at_once_and_the_commit_later(
    outage: Outage, how: str
) -> None:
    relay = outage.relay
    asking = asyncio.ensure_future(relay.ask("wait"))
    await outage.gemini.arrived.wait()
    getattr(outage.server, how)()
    began_s = time.monotonic()
    outage.gemini.go_on.set()
    answer = await asking
    assert (answer.status, answer.headers["X-Credits-Backend"]) == (200, "gemini")
    assert time.monotonic() - began_s < 0.4, "it waited for Redis"
    outage.server.start() if how == "kill" else outage.server.resume()
    assert await outage.spent_now() == (1, 1)


async def test_redis_when_it_becomes_unavailable_in_mid_stream_then_the_stream_continues(outage: Outage) -> None:
    async with outage.relay.post("stepwise") as response:
        await response.content.readany()
        outage.server.kill()
        outage.gemini.go_on.set()
        assert (await response.content.read()).endswith(b"data: [DONE]\n\n")
    outage.server.start()
    assert await outage.spent_now() == (1, 1)


@pytest.mark.parametrize("how", ["kill", "pause"])
async def test_redis_when_it_is_unavailable_then_503_and_nothing_is_forwarded_until_the_recovery(
    outage: Outage, how: str
) -> None:
    relay = outage.relay
    getattr(outage.server, how)()
    answer = await relay.ask()
    assert (answer.status, answer.code) == (503, "limiter_unavailable")
    assert int(answer.headers["Retry-After"]) >= 1
    assert answer.document["error"]["type"] == "server_error"
    assert "127.0.0.1" not in answer.body.decode()
    assert (await relay.send("GET", "/healthz")).status == 200
    ready = await relay.send("GET", "/readyz")
    assert (ready.status, ready.document["status"]) == (503, "not ready")
    assert (await relay.send("GET", "/v1/credits", X_Install_Id=relay.install_id)).status == 503
    assert outage.gemini.seen == []
    outage.server.start() if how == "kill" else outage.server.resume()

    async def served() -> bool:
        return (await relay.ask()).status == 200

    await eventually(served, what="the recovery")
    assert (await relay.send("GET", "/readyz")).status == 200
    # A paused server may have placed the holds: they are released, too.
    assert await outage.spent_now() == (1, 1)


async def test_redis_when_its_answer_to_a_reserve_is_lost_then_the_hold_is_released(outage: Outage) -> None:
    """The pause lets the server execute the reserve after the relay has given up."""
    assert (await outage.relay.ask()).status == 200
    assert await outage.spent_now() == (1, 1)
    outage.server.pause()
    assert (await outage.relay.ask()).status == 503
    outage.server.resume()
    assert await outage.spent_now() == (1, 1)
    for _ in range(4):
        assert (await outage.relay.ask()).status == 200
    assert await outage.spent_now() == (5, 5)


async def test_redis_when_it_is_restarted_under_load_then_what_was_served_is_what_was_debited(outage: Outage) -> None:
    installs = [new_install() for _ in range(8)]
    served = dict.fromkeys(installs, 0)
    stop = asyncio.Event()

    async def ask(install_id: str) -> None:
        while not stop.is_set():
            answer = await outage.relay.ask(headers={"X-Install-Id": install_id})
            served[install_id] += answer.status == 200
            assert answer.status in {200, 402, 503, 429}
            await asyncio.sleep(0.01)

    asking = [asyncio.ensure_future(ask(install_id)) for install_id in installs]
    await eventually(lambda: sum(served.values()) > 8)
    outage.server.kill()
    outage.server.start()
    await eventually(lambda: sum(served.values()) == 40, what="the use of every credit")
    stop.set()
    await asyncio.gather(*asking)
    for install_id in installs:
        assert (await outage.relay.spent(install_id))[0] == served[install_id] == 5


# Retries of the SDKs, which count their attempts and name no request

ATTEMPTS = [{"x-stainless-retry-count": str(number)} for number in range(4)]


async def recovered(relay: RunningRelay) -> bool:
    return (await relay.send("GET", "/readyz")).status == 200


def is_replayed(answer: Answer) -> bool:
    assert answer.status == 200
    return answer.headers.get("Idempotency-Replayed") == "true"


@pytest.mark.parametrize("how", ["kill", "pause"])
async def test_retry_when_its_first_attempt_met_redis_unavailable_then_it_is_not_a_repeat_of_an_earlier_request_like_it(
    outage: Outage, how: str
) -> None:
    relay = outage.relay
    assert not is_replayed(await relay.ask(headers=ATTEMPTS[0]))
    assert await outage.spent_now() == (1, 1)
    getattr(outage.server, how)()
    assert (await relay.ask(headers=ATTEMPTS[0])).status == 503
    assert (await relay.ask(headers=ATTEMPTS[1])).status == 503
    outage.server.start() if how == "kill" else outage.server.resume()
    await eventually(lambda: recovered(relay), what="the recovery")
    assert not is_replayed(await relay.ask(headers=ATTEMPTS[2]))
    assert is_replayed(await relay.ask(headers=ATTEMPTS[3])), "its answer was lost"
    assert await outage.spent_now() == (2, 2)
    assert len(outage.gemini.seen) == 2


async def test_retry_when_the_answer_of_its_first_attempt_was_lost_then_an_outage_makes_no_second_debit(
    outage: Outage,
) -> None:
    relay = outage.relay
    assert not is_replayed(await relay.ask(headers=ATTEMPTS[0]))
    await relay.settled()
    outage.server.kill()
    assert (await relay.ask(headers=ATTEMPTS[1])).status == 503
    outage.server.start()
    await eventually(lambda: recovered(relay), what="the recovery")
    assert is_replayed(await relay.ask(headers=ATTEMPTS[2]))
    assert await outage.spent_now() == (1, 1)


# Shutdown


async def test_shutdown_when_a_request_runs_then_it_is_finished_and_settled(outage: Outage) -> None:
    asking = asyncio.ensure_future(outage.relay.ask("slow:0.2"))
    await outage.gemini.arrived.wait()
    await outage.relay.runner.cleanup()
    assert (await asking).status == 200
    assert await outage.relay.spent() == (1, 1)


async def test_shutdown_when_drain_s_is_0_then_served_requests_are_still_settled(
    own_server: Callable[..., Server],
) -> None:
    async with running_backend() as gemini:
        redis = await connect(own_server().url)
        async with relays_on(redis) as start:
            relay = await start(client_of("gemini", gemini.url), drain_s=0)
            asking = asyncio.ensure_future(relay.ask("wait"))
            await gemini.arrived.wait()
            await redis.client_pause(300)
            gemini.go_on.set()
            assert (await asking).status == 200
            await relay.runner.cleanup()
            assert await relay.spent() == (1, 1)
        await redis.aclose()


async def test_shutdown_when_redis_is_unavailable_then_the_commit_is_waited_for(outage: Outage) -> None:
    asking = asyncio.ensure_future(outage.relay.ask("wait"))
    await outage.gemini.arrived.wait()
    outage.server.kill()
    outage.gemini.go_on.set()
    assert (await asking).status == 200
    closing = asyncio.ensure_future(outage.relay.runner.cleanup())
    await asyncio.sleep(0)
    outage.server.start()
    await closing
    assert await outage.relay.spent() == (1, 1)


async def test_sigterm_when_requests_run_then_the_process_finishes_settles_and_exits_with_0(
    own_server: Callable[..., Server], tmp_path: Path
) -> None:
    server, install_id = own_server(), new_install()
    async with running_backend() as hardware, aiohttp.ClientSession() as session:
        settings = {"LIMITER_BACKENDS__HARDWARE__URL": hardware.url, "LIMITER_PERSISTER__FILE": ""}
        process = await asyncio.to_thread(Relay, tmp_path, "--redis", server.url, settings=settings)
        try:

            async def ask(model: str) -> bytes:
                headers = {"X-Install-Id": install_id}
                async with session.post(process.url + CHAT, json={"model": model}, headers=headers) as response:
                    assert response.status == 200
                    return await response.read()

            asking = [asyncio.ensure_future(ask(model)) for model in ("wait", "stepwise")]
            await eventually(lambda: len(hardware.seen) == 2)
            process.process.send_signal(signal.SIGTERM)
            await eventually(lambda: refused(process.url), what="the end of listening")
            hardware.go_on.set()
            answers = await asyncio.gather(*asking)
            assert await asyncio.to_thread(process.process.wait, 20) == 0
        finally:
            process.kill()
    assert answers[1].endswith(b"data: [DONE]\n\n")
    redis = await connect(server.url)
    row = await CreditLimiter(redis, RELAY_TIERS).row(install_id)
    await redis.aclose()
    assert row
    assert (row.lifetime_consumed, row.holds) == (2, ())


def refused(url: str) -> bool:
    try:
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=1).close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:  # it was in the backlog when the listening ended
        return False
    return False
