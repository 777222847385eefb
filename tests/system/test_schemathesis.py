"""/openapi.json as a stranger's program reads it: schemathesis makes requests of it, and judges the answers.

`LIMITER_TEST_EXAMPLES` says how many requests it makes of each operation at most; without it they are always the same.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cli import Relay, environment
from tests.support.paths import ROOT
from tests.support.relay import new_install

PROGRAM = str(Path(sys.executable).with_name("schemathesis"))
EXAMPLES = os.environ.get("LIMITER_TEST_EXAMPLES")
CONFIG = """
[checks.ignored_auth]
enabled = false  # it expects a 401 without an install id, which is a 400 here

[[operations]]
include-path = "/v1/audio/transcriptions"
checks.negative_data_rejection.enabled = false  # in a form a number is text, too
"""


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """A relay whose credits do not end, in a process of its own, on the echo."""
    relay = Relay(tmp_path, settings={"LIMITER_TIERS": '{"core": {}}', "LIMITER_RELAY__MINT_OVERALL": "0"})
    yield relay.url
    relay.stop()


def test_description_when_requests_are_made_of_it_then_every_answer_is_as_it_says(url: str, tmp_path: Path) -> None:
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    hooks = str(ROOT / "tests" / "support" / "schemathesis_hooks.py")
    options = ["-H", f"X-Install-Id: {new_install()}", "--continue-on-failure", "--request-timeout", "30"]
    options += ["-n", EXAMPLES] if EXAMPLES else ["-n", "25", "--seed", "1"]
    run = subprocess.run(
        [PROGRAM, "run", f"{url}/openapi.json", *options],
        cwd=tmp_path,
        env=environment({"SCHEMATHESIS_HOOKS": hooks}),
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
