"""`limiter serve` as a new user runs it: a process on an embedded server in an empty folder."""

import json
import re
import shlex
import shutil
import signal
import socket
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from tests.support.cli import Relay, limiter
from tests.support.wait import wait_until

Answer = tuple[int, dict[str, str], dict[str, object]]


@pytest.fixture
def relays() -> Iterator[list[Relay]]:
    """Yield a list: the relays in it are stopped at the end, and the last of them stops the embedded server."""
    started: list[Relay] = []
    yield started
    for relay in started:
        if relay.process.poll() is None:
            relay.stop()


def start(relays: list[Relay], cwd: Path, *arguments: str, **settings: str) -> Relay:
    relay = Relay(cwd, *arguments, settings=settings)
    relays.append(relay)
    return relay


def ask(relay: Relay, path: str, install_id: str, document: object = None) -> Answer:
    body = None if document is None else json.dumps(document).encode()
    headers = {"X-Install-Id": install_id, "Content-Type": "application/json"}
    request = Request(relay.url + path, body, headers)  # noqa: S310  our own relay
    try:
        with urlopen(request, timeout=20) as answer:  # noqa: S310
            return answer.status, dict(answer.headers), json.load(answer)
    except HTTPError as error:
        with error:
            return error.code, dict(error.headers), json.load(error)


def chat(relay: Relay, install_id: str) -> Answer:
    return ask(
        relay, "/v1/chat/completions", install_id, {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
    )


def server_answers(path: Path) -> bool:
    try:
        with socket.socket(socket.AF_UNIX) as link:
            link.connect(str(path))
            link.sendall(b"PING\r\n")
            return link.recv(16).startswith(b"+PONG")
    except OSError:
        return False


def test_printed_curl_line_works_as_it_is(relays: list[Relay], tmp_path: Path) -> None:
    relay = start(relays, tmp_path)
    line = relay.wait_for(r"^ +(curl .*)$")[1]
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    answer = subprocess.run(shlex.split(line), capture_output=True, text=True, timeout=20, check=True)
    document = json.loads(answer.stdout)
    assert document["object"] == "chat.completion"
    assert document["choices"][0]["message"]["content"] == "Hello, relay"
    install_id = re.search(r"X-Install-Id: (\S+?)'", line)
    assert install_id
    shown = limiter("row", install_id[1], "--json", cwd=tmp_path)
    assert json.loads(shown.stdout)["row"]["lifetime_consumed"] == 1, shown.stderr


def test_printed_redis_cli_line_shows_the_row(relays: list[Relay], tmp_path: Path) -> None:
    if shutil.which("redis-cli") is None:
        pytest.skip("redis-cli is not installed (apt-get install redis-tools)")
    relay = start(relays, tmp_path)
    line = relay.wait_for(r"^ +(redis-cli .*)$")[1]
    install_id = line.rpartition(":")[2]
    assert chat(relay, install_id)[0] == 200

    def shows_the_debit() -> bool:  # the answer does not wait for the commit
        shown = subprocess.run(shlex.split(line), capture_output=True, text=True, timeout=20, check=True, cwd=tmp_path)
        return "lifetime_gemini_consumed\n1\n" in shown.stdout

    wait_until(shows_the_debit, what="the debited row")


def test_repeated_requests_end_in_a_402_after_the_quota(relays: list[Relay], tmp_path: Path) -> None:
    relay = start(relays, tmp_path, LIMITER_TIERS__CORE__LIFETIME="3", LIMITER_TIERS__CORE__GEMINI_CAP="2")
    install_id = str(uuid.uuid4())
    answers = [chat(relay, install_id) for _ in range(4)]
    assert [status for status, _, _ in answers] == [200, 200, 200, 402]
    assert [headers.get("X-Credits-Backend") for _, headers, _ in answers] == ["gemini", "gemini", "hardware", None]
    assert answers[-1][1]["x-should-retry"] == "false"
    _, _, balance = ask(relay, "/v1/credits", install_id)
    assert (balance["remaining"], balance["held"]) == (0, 0)


def test_ctrl_c_stops_everything_and_the_next_start_finds_the_rows(relays: list[Relay], tmp_path: Path) -> None:
    install_id = str(uuid.uuid4())
    first = start(relays, tmp_path)
    assert chat(first, install_id)[0] == 200
    assert first.stop(signal.SIGINT) == 0
    wait_until(lambda: not server_answers(tmp_path / "data/valkey.sock"), what="the end of the embedded server")
    ledger = json.loads((tmp_path / "data/credits.json").read_text())
    assert ledger["rows"][install_id]["lifetime_consumed"] == 1

    second = start(relays, tmp_path)
    assert ask(second, "/v1/credits", install_id)[2]["remaining"] == 49
    assert second.stop() == 0


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_ctrl_c_when_sigint_was_ignored_at_the_start_then_the_relay_runs_until_sigterm(
    relays: list[Relay], tmp_path: Path, workers: str
) -> None:
    """A shell starts a script's background jobs that way: a Ctrl-C at the terminal is not meant for them."""
    relay = Relay(tmp_path, "--workers", workers, launcher=("sh", "-c", "trap '' INT; exec \"$@\"", "sh"))
    relays.append(relay)
    relay.process.send_signal(signal.SIGINT)
    assert [chat(relay, str(uuid.uuid4()))[0] for _ in range(3)] == [200] * 3
    assert relay.process.poll() is None
    assert relay.stop() == 0


@pytest.mark.slow
def test_second_start_on_the_same_folder_joins_and_survives_the_first_ones_end(
    relays: list[Relay], tmp_path: Path
) -> None:
    install_id = str(uuid.uuid4())
    first, second = start(relays, tmp_path), start(relays, tmp_path)
    assert chat(first, install_id)[0] == chat(second, install_id)[0] == 200
    assert first.stop() == 0
    assert ask(second, "/v1/credits", install_id)[2]["remaining"] == 48
    assert second.stop() == 0
    assert not server_answers(tmp_path / "data/valkey.sock")


@pytest.mark.slow
def test_start_after_a_kill_joins_the_server_that_was_left(relays: list[Relay], tmp_path: Path) -> None:
    install_id = str(uuid.uuid4())
    first = start(relays, tmp_path)
    assert chat(first, install_id)[0] == 200
    wait_until(lambda: ask(first, "/v1/credits", install_id)[2]["held"] == 0, what="the commit")
    first.kill()
    second = start(relays, tmp_path)
    assert ask(second, "/v1/credits", install_id)[2]["remaining"] == 49
    assert second.stop() == 0
    assert not server_answers(tmp_path / "data/valkey.sock")


def test_taken_port_is_a_clear_error(relays: list[Relay], tmp_path: Path) -> None:
    relay = start(relays, tmp_path)
    port = relay.url.rpartition(":")[2]
    other = limiter("serve", "--port", port, cwd=tmp_path)
    assert other.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in other.stderr
    assert chat(relay, str(uuid.uuid4()))[0] == 200


def test_host_that_does_not_resolve_is_a_clear_error(tmp_path: Path) -> None:
    answer = limiter("serve", "--port", "0", "--host", "256.1.1.1", cwd=tmp_path)
    assert answer.returncode == 1
    assert re.search(r"cannot listen on 256\.1\.1\.1:0: \w[\w ]+; give another --host", answer.stderr)
    assert "Unknown error" not in answer.stderr


def test_redis_that_is_unavailable_at_the_start_is_a_clear_error(tmp_path: Path) -> None:
    answer = limiter("serve", "--port", "0", "--redis", "redis://127.0.0.1:1/0", cwd=tmp_path)
    assert answer.returncode == 1
    assert "no Redis at redis://127.0.0.1:1/0" in answer.stderr
    assert len(answer.stderr.strip().splitlines()) == 1
