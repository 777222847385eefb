"""Processes for the tests to meet: LiteLLM's proxy, which this project did not write, and the tests' own backend."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from tests.support.cli import environment
from tests.support.paths import ROOT
from tests.support.redis_servers import free_port
from tests.support.wait import wait_until

_LITELLM = ROOT / ".cache/litellm/bin"
LITELLM_KEY = "sk-litellm-of-the-operator"


@contextmanager
def backend_process() -> Iterator[str]:
    """Run the tests' own backend in a process of its own; gives its base URL."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.support.openai_backend", "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(),
    ) as process:
        assert process.stdout
        port = process.stdout.readline().strip()
        try:
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()


@contextmanager
def litellm_process(folder: Path) -> Iterator[str]:
    """Run LiteLLM's proxy; gives its base URL. Skips the test where it is not installed."""
    if not (_LITELLM.parent / ".filled").exists():
        pytest.skip("LiteLLM is not installed: `make peers` does it, with a registry at hand")
    port = free_port()
    log = folder / "litellm.log"
    with backend_process() as scribe_url, log.open("w") as output:
        settings = {
            "LITELLM_MASTER_KEY": LITELLM_KEY,
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else it asks the Internet for prices
            "SCRIBE_URL": scribe_url,
        }
        process = subprocess.Popen(
            [
                *(_LITELLM / "litellm", "--config", ROOT / "tests/support/sdk/litellm.yaml"),
                *("--host", "127.0.0.1", "--port", str(port), "--telemetry", "False"),
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=environment(settings),
        )
        try:
            wait_until(lambda: _answers(process, port, log), within_s=240, what="the start of LiteLLM")
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(30)


def _answers(process: "subprocess.Popen[bytes]", port: int, log: Path) -> bool:
    assert process.poll() is None, log.read_text()[-3000:]
    try:
        with urlopen(f"http://127.0.0.1:{port}/health/liveliness", timeout=5):
            return True
    except (URLError, TimeoutError):
        return False
