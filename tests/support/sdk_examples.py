"""What an example of OpenAI's SDK must do, in whatever language, against a real relay with its built-in echo."""

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from redis.asyncio import Redis

from limiter import CreditLimiter, Tiers
from tests.support.cli import Relay
from tests.support.relay import new_install

SETTINGS = {"LIMITER_TIERS": '{"core": {"lifetime": 3}}', "LIMITER_PERSISTER__FILE": ""}


@contextmanager
def relay_with_three_credits(redis_url: str, folder: Path) -> Iterator[str]:
    """Run a relay with three credits for each install; its value is the URL."""
    relay = Relay(folder, "--redis", redis_url, settings=SETTINGS)
    try:
        yield relay.url
    finally:
        relay.stop()


def run_example(command: Sequence[str], relay_url: str, install_id: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command,
        env=os.environ | {"RELAY_URL": relay_url, "INSTALL_ID": install_id},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def check_it_serves_and_reports_402(command: Sequence[str], relay_url: str) -> None:
    """Run it twice: it makes two calls, so the second run meets the end of its three credits."""
    install_id = new_install()
    first = run_example(command, relay_url, install_id)
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines() == ["Hello, relay", 'credits: "credits";r=2', "Hello, stream"]
    second = run_example(command, relay_url, install_id)
    assert second.returncode == 1
    assert second.stdout.splitlines() == ["Hello, relay", 'credits: "credits";r=0']
    assert second.stderr.startswith("out of credits (out_of_credits)")


async def check_it_reports_429(command: Sequence[str], relay_url: str, redis: Redis) -> None:
    """Run it while the last credits of its install are held, also after its retries."""
    limiter, install_id = CreditLimiter(redis, Tiers.from_mapping({"core": {"lifetime": 3}})), new_install()
    decision = await limiter.reserve(install_id, tier="core", has_hardware=True, cost=3)
    ran = run_example(command, relay_url, install_id)
    assert ran.returncode == 1
    assert ran.stderr.strip() == "busy (credits_in_flight), try again in 1 s"
    await limiter.release(install_id, decision.hold_id)
