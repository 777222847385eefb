"""The examples of the library do what they say: each runs as a process of its own, on a real server."""

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import pytest
from redis.asyncio import Redis

from limiter import CreditLimiter, Tiers
from tests.support.credits import fields_of
from tests.support.paths import ROOT
from tests.support.relay import ONE_SERVER

pytestmark = ONE_SERVER
EXAMPLES = ROOT / "examples"
TIERS = Tiers.from_mapping({"core": {"lifetime": 3, "max_in_flight": 2}})  # as the examples have them


def environment(redis_url: str) -> dict[str, str]:
    return os.environ | {"REDIS_URL": redis_url, "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="module")
def service(redis_url: str) -> Iterator[str]:
    """The URL of the FastAPI service on a free port."""
    command = [sys.executable, "-m", "uvicorn", "library_fastapi:app", "--port", "0", "--no-access-log"]
    process = subprocess.Popen(
        command, cwd=EXAMPLES, env=environment(redis_url), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    output = []
    assert process.stdout
    with process, process.stdout:
        try:
            for line in process.stdout:
                output.append(line)
                if found := re.search(r"running on (http://\S+)", line):
                    yield found[1]
                    break
            else:
                pytest.fail(f"it ended at once:\n{''.join(output)}")
        finally:
            process.terminate()
            rest = process.stdout.read()
    assert "Traceback" not in rest
    assert "Application shutdown complete." in rest


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


async def post(session: aiohttp.ClientSession, url: str, install_id: str = "alice") -> tuple[int, dict[str, Any]]:
    headers = {"X-Install-Id": install_id}
    async with session.post(f"{url}/summaries", data="First. Second.", headers=headers) as response:
        return response.status, await response.json()


async def test_fastapi_when_credits_are_used_up_then_402(
    redis: Redis, service: str, session: aiohttp.ClientSession
) -> None:
    assert [await post(session, service) for _ in range(3)] == [(200, {"summary": "First."})] * 3
    assert await post(session, service) == (402, {"detail": "out_of_credits"})
    assert (await fields_of(redis, "alice"))["lifetime_consumed"] == "3"


async def test_fastapi_when_running_requests_hold_what_is_left_then_429(
    redis: Redis, service: str, session: aiohttp.ClientSession
) -> None:
    limiter = CreditLimiter(redis, TIERS)
    holds = [await limiter.reserve("alice", tier="core", has_hardware=True) for _ in range(2)]
    assert await post(session, service) == (429, {"detail": "too_many_in_flight"})
    await limiter.release("alice", holds[0].hold_id)
    assert (await post(session, service))[0] == 200
    await limiter.release("alice", holds[1].hold_id)


async def test_fastapi_when_the_install_id_is_not_valid_then_400(service: str, session: aiohttp.ClientSession) -> None:
    assert (await post(session, service, "no spaces here"))[0] == 400


@pytest.mark.slow
async def test_fastapi_when_redis_does_not_answer_then_503(
    redis: Redis, service: str, session: aiohttp.ClientSession
) -> None:
    await redis.client_pause(3500, all=True)  # the limiter gives up after 3 s
    status, document = await post(session, service)
    assert (status, "Redis" in document["detail"]) == (503, True)


async def test_worker_when_it_has_jobs_then_each_that_succeeds_is_debited(redis: Redis, redis_url: str) -> None:
    """Five jobs for three credits: the failed one costs nothing, and the last one is refused."""
    texts = [{"text": "one"}, {"text": "two"}, {}, {"text": "four"}, {"text": "five"}]
    lines = [json.dumps({"id": f"job-{at}", "install_id": "alice", **text}) for at, text in enumerate(texts, start=1)]
    worker = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "library_worker.py"],
        cwd=EXAMPLES,
        env=environment(redis_url),
        input="\n".join(lines),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert worker.returncode == 0, worker.stderr
    printed = worker.stdout.splitlines()
    assert "job-3 failed: KeyError('text')" in printed
    assert len([line for line in printed if " done: " in line]) == 3
    assert len([line for line in printed if line.endswith("refused: out_of_credits")]) == 1
    assert (await fields_of(redis, "alice"))["lifetime_consumed"] == "3"
    assert "held" not in await fields_of(redis, "alice")
