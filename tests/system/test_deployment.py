"""docker-compose.yml and what it runs: accepted as it is, and its services as processes under traffic."""

import asyncio
import json
import signal
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import yaml
from redis.asyncio import Redis

from tests.support.compose import Fleet, compose_config, missing
from tests.support.openai_backend import Backend, running_backend
from tests.support.wait import eventually

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"not installed, and not on PyPI: {' '.join(missing())}")
PASSWORD = "0123456789abcdef"  # noqa: S105  of a server that lives for one test


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[tuple[Fleet, Backend]]:
    """Redis, two relays, nginx and the persister, with a backend of the tests' own."""
    async with running_backend() as backend:
        fleet = Fleet(tmp_path, {"REDIS_PASSWORD": PASSWORD, "HARDWARE_URL": backend.url})
        try:
            fleet.start("redis")
            await eventually(lambda: _answers_ping(fleet), what="the start of Redis")
            for name in ("relay-1", "relay-2", "persister", "load-balancer"):
                fleet.start(name)
            for name in ("relay-1", "relay-2"):
                url = f"http://127.0.0.1:{fleet.ports[name]}/readyz"
                await eventually(lambda url=url: _is_ok(url), within_s=30, what=f"the start of {name}")  # type: ignore[misc]  # a default binds it now
            await eventually(lambda: _is_ok(f"{fleet.url}/healthz"), what="the start of nginx")
            yield fleet, backend
        finally:
            fleet.close()


async def _answers_ping(fleet: Fleet) -> bool:
    redis = Redis(port=fleet.ports["redis"], password=PASSWORD)
    try:
        return bool(await redis.ping())
    except (ConnectionError, OSError):
        return False
    finally:
        await redis.aclose()


async def _is_ok(url: str) -> bool:
    async with aiohttp.ClientSession() as session:
        try:
            async with session.get(url) as response:
                return response.status == 200
        except aiohttp.ClientError:
            return False


def _question(model: str = "m", **more: object) -> dict[str, object]:
    return {"model": model, "messages": [{"role": "user", "content": "?"}], **more}


async def _ask(url: str, install_id: str, **more: str) -> int:
    headers = {"X-Install-Id": install_id, **more}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/v1/chat/completions", json=_question(), headers=headers) as answer,
    ):
        await answer.read()
        return answer.status


@pytest.mark.parametrize("profile", ["", "cluster"])
def test_docker_compose_accepts_the_file_with_each_profile(profile: str) -> None:
    result = compose_config({"REDIS_PASSWORD": PASSWORD}, *(("--profile", profile) if profile else ()))
    assert result.returncode == 0, result.stderr
    services = yaml.safe_load(result.stdout)["services"]
    active = {name for name, service in services.items() if service.get("profiles", [profile]) == [profile]}
    assert ("cluster-init" in active) == (profile == "cluster")


def test_a_deployment_without_a_password_is_refused_and_says_so() -> None:
    result = compose_config({})
    assert result.returncode != 0
    assert "REDIS_PASSWORD" in result.stderr


async def test_two_relays_behind_nginx_serve_an_install_from_one_row(fleet: tuple[Fleet, Backend]) -> None:
    running, _ = fleet
    install_id = str(uuid.uuid4())
    statuses = await asyncio.gather(*(_ask(running.url, install_id) for _ in range(4)))
    assert statuses == [200] * 4
    redis = Redis(port=running.ports["redis"], password=PASSWORD)
    assert await redis.hget(f"credits:install:{install_id}", "lifetime_consumed") == b"4"
    await redis.aclose()
    served = [await _metric(running, name, "limiter_requests_total{") for name in ("relay-1", "relay-2")]
    assert all(served), "nginx spread the requests over both relays"


async def _metric(fleet: Fleet, name: str, start: str) -> list[str]:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{fleet.ports[name]}/metrics") as answer,
    ):
        return [line for line in (await answer.text()).splitlines() if line.startswith(start) and "chat" in line]


async def test_a_stream_passes_nginx_event_by_event(fleet: tuple[Fleet, Backend]) -> None:
    running, backend = fleet
    async with (
        aiohttp.ClientSession() as session,
        session.post(
            f"{running.url}/v1/chat/completions",
            json=_question("stepwise", stream=True),
            headers={"X-Install-Id": str(uuid.uuid4())},
        ) as answer,
    ):
        async with asyncio.timeout(10):
            assert b"w0" in await answer.content.readany()  # the backend has not sent the rest yet
        backend.go_on.set()
        assert (await answer.read()).endswith(b"data: [DONE]\n\n")


async def test_an_upload_reaches_the_backend_while_it_is_sent(fleet: tuple[Fleet, Backend]) -> None:
    running, backend = fleet
    sent_rest = asyncio.Event()

    async def audio() -> AsyncIterator[bytes]:
        yield b"x" * 300_000
        await eventually(_received, what="the first part at the backend")
        sent_rest.set()
        yield b"y" * 300_000

    async def _received() -> bool:
        return bool(backend.seen) and backend.last.received > 200_000

    form = aiohttp.FormData({"model": "m"})
    form.add_field("file", audio(), filename="a.wav")
    async with (
        aiohttp.ClientSession() as session,
        session.post(
            f"{running.url}/v1/audio/transcriptions", data=form, headers={"X-Install-Id": str(uuid.uuid4())}
        ) as answer,
    ):
        assert answer.status == 200
    assert sent_rest.is_set()


async def test_a_killed_relay_is_left_out_and_without_any_the_answer_is_an_error_object(
    fleet: tuple[Fleet, Backend],
) -> None:
    running, _ = fleet
    install_id = str(uuid.uuid4())
    running.end("relay-1", signal.SIGKILL)
    assert [await _ask(running.url, install_id) for _ in range(4)] == [200] * 4
    assert running.end("relay-2") == 0
    async with (
        aiohttp.ClientSession() as session,
        session.post(
            f"{running.url}/v1/chat/completions", json=_question(), headers={"X-Install-Id": install_id}
        ) as answer,
    ):
        assert answer.status == 503
        assert answer.headers["Retry-After"] == "2"
        document = await answer.json()
    assert document["error"]["code"] == "no_relay"


async def test_new_installs_are_counted_by_the_address_that_nginx_saw(fleet: tuple[Fleet, Backend]) -> None:
    """A client must not evade the limit by its own X-Forwarded-For."""
    running, _ = fleet
    assert await _ask(running.url, str(uuid.uuid4()), **{"X-Forwarded-For": "203.0.113.9"}) == 200
    redis = Redis(port=running.ports["redis"], password=PASSWORD)
    assert not [key for key in await redis.keys("*") if b"203.0.113" in key]
    await redis.aclose()


async def test_nginx_keeps_metrics_and_readiness_to_the_operators_network(fleet: tuple[Fleet, Backend]) -> None:
    running, _ = fleet
    assert not await _is_ok(f"{running.url}/metrics")
    assert not await _is_ok(f"{running.url}/readyz")


async def test_the_persister_writes_what_the_relays_debited_and_every_service_stops_cleanly(
    fleet: tuple[Fleet, Backend],
) -> None:
    running, _ = fleet
    install_id = str(uuid.uuid4())
    assert await _ask(running.url, install_id) == 200
    codes = {name: running.end(name) for name in ("load-balancer", "relay-1", "relay-2", "persister", "redis")}
    assert codes == dict.fromkeys(codes, 0), running.log("persister")
    rows = json.loads((running.folder / "persister" / "credits.json").read_text())["rows"]
    assert rows[install_id]["lifetime_consumed"] == 1


async def test_nginx_refuses_the_requests_of_an_address_that_has_too_many_under_way(
    fleet: tuple[Fleet, Backend],
) -> None:
    running, backend = fleet
    install_ids = [str(uuid.uuid4()) for _ in range(60)]  # each runs as many as its tier allows
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask(install_id: str) -> tuple[int, dict[str, str], bytes]:
            url, headers = f"{running.url}/v1/chat/completions", {"X-Install-Id": install_id}
            async with session.post(url, json=_question("wait"), headers=headers) as answer:
                return answer.status, dict(answer.headers), await answer.read()

        asked = [asyncio.create_task(ask(install_id)) for install_id in install_ids * 4]
        await eventually(lambda: sum(task.done() for task in asked) >= 240 - 128, what="refusals")
        await eventually(lambda: len(backend.seen) == 128, what="what is not refused")
        backend.go_on.set()
        answers = await asyncio.gather(*asked)
    assert sorted(status for status, _, _ in answers) == [200] * 128 + [429] * 112
    _, headers, body = next(answer for answer in answers if answer[0] == 429)
    assert headers["Retry-After"] == "1"
    assert json.loads(body)["error"]["code"] == "rate_limited"


def test_every_service_of_the_file_has_no_rights_that_it_does_not_need_and_a_limit_of_memory() -> None:
    services = yaml.safe_load(compose_config({"REDIS_PASSWORD": PASSWORD}, "--profile", "cluster").stdout)["services"]
    for name, service in services.items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["read_only"], name
        assert service["mem_limit"], name
    assert "127.0.0.1" in str(services["load-balancer"]["ports"])
