"""A relay with few files, flooded by idle connections from its start: it serves afterwards, and SIGTERM ends it."""

import select
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest

from tests.support.cli import Relay
from tests.support.wait import wait_until

pytestmark = pytest.mark.slow
FILES = 256
FLOOD = 300
SET_APART = 96  # for Redis, backends, the log


@contextmanager
def flood(port: int) -> Iterator[None]:
    """Keep as many idle connections open as the relay takes, and open each anew that it closes."""
    over = threading.Event()

    def run() -> None:
        idle: list[socket.socket] = []
        while not over.is_set():
            closed = set(select.select(idle, [], [], 0.01)[0])
            for client in closed:
                client.close()
            idle = [client for client in idle if client not in closed]
            while len(idle) < FLOOD:
                client = socket.socket()
                client.setblocking(False)
                client.connect_ex(("127.0.0.1", port))
                idle.append(client)
        for client in idle:
            client.close()

    flooding = threading.Thread(target=run)
    flooding.start()
    try:
        yield
    finally:
        over.set()
        flooding.join()


def open_files(relay: Relay) -> int:
    return len(list(Path(f"/proc/{relay.process.pid}/fd").iterdir()))


def serves(relay: Relay) -> bool:
    request = Request(f"{relay.url}/v1/chat/completions", b'{"model": "m", "messages": []}')  # noqa: S310  our own
    request.add_header("X-Install-Id", str(uuid.uuid4()))
    request.add_header("Content-Type", "application/json")
    try:
        with urlopen(request, timeout=5) as answer:  # noqa: S310
            return bool(answer.status == 200)
    except (URLError, TimeoutError, ConnectionError):
        return False


def most_files(relay: Relay, for_s: float) -> int:
    ends_s, most = time.monotonic() + for_s, 0
    while time.monotonic() < ends_s:
        most = max(most, open_files(relay))
        time.sleep(0.01)
    return most


@pytest.fixture
def started(tmp_path: Path) -> Iterator[tuple[Relay, int]]:
    """A relay that may open few files, and its port."""
    relay = Relay(tmp_path, launcher=("sh", "-c", f'ulimit -n {FILES}; exec "$@"', "sh"))
    yield relay, int(relay.url.rpartition(":")[2])
    if relay.process.poll() is None:
        relay.stop()


def test_relay_when_it_is_flooded_from_its_start_then_files_stay_free_and_it_serves_when_the_flood_is_over(
    started: tuple[Relay, int],
) -> None:
    """Longer than the 5 s after which the first probe runs: what that reads from disk must be read by then."""
    relay, port = started
    for for_s in (7, 2):
        with flood(port):
            assert most_files(relay, for_s) <= FILES - SET_APART
        wait_until(lambda: serves(relay), within_s=5, what="service after the flood")
    assert relay.stop() == 0
    assert sum(map(len, relay.rest())) < 20_000


def test_sigterm_when_the_relay_is_flooded_then_it_ends(started: tuple[Relay, int]) -> None:
    relay, port = started
    with flood(port):
        time.sleep(1)
        assert relay.stop() == 0
