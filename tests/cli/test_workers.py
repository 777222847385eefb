"""`limiter serve --workers 2`: several processes on one port, and the supervisor over them."""

import json
import os
import re
import signal
import uuid
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest

from tests.support.cli import Relay, limiter
from tests.support.litellm import backend_process
from tests.support.wait import wait_until

pytestmark = pytest.mark.slow

QUESTION = json.dumps({"model": "m", "messages": [{"role": "user", "content": "Hi"}]}).encode()


@pytest.fixture
def relay(tmp_path: Path) -> Iterator[Relay]:
    """Two workers on an embedded server in an empty folder."""
    started = Relay(tmp_path, "--workers", "2")
    yield started
    if started.process.poll() is None:
        started.stop()


def ask(relay: Relay, install_id: str) -> int:
    headers = {"X-Install-Id": install_id, "Content-Type": "application/json"}
    with urlopen(Request(f"{relay.url}/v1/chat/completions", QUESTION, headers), timeout=20) as answer:  # noqa: S310
        status: int = answer.status
        return status


def metrics(relay: Relay) -> str:
    with urlopen(f"{relay.url}/metrics", timeout=20) as answer:  # noqa: S310
        text: str = answer.read().decode()
        return text


def workers_of(relay: Relay) -> list[int]:
    children = Path(f"/proc/{relay.process.pid}/task/{relay.process.pid}/children")
    return [int(pid) for pid in children.read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def consumed(install_id: str, cwd: Path) -> int:
    row = json.loads(limiter("row", install_id, "--json", cwd=cwd).stdout)
    count: int = row["row"]["lifetime_consumed"]
    return count


def holds(install_id: str, cwd: Path) -> int:
    shown = limiter("row", install_id, "--json", cwd=cwd)
    return len(json.loads(shown.stdout)["holds"]) if shown.returncode == 0 else 0


def test_workers_share_a_port_and_each_of_them_serves_the_metrics_of_all(relay: Relay, tmp_path: Path) -> None:
    install_id = str(uuid.uuid4())
    served: set[str] = set()

    def both_have_served() -> bool:
        ask(relay, install_id)  # a new connection each time, which the kernel assigns to one of them
        served.update(re.findall(r'limiter_requests_total\{.*"200",worker="(\d)"\}', metrics(relay)))
        return served == {"0", "1"}

    wait_until(both_have_served, what="a request at each worker")
    counts = re.findall(r"limiter_decisions_total\{.*ALLOWED.*\} (\d+)", metrics(relay))
    assert sum(map(int, counts)) == consumed(install_id, tmp_path)


def test_the_metrics_of_all_workers_are_a_page_that_prometheus_can_read(relay: Relay) -> None:
    page = metrics(relay)
    types = re.findall(r"^# TYPE (\S+) ", page, re.MULTILINE)
    assert len(types) == len(set(types)), "each family appears once"
    assert "limiter_build_info{version=" in page
    assert {f'worker="{number}"' in page for number in (0, 1)} == {True}


def test_a_killed_worker_is_replaced_and_no_credit_is_lost(relay: Relay, tmp_path: Path) -> None:
    install_id = str(uuid.uuid4())
    first = workers_of(relay)
    os.kill(first[0], signal.SIGKILL)
    wait_until(lambda: not is_alive(first[0]), what="its end")
    answered = 0
    while len([pid for pid in workers_of(relay) if pid not in first]) == 0 or answered < 4:
        assert ask(relay, install_id) == 200  # even those that the kernel had queued for the killed one
        answered += 1
        assert answered < 40, "it was not replaced"
    assert workers_of(relay)[0] == first[1]
    assert consumed(install_id, tmp_path) == answered
    assert relay.stop() == 0


def test_a_killed_supervisor_takes_its_workers_with_it(relay: Relay) -> None:
    pids = workers_of(relay)
    relay.kill()
    wait_until(lambda: not any(is_alive(pid) for pid in pids), within_s=20, what="the end of the workers")
    with pytest.raises(URLError):
        metrics(relay)


def test_one_worker_persists_and_a_stop_dumps_once_more(relay: Relay, tmp_path: Path) -> None:
    has_persister: list[bool] = []

    def both_were_seen() -> bool:
        with urlopen(f"{relay.url}/readyz", timeout=20) as answer:  # noqa: S310  our own relay
            has_persister.append("persister" in json.load(answer))
        return set(has_persister) == {True, False}

    wait_until(both_were_seen, within_s=20, what="a worker with the persister, and one without")
    install_id = str(uuid.uuid4())
    ask(relay, install_id)
    pids = workers_of(relay)
    assert relay.stop() == 0
    assert not any(is_alive(pid) for pid in pids)
    rows = json.loads((tmp_path / "data" / "credits.json").read_text())["rows"]
    assert rows[install_id]["lifetime_consumed"] == 1
    relay.wait_for("limiter: stopped")


def test_the_last_dump_has_what_another_worker_served_meanwhile(tmp_path: Path) -> None:
    def without_persister(url: str) -> HTTPConnection:
        while True:
            connection = HTTPConnection(url.removeprefix("http://"), timeout=20)
            connection.request("GET", "/readyz")
            if "persister" not in json.load(connection.getresponse()):
                return connection
            connection.close()

    install_id = str(uuid.uuid4())
    with backend_process() as backend:
        node = Relay(tmp_path, "--workers", "2", settings={"LIMITER_BACKENDS__HARDWARE__URL": backend})
        connection = without_persister(node.url)
        headers = {"X-Install-Id": install_id, "Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps({"model": "slow:3"}), headers)
        wait_until(lambda: holds(install_id, tmp_path) == 1, within_s=20, what="the hold of the request")
        node.process.send_signal(signal.SIGTERM)
        assert connection.getresponse().status == 200
        connection.close()
        assert node.process.wait(20) == 0
    rows = json.loads((tmp_path / "data" / "credits.json").read_text())["rows"]
    assert rows[install_id]["lifetime_consumed"] == 1


def test_a_port_of_another_supervisor_is_refused_and_not_shared(relay: Relay, tmp_path: Path) -> None:
    port = relay.url.rpartition(":")[2]
    result = limiter("serve", "--port", port, "--workers", "2", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "give another --host or --port" in result.stderr


def test_workers_that_cannot_start_end_the_supervisor_and_say_why_once(tmp_path: Path) -> None:
    result = limiter("serve", "--port", "0", "--workers", "2", "--redis", "redis://127.0.0.1:1/0", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.count("no Redis at") == 1
