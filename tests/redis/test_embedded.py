"""`connect("embedded:FOLDER")`: the first one starts a server, others join it, the last one out stops it."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError

from limiter import CreditLimiter, LimiterUnavailable, SettingsError, connect
from limiter.redis import embedded
from tests.support.credits import TIERS
from tests.support.wait import eventually

USER = """
import asyncio, sys
from limiter import connect

async def main(folder):
    redis = await connect("embedded:" + folder)
    await redis.incr("joined")
    await redis.expire("joined", 600)
    print((await redis.info("server"))["process_id"], flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    await redis.aclose()

asyncio.run(main(sys.argv[1]))
"""


class User:
    """Another process that uses the folder's server."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", USER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout
        self.server_pid = int(self.process.stdout.readline())

    def leave(self) -> None:
        self.process.communicate("\n", timeout=20)
        assert self.process.returncode == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=20)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A data folder, in which no server is left running."""
    folder = tmp_path / "data"
    yield folder
    assert not server_runs(folder)


def server_runs(folder: Path) -> bool:
    return embedded._ping(embedded.socket_path(folder)) is not None


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o777


async def test_embedded_when_the_last_client_leaves_then_the_server_stops_and_keeps_the_rows(folder: Path) -> None:
    for remaining in (49, 48):
        client = await connect(f"embedded:{folder}")
        balance = (await CreditLimiter(client, TIERS).debit("a", tier="core", has_hardware=False)).balance
        assert balance.remaining == remaining
        assert server_runs(folder)
        await client.aclose()
        assert not server_runs(folder)


async def test_embedded_when_a_second_process_joins_then_it_is_the_same_server_until_both_left(folder: Path) -> None:
    client = await connect(f"embedded:{folder}")
    user = User(folder)
    assert user.server_pid == (await client.info("server"))["process_id"]
    assert await client.get("joined") == b"1"
    await client.aclose()
    assert server_runs(folder), "the other one still uses it"
    user.leave()
    assert not server_runs(folder)
    # It was this process's child, and the other one stopped it: a zombie would still be listed.
    await eventually(lambda: not Path(f"/proc/{user.server_pid}").exists(), what="the wait for the server's end")


async def test_embedded_when_a_client_has_no_connection_open_then_its_server_is_not_stopped_all_the_same(
    folder: Path,
) -> None:
    client = await connect(f"embedded:{folder}")
    await client.connection_pool.disconnect()
    other = await connect(f"embedded:{folder}")
    await other.aclose()
    assert await client.ping()
    await client.aclose()


async def test_embedded_when_the_process_that_started_it_is_killed_then_a_new_one_joins_and_stops_it_at_its_end(
    folder: Path,
) -> None:
    starter = User(folder)
    starter.kill()
    assert server_runs(folder)
    client = await connect(f"embedded:{folder}")
    assert (await client.info("server"))["process_id"] == starter.server_pid
    await client.aclose()


async def test_embedded_when_the_server_itself_is_killed_then_the_next_start_finds_the_rows(
    folder: Path, closing: AsyncExitStack
) -> None:
    client = await connect(f"embedded:{folder}")
    closing.push_async_callback(client.aclose)
    await CreditLimiter(client, TIERS).debit("a", tier="core", has_hardware=False)
    os.kill((await client.info("server"))["process_id"], signal.SIGKILL)
    again = await connect(f"embedded:{folder}")
    closing.push_async_callback(again.aclose)
    assert (await CreditLimiter(again, TIERS).balance("a", tier="core")).remaining == 49
    assert (await CreditLimiter(client, TIERS).balance("a", tier="core")).remaining == 49, "the old client goes on too"


@pytest.mark.parametrize("limit_mb", [None, 64, 0])
async def test_embedded_when_it_is_started_then_it_has_a_maxmemory_which_evicts_nothing_and_outlives_a_crash(
    folder: Path, closing: AsyncExitStack, limit_mb: int | None
) -> None:
    more: dict[str, Any] = {} if limit_mb is None else {"embedded_maxmemory_mb": limit_mb}
    client = await connect(f"embedded:{folder}", **more)
    closing.push_async_callback(client.aclose)
    for _ in range(2):
        info = await client.info()
        wanted_mb = 1024 if limit_mb is None else limit_mb
        assert (info["maxmemory"], info["maxmemory_policy"]) == (wanted_mb << 20, "noeviction")
        os.kill(info["process_id"], signal.SIGKILL)
        assert await eventually(lambda: answers(client), what="the server's return")


async def answers(client: Redis) -> bool:
    try:
        return bool(await client.ping())
    except RedisError:
        return False


async def test_embedded_when_the_server_does_not_answer_then_no_second_one_is_started_on_its_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "_REPLY_TIMEOUT_S", 0.1)
    client = await connect(f"embedded:{folder}")
    server_pid = (await client.info("server"))["process_id"]
    os.kill(server_pid, signal.SIGSTOP)
    try:
        monkeypatch.setattr(embedded, "_START_TIMEOUT_S", 0.2)
        with pytest.raises(LimiterUnavailable, match="is not ready after 0 s"):
            await connect(f"embedded:{folder}")
    finally:
        monkeypatch.undo()
        os.kill(server_pid, signal.SIGCONT)
    assert (await client.info("server"))["process_id"] == server_pid
    await client.aclose()


async def test_embedded_when_many_join_and_leave_at_once_then_none_joins_a_server_that_is_stopping(
    folder: Path,
) -> None:
    async def come_and_go() -> None:
        for _ in range(5):
            client = await connect(f"embedded:{folder}")
            assert await client.ping()
            await client.aclose()

    await asyncio.gather(*(come_and_go() for _ in range(4)))


async def test_embedded_when_the_folder_has_a_long_path_then_its_socket_is_elsewhere(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 100)
    client = await connect(f"embedded:{folder}")
    path = embedded.socket_path(folder)
    assert not path.is_relative_to(folder)
    assert mode_of(path.parent) == 0o700
    await client.aclose()
    assert not server_runs(folder)


async def test_embedded_when_the_socket_is_open_then_only_this_user_may_use_it(folder: Path) -> None:
    client = await connect(f"embedded:{folder}")
    for path in (folder, embedded.socket_path(folder)):
        assert mode_of(path) == 0o700
    await client.aclose()


async def test_embedded_when_the_folder_cannot_be_made_then_it_is_a_settings_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SettingsError, match=r"data folder .* cannot be used: Not a directory"):
        await connect(f"embedded:{tmp_path / 'file' / 'data'}")


async def test_embedded_when_its_aof_is_damaged_then_the_error_shows_the_end_of_its_log(folder: Path) -> None:
    client = await connect(f"embedded:{folder}")
    await client.set("x", "1", ex=600)
    await client.aclose()
    (aof,) = (folder / "appendonlydir").glob("*.incr.aof")
    aof.write_bytes(b"garbage\r\n" + aof.read_bytes())
    with pytest.raises(LimiterUnavailable, match=r"did not start on .*: .*(?i:aof)"):
        await connect(f"embedded:{folder}")
    with suppress(FileNotFoundError):
        aof.unlink()


def test_folder_when_it_exists_and_is_open_to_others_then_it_is_closed_and_so_is_all_that_is_written(
    folder: Path,
) -> None:
    folder.mkdir()
    folder.chmod(0o755)
    lease = embedded.start_or_join(folder)
    embedded.stop_if_last(lease)
    assert folder.stat().st_mode & 0o777 == 0o700
    written = list((folder / "appendonlydir").rglob("*"))
    assert written
    assert not [path for path in (folder / "appendonlydir", *written) if path.stat().st_mode & 0o077]


def test_folder_when_it_is_shared_with_other_users_then_it_is_refused_and_stays_as_it_is(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o1777)
    with pytest.raises(SettingsError, match="open to other users, and shared"):
        embedded.start_or_join(folder)
    assert folder.stat().st_mode & 0o7777 == 0o1777


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to somebody else")
def test_folder_when_it_is_another_users_then_it_is_refused(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o755)
    os.chown(folder, 65534, 65534)
    with pytest.raises(SettingsError, match="open to other users, and not yours"):
        embedded.start_or_join(folder)
