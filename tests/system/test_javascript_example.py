"""The example of OpenAI's SDK for JavaScript: it needs Node and the npm package of the tests."""

import shutil
from pathlib import Path

import pytest
from redis.asyncio import Redis

from tests.support.openai_sdks import NODE_MODULES, node_with_sdk
from tests.support.paths import ROOT
from tests.support.relay import ONE_SERVER
from tests.support.sdk_examples import (
    check_it_reports_429,
    check_it_serves_and_reports_402,
    relay_with_three_credits,
)

pytestmark = ONE_SERVER


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """The example where Node finds the SDK: a module's packages are looked for beside it."""
    node = node_with_sdk()
    (tmp_path / "node_modules").symlink_to(NODE_MODULES)
    return [node, shutil.copy(str(ROOT / "examples/openai_sdk.mjs"), str(tmp_path))]


async def test_example_when_credits_run_out_then_it_says_so(
    redis: Redis, redis_url: str, tmp_path: Path, command: list[str]
) -> None:
    with relay_with_three_credits(redis_url, tmp_path) as url:
        check_it_serves_and_reports_402(command, url)
    assert await redis.dbsize() >= 1


async def test_example_when_all_credits_are_held_then_it_retries_and_says_when_to_try_again(
    redis: Redis, redis_url: str, tmp_path: Path, command: list[str]
) -> None:
    with relay_with_three_credits(redis_url, tmp_path) as url:
        await check_it_reports_429(command, url, redis)
