"""The relays of others that ours is measured against, as processes: LiteLLM's proxy and Portkey's gateway.

Each is installed by its own command into a folder under .cache, with a fixed version. They do no metering, but for
LiteLLM with `budgets`, which counts what it spent in Redis.
"""

import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from tests.support.cli import environment
from tests.support.redis_servers import free_port

ROOT = Path(__file__).parent.parent
PORTKEY = "@portkey-ai/gateway@1.15.2"
_PORTKEY_FOLDER = ROOT / ".cache" / "portkey"
_LITELLM = ROOT / ".cache" / "litellm" / "bin" / "litellm"
_START_S = 240
_KEY = "sk-of-the-benchmark"


@dataclass(frozen=True, slots=True)
class Peer:
    """A relay that runs: where, by which process, and the headers that it wants."""

    url: str
    pid: int
    headers: Mapping[str, str] = field(default_factory=dict)


def install_peers() -> None:
    """Install what is not there yet. Raises CalledProcessError when it cannot be had."""
    subprocess.run(["tools/test-peers", "python3"], cwd=ROOT, check=True)  # noqa: S607  our own script
    if not (_PORTKEY_FOLDER / "node_modules").is_dir():
        command = ["npm", "install", "--prefix", str(_PORTKEY_FOLDER), "--no-audit", "--no-fund", PORTKEY]
        subprocess.run(command, check=True)  # noqa: S603  our own words


@contextmanager
def portkey(backend_url: str, folder: Path) -> Iterator[Peer]:
    """Run Portkey's gateway before a backend."""
    port = free_port()
    script = _PORTKEY_FOLDER / "node_modules/@portkey-ai/gateway/build/start-server.js"
    headers = {
        "x-portkey-provider": "openai",
        "x-portkey-custom-host": f"{backend_url}/v1",
        "Authorization": f"Bearer {_KEY}",
    }
    with _running(["node", str(script), f"--port={port}", "--headless"], folder, "portkey.log") as pid:
        peer = Peer(f"http://127.0.0.1:{port}", pid, headers)
        _wait_for(peer)
        yield peer


@contextmanager
def litellm(backend_url: str, folder: Path, *, budgets_at: str = "") -> Iterator[Peer]:
    """Run LiteLLM's proxy before a backend. budgets_at: a Redis URL, in which it counts what each provider spent."""
    port = free_port()
    config = folder / f"litellm-{port}.yaml"
    settings = _LITELLM_CONFIG.format(url=f"{backend_url}/v1")
    if budgets_at:
        at = urlsplit(budgets_at)
        settings += _LITELLM_BUDGETS.format(host=at.hostname, port=at.port)
    config.write_text(settings)
    command = [
        str(_LITELLM),
        "--config",
        str(config),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--telemetry",
        "False",
    ]
    with _running(command, folder, f"litellm-{port}.log") as pid:
        peer = Peer(f"http://127.0.0.1:{port}", pid, {"Authorization": f"Bearer {_KEY}"})
        _wait_for(peer)
        yield peer


_LITELLM_CONFIG = """
model_list:
  - model_name: m
    litellm_params: {{model: openai/m, api_base: "{url}", api_key: k, input_cost_per_token: 0.000001}}
"""
_LITELLM_BUDGETS = """
router_settings:
  redis_host: {host}
  redis_port: {port}
  provider_budget_config:
    openai: {{budget_limit: 1000000000, time_period: 1d}}
"""


@contextmanager
def _running(command: list[str], folder: Path, log: str) -> Iterator[int]:
    settings = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "LITELLM_MASTER_KEY": _KEY}
    with (folder / log).open("w") as output:
        process = subprocess.Popen(  # noqa: S603  our own words
            command, stdout=output, stderr=subprocess.STDOUT, cwd=folder, env=environment(settings)
        )
    try:
        yield process.pid
    finally:
        process.terminate()
        process.wait(30)


def _wait_for(peer: Peer) -> None:
    """Ask until it answers as it should."""
    deadline = time.monotonic() + _START_S
    body = b'{"model": "m", "messages": [{"role": "user", "content": "Hi"}]}'
    headers = {"Content-Type": "application/json", **peer.headers}
    while True:
        try:
            with urlopen(Request(f"{peer.url}/v1/chat/completions", body, headers), timeout=30):  # noqa: S310
                return
        except (URLError, OSError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
