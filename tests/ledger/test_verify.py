# ruff: noqa: ASYNC240  the tests look at small files; nothing else waits for their loop
"""What `limiter verify` finds: any byte that is another one, wherever it is."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from limiter import LedgerFileError, Row
from limiter.ledger.row_codec import row_from_member
from limiter.ledger.verify import verify
from tests.support.cli import limiter
from tests.support.ledger_files import write_ledger

NOW_MS = 1_778_540_577_123
PERIOD = {"last_renewal_at": "2026-05-04T21:24:54.719Z", "lifetime_consumed": 40, "monthly_consumed": 7}


def rows() -> list[Row]:
    members = {"a": PERIOD, "b-1": PERIOD | {"note": "é 😀", "tags": [1, {"x": None}]}, "c": PERIOD}
    return [row_from_member(install_id, member, now_ms=NOW_MS) for install_id, member in members.items()]


@pytest.fixture
async def path(tmp_path: Path) -> Path:
    path = tmp_path / "credits.json"
    await write_ledger(path, rows(), now_ms=NOW_MS, epoch=3, sequence=41)
    return path


def test_verify_when_a_dump_is_whole_then_the_report_describes_it(path: Path) -> None:
    report = verify(path)
    assert (report.is_good, report.rows, report.faults, report.size_bytes) == (True, 3, (), path.stat().st_size)
    assert report.trailer
    assert (report.trailer.age_key, report.trailer.time, report.trailer.rows) == (
        (3, 41),
        "2026-05-11T23:02:57.123Z",
        3,
    )


@pytest.mark.slow
def test_verify_when_any_one_byte_is_another_then_it_is_found(path: Path) -> None:
    """Every place in the file once, each with another change."""
    content = path.read_bytes()
    damaged = path.with_name("damaged.json")
    for place, byte in enumerate(content):
        changed = bytearray(content)
        changed[place] = (byte + 1 + place * 37 % 255) % 256
        damaged.write_bytes(changed)
        report = verify(damaged)
        assert not report.is_good, f"{byte:#x} at {place} became {changed[place]:#x}: {bytes(changed)!r}"
        assert report.faults


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=100)
@given(data=st.data())
def test_verify_when_bytes_are_lost_added_or_swapped_then_it_is_found(path: Path, data: st.DataObject) -> None:
    content = path.read_bytes()
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, min(len(content), start + 40)))
    between = data.draw(st.binary(max_size=40))
    changed = content[:start] + between + content[end:]
    damaged = path.with_name("damaged.json")
    damaged.write_bytes(changed)
    assert verify(damaged).is_good == (changed == content)


@pytest.mark.slow
def test_verify_when_a_file_is_cut_anywhere_then_it_is_found(path: Path) -> None:
    content = path.read_bytes()
    damaged = path.with_name("damaged.json")
    for size in range(len(content)):
        damaged.write_bytes(content[:size])
        assert not verify(damaged).is_good, size


async def test_verify_when_the_checksum_is_right_and_a_row_or_the_count_is_wrong_then_it_is_found(path: Path) -> None:
    """As by a bug of the writer, or by an editor who can compute a checksum."""
    import hashlib  # noqa: PLC0415  only here

    for old, new, fault in (
        (b'"monthly_consumed":7', b'"monthly_consumed":-', "it is not JSON"),
        (b'"anniversary_day":4', b'"anniversary_day":"', "it is not JSON"),
        (b'"lifetime_consumed":40', b'"lifetime_consumed":-4', "lifetime_consumed is -4"),
        (b'"rows":3', b'"rows":4', "it has 3 rows, and its last line says 4"),
        (b'"c":{"install_id":"c"', b'"a":{"install_id":"a"', "the install id 'a' is there twice"),
    ):
        changed = path.read_bytes()[:-88].replace(old, new)
        assert changed != path.read_bytes()[:-88]
        damaged = path.with_name("damaged.json")
        end = b',"checksum":"sha256:%s"}}\n' % hashlib.sha256(changed).hexdigest().encode()
        damaged.write_bytes(changed + end)
        assert any(fault in each for each in verify(damaged).faults), (new, verify(damaged).faults)


def test_verify_when_the_file_is_of_the_old_ledger_then_its_rows_are_checked_and_no_checksum_is_missed(
    tmp_path: Path,
) -> None:
    path = tmp_path / "credits.json"
    path.write_text(json.dumps({"rows": {"a": PERIOD, "b": {"month": "2025-10"}}}))
    assert (verify(path).is_good, verify(path).rows, verify(path).trailer) == (True, 2, None)
    path.write_text(json.dumps({"rows": {"a": PERIOD, "b": {"lifetime_consumed": -1}}}))
    report = verify(path)
    assert (report.is_good, report.rows, report.fault_count) == (False, 1, 1)
    assert "row 'b': lifetime_consumed is -1" in report.faults[0]


def test_verify_when_a_dump_was_rewritten_by_another_program_then_it_is_found(path: Path) -> None:
    document = json.loads(path.read_text())
    document["rows"]["a"]["lifetime_consumed"] = 0
    rewritten = path.with_name("rewritten.json")
    for content in (json.dumps(document, indent=2), path.read_text().replace("\n", "\r\n")):
        rewritten.write_text(content, newline="")
        report = verify(rewritten)
        assert (report.is_good, report.trailer) == (False, None)
        assert "its checksum is not that of the file" in report.faults[0]
    del document["meta"]
    rewritten.write_text(json.dumps(document))
    assert verify(rewritten).is_good, "without a checksum, it was changed on purpose"


def test_verify_when_there_is_no_file_then_the_error_says_so(tmp_path: Path) -> None:
    with pytest.raises(LedgerFileError, match="cannot be read: No such file"):
        verify(tmp_path / "none.json")


@pytest.mark.slow
def test_verify_command_when_a_file_is_good_or_damaged_then_it_says_so_and_so_does_its_exit_code(path: Path) -> None:
    good = limiter("verify", path.name, cwd=path.parent)
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout.splitlines()[1].startswith("dumped at 2026-05-11T23:02:57.123Z, epoch 3, number 41, sha256:")
    assert good.stdout.endswith("good\n")
    content = bytearray(path.read_bytes())
    content[60] ^= 1
    path.write_bytes(content)
    damaged = limiter("verify", path.name, "--json", cwd=path.parent)
    document = json.loads(damaged.stdout)
    assert (damaged.returncode, document["good"], document["meta"]["sequence"]) == (1, False, 41)
    assert "the checksum is not that of the file" in document["faults"]
