"""The example of OpenAI's SDK for Python; tests/system has the one for JavaScript."""

import sys
from pathlib import Path

import pytest
from redis.asyncio import Redis

from tests.support.paths import ROOT
from tests.support.relay import ONE_SERVER
from tests.support.sdk_examples import (
    check_it_reports_429,
    check_it_serves_and_reports_402,
    relay_with_three_credits,
)

pytestmark = ONE_SERVER
COMMAND = [sys.executable, str(ROOT / "examples/openai_sdk.py")]


async def test_example_when_credits_run_out_then_it_says_so(redis: Redis, redis_url: str, tmp_path: Path) -> None:
    with relay_with_three_credits(redis_url, tmp_path) as url:
        check_it_serves_and_reports_402(COMMAND, url)
    assert await redis.dbsize() >= 1


@pytest.mark.slow
async def test_example_when_all_credits_are_held_then_it_retries_and_says_when_to_try_again(
    redis: Redis, redis_url: str, tmp_path: Path
) -> None:
    with relay_with_three_credits(redis_url, tmp_path) as url:
        await check_it_reports_429(COMMAND, url, redis)
