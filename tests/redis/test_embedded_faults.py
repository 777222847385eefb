"""The embedded server when its processes and files are treated badly: never two servers on one folder."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from limiter import CreditLimiter, LimiterUnavailable, SettingsError, connect
from limiter.redis import embedded
from tests.support.credits import TIERS

COUNT = """
import asyncio, sys
from limiter import connect

async def main(folder):
    redis = await connect("embedded:" + folder)
    print(await redis.incr("seen"), (await redis.info("server"))["process_id"])
    await redis.expire("seen", 600)
    await redis.aclose()

asyncio.run(main(sys.argv[1]))
"""


@pytest.fixture
async def limiter(tmp_path: Path) -> AsyncIterator[CreditLimiter]:
    """A limiter on an embedded server of its own."""
    client = await connect(f"embedded:{tmp_path / 'data'}")
    yield CreditLimiter(client, TIERS)
    await client.aclose()


async def test_embedded_when_its_server_is_killed_under_a_client_then_calls_soon_work_again(
    limiter: CreditLimiter,
) -> None:
    await limiter.debit("i", tier="core", has_hardware=False)
    pid = (await limiter.session.redis.info("server"))["process_id"]
    await limiter.session.redis.waitaof(1, 0, 1000)
    os.kill(int(pid), signal.SIGKILL)
    balance = await limiter.balance("i", tier="core")
    assert balance.remaining == 49
    assert (await limiter.session.redis.info("server"))["process_id"] != pid


async def test_embedded_when_its_socket_is_removed_then_no_second_server_starts_on_its_files(
    limiter: CreditLimiter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "_LOST_S", 0.2)
    pid = int((await limiter.session.redis.info("server"))["process_id"])
    embedded.socket_path(tmp_path / "data").unlink()
    with pytest.raises(LimiterUnavailable, match=r"a server runs on .*, but its socket .* is gone: end that process"):
        await connect(f"embedded:{tmp_path / 'data'}")
    os.kill(pid, 0)  # it runs on


def test_embedded_when_folder_and_temp_folder_have_long_paths_then_a_settings_error_says_what_to_shorten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("t" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with pytest.raises(SettingsError, match=r"too long for a socket: give \[redis\] url a data folder with a shorter"):
        embedded.socket_path(tmp_path / ("x" * 100))


def test_embedded_when_two_users_have_other_temp_folders_then_they_share_one_server(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 100)
    other = Path(tempfile.mkdtemp(prefix="limiter-"))  # short, as a socket in it must be
    answers = []
    first = subprocess.Popen(
        [
            sys.executable,
            "-c",
            COUNT.replace("await redis.aclose()", "sys.stdin.readline(); await redis.aclose()"),
            folder,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(other), "PYTHONUNBUFFERED": "1"},
    )
    assert first.stdout
    answers.append(first.stdout.readline().split())
    second = subprocess.run(
        [sys.executable, "-c", COUNT, folder], capture_output=True, text=True, timeout=60, check=True
    )
    answers.append(second.stdout.split())
    first.communicate("\n", timeout=60)
    shutil.rmtree(other)
    assert [count for count, _ in answers] == ["1", "2"]
    assert len({pid for _, pid in answers}) == 1


@pytest.mark.parametrize("name", ["lock", "users", "server"])
async def test_embedded_when_a_file_of_the_folder_cannot_be_opened_then_it_is_a_settings_error(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "data" / name).mkdir(parents=True)
    with pytest.raises(SettingsError, match=r"the data folder .* cannot be used: Is a directory"):
        await asyncio.wait_for(connect(f"embedded:{tmp_path / 'data'}"), 30)


def test_embedded_url_when_written_with_slashes_then_the_folder_is_the_same() -> None:
    assert embedded.folder_of("embedded://./data") == embedded.folder_of("embedded:./data") == Path("data")
