"""The persister of `limiter serve`, a process of its own: it is supervised, restarted, and ends with its parent."""

import json
import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from tests.support.cli import Relay
from tests.support.wait import wait_until

pytestmark = pytest.mark.slow

SETTINGS = {"LIMITER_PERSISTER__INTERVAL_S": "0.1", "LIMITER_PERSISTER__LEASE_S": "1"}


@pytest.fixture
def relay(tmp_path: Path) -> Iterator[Relay]:
    relay = Relay(tmp_path, settings=SETTINGS)
    yield relay
    if relay.process.poll() is None:
        relay.stop()


def get(relay: Relay, path: str) -> str:
    with urlopen(relay.url + path, timeout=20) as answer:  # noqa: S310  our own relay
        return str(answer.read().decode())


def reported(relay: Relay) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(get(relay, "/readyz"))["persister"]
    return report


def chat(relay: Relay, install_id: str) -> None:
    headers = {"X-Install-Id": install_id, "Content-Type": "application/json"}
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "Hi"}]}).encode()
    with urlopen(Request(relay.url + "/v1/chat/completions", body, headers), timeout=20) as answer:  # noqa: S310
        assert answer.status == 200


def persister_pid(relay: Relay) -> int:
    return int(reported(relay)["writer"].split(":")[1])


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def has_row(path: Path, install_id: str) -> bool:
    return path.exists() and install_id in json.loads(path.read_text())["rows"]


def test_persister_when_its_process_or_its_disk_fails_then_readiness_says_so_and_it_comes_back(
    relay: Relay, tmp_path: Path
) -> None:
    wait_until(lambda: reported(relay).get("last_good_at") is not None, within_s=30, what="the first dump")
    assert (reported(relay)["role"], reported(relay)["epoch"], reported(relay)["error"]) == ("writer", 1, None)
    assert "limiter_dump_age_seconds NaN" not in get(relay, "/metrics")
    first = persister_pid(relay)
    assert first != relay.process.pid

    os.kill(first, signal.SIGKILL)
    wait_until(lambda: "exited with code -9" in str(reported(relay)["error"]), what="the report of its end")
    wait_until(lambda: reported(relay)["epoch"] == 2, within_s=30, what="its return")
    assert persister_pid(relay) != first

    path = tmp_path / "data" / "credits.json"
    path.unlink()
    path.mkdir()
    wait_until(lambda: "Is a directory" in str(reported(relay)["error"]), within_s=30, what="the report of the error")
    path.rmdir()
    wait_until(lambda: reported(relay)["error"] is None, within_s=30, what="the next good dump")
    install_id = str(uuid.uuid4())
    chat(relay, install_id)
    assert relay.stop() == 0
    assert has_row(path, install_id)


def test_persister_when_its_relay_is_killed_then_it_dumps_once_more_and_ends(relay: Relay, tmp_path: Path) -> None:
    wait_until(lambda: reported(relay).get("last_good_at") is not None, within_s=30, what="the first dump")
    pid, install_id = persister_pid(relay), str(uuid.uuid4())
    chat(relay, install_id)
    relay.kill()
    wait_until(lambda: not is_running(pid), within_s=30, what="its end")
    assert has_row(tmp_path / "data" / "credits.json", install_id)
