"""Where Node is installed, a loader by the old ledger's rules reads what we write, and reads what it would as we do."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from limiter import CreditLimiter
from limiter.backup.dump import dump
from tests.support.imports import many, member, run_import
from tests.support.vectors import Vectors

LOADER = Path(__file__).with_name("old_ledger.mjs")
NODE = shutil.which("node")
NOW = "2026-05-11T23:02:57.123Z"  # the clock's

pytestmark = pytest.mark.skipif(NODE is None, reason="Node is not installed (Debian: nodejs)")


def loaded(path: Path, now: str = NOW) -> dict[str, dict[str, Any]]:
    ran = subprocess.run([str(NODE), str(LOADER), str(path), now], capture_output=True, text=True, check=True)
    rows: dict[str, dict[str, Any]] = json.loads(ran.stdout)
    return rows


async def test_dumped_file_when_the_old_rules_load_it_then_the_rows_are_those_of_redis(
    limiter: CreditLimiter, redis: Redis, tmp_path: Path
) -> None:
    given = tmp_path / "given.json"
    odd = {
        "o-1": member(note="é 😀", price=1.25),
        "o-2": {"month": "2025-13"},
        "o-3": {},
        "o-4": member(month="2025-10"),
    }
    given.write_text(json.dumps({"rows": many(250) | odd, "other": [1]}))
    await run_import(limiter, given)
    dumped = tmp_path / "dumped.json"
    await dump(limiter.session, dumped)
    rows = loaded(dumped, now="never")
    assert len(rows) == 254
    for install_id, row in rows.items():
        stored = await limiter.row(install_id)
        assert stored
        assert row == stored.as_dict()
    assert await redis.dbsize() >= 254


@pytest.mark.slow
def test_recorded_ledgers_when_the_loader_loads_them_then_it_does_as_the_old_one_did(
    vectors: Vectors, tmp_path: Path
) -> None:
    """Or the test above would show nothing."""
    path = tmp_path / "credits.json"
    for entry in vectors["migrations"][:25]:
        path.write_text(json.dumps(entry["ledger"]))
        assert loaded(path, now=entry["start"]) == entry["loaded"]
