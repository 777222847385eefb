"""The commands of the tutorial print what its pages show. Times, ids, ports and folders differ from run to run."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cli import Relay, environment
from tests.support.paths import ROOT

VARYING = (
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", "TIME"),
    (r"Date: .*", "Date: TIME"),
    (r"\b[0-9a-f]{32}\b", "ID"),
    (r'"created":\d+', '"created":0'),
    (r"(anniversary_day\s+)\d+", r"\1DAY"),
    (r"(flow\s+)\d+", r"\1UNTIL"),
    (r"127\.0\.0\.1:\d+", "RELAY"),
    (r"data in \S+", "data in FOLDER"),
)
OLD_ROW = {
    "lifetime_consumed": 12,
    "lifetime_gemini_consumed": 9,
    "last_renewal_at": "2026-05-04T21:24:54.719Z",
    "anniversary_day": 4,
    "monthly_consumed": 0,
    "monthly_gemini_consumed": 0,
    "last_active_at": "2026-05-10T08:15:00.000Z",
    "tier_snapshot": "core",
}
PRO_ROW = {
    "tier_snapshot": "pro",
    "lifetime_consumed": 50,
    "lifetime_gemini_consumed": 20,
    "last_renewal_at": "2026-05-31T10:00:00.000Z",
    "anniversary_day": 31,
    "monthly_consumed": 420,
    "monthly_gemini_consumed": 310,
    "last_active_at": "2026-06-09T17:40:02.250Z",
}
OLD_ROWS = {
    "5f0c1c1e-8d3a-4a53-9a0e-0d8f2f6f3c11": OLD_ROW,
    "8d6f7c5e-2b1a-4a53-9a0e-0d8f2f6f3c22": PRO_ROW,
    "b7e4c1d2-7a6f-4a53-9a0e-0d8f2f6f3c33": OLD_ROW | {"lifetime_consumed": -3},
}


def fences(page: str, language: str) -> list[str]:
    text = (ROOT / "docs/tutorial" / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def lines_of(text: str) -> list[str]:
    for pattern, word in VARYING:
        text = re.sub(pattern, word, text)
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def shell(command: str, cwd: Path, **variables: str) -> str:
    """Run a command of a page, and return all that it prints."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ran = subprocess.run(
        ["/bin/sh", "-c", command.replace(".venv/bin/limiter", "limiter")],
        cwd=cwd,
        env=environment(variables) | {"PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    return ran.stdout


def assert_shown(printed: str, shown: str) -> None:
    """Hold every line of the page against the output, which may have more, as the progress of an import."""
    lines = lines_of(printed)
    assert [line for line in lines_of(shown) if line not in lines] == [], printed


def test_first_request_when_followed_then_it_prints_what_the_page_shows(tmp_path: Path) -> None:
    if not (shutil.which("curl") and shutil.which("redis-cli")):
        pytest.skip("curl or redis-cli is not installed (apt-get install curl redis-tools)")
    make_run, ask, row, fields, balance, loop = fences("first-request.md", "sh")
    started, answer, row_shown, fields_shown, balance_shown, refusal = fences("first-request.md", "text")
    assert make_run == "make run\n"  # which is `limiter serve`
    relay = Relay(tmp_path)
    try:
        relay.wait_for("Ctrl-C stops it")
        assert_shown("".join(relay.output), started)

        def run(command: str) -> str:
            return shell(command.replace("http://127.0.0.1:8080", relay.url), tmp_path)

        assert_shown(run(ask), answer)
        assert_shown(run(row), row_shown)
        assert lines_of(run(fields)) == lines_of(fields_shown)
        assert_shown(run(balance), balance_shown)
        assert run(loop).split() == ["200"] * 49
        assert_shown(run(ask), refusal)
    finally:
        relay.stop()
    assert "5f0c1c1e-8d3a-4a53-9a0e-0d8f2f6f3c11" in (tmp_path / "data/credits.json").read_text()


@pytest.mark.slow
def test_move_from_credits_js_when_followed_then_it_prints_what_the_page_shows(tmp_path: Path) -> None:
    old = tmp_path / "old-credits.json"
    old.write_text(
        json.dumps({"rows": {install_id: {"install_id": install_id, **row} for install_id, row in OLD_ROWS.items()}})
    )
    dry_run, store, mend, row, serve = fences("from-credits-js.md", "sh")
    would_be, refused, stored, row_shown = fences("from-credits-js.md", "text")
    assert serve.startswith("limiter serve ")
    assert_shown(shell(dry_run, tmp_path), would_be)
    (tmp_path / "cut.json").write_text(old.read_text()[:300])
    cause = "the file ends in the middle: it is truncated"
    assert refused.rstrip().endswith(cause)
    assert cause in shell("limiter import cut.json", tmp_path)
    assert_shown(shell(store, tmp_path), stored)
    mended = shell(mend, tmp_path, EDITOR="sed -i s/-3/3/")
    assert lines_of(mended)[-2:] == ["rows  new  same  changed  rejected", "1     1    0     0        0"]
    assert_shown(shell(row, tmp_path), row_shown)
