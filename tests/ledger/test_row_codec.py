"""One row: what the old ledger makes of a member of its file, and the line that is written for it."""

import json
import re
import shutil
import subprocess
from decimal import Decimal
from pathlib import Path

import pytest

from limiter import LedgerFileError, Row
from limiter.ledger.row_codec import MAX_EXTRA_BYTES, line_from_row, merged_extra, row_from_member, undated_fields
from tests.support.ledger_files import NOW, NOW_MS, PERIOD, read, row

UPPER = "B879D5D7-BB73-4526-A28E-55A8AF93660B"


def test_row_when_it_has_every_member_then_it_reads_as_it_stands() -> None:
    member = {
        "install_id": "a",
        "tier_snapshot": "pro",
        "lifetime_consumed": 1,
        "lifetime_gemini_consumed": 2,
        "last_renewal_at": "2026-02-28T21:24:54.719Z",
        "anniversary_day": 31,
        "monthly_consumed": 3,
        "monthly_gemini_consumed": 4,
        "last_active_at": "2026-03-02T00:00:00.000Z",
    }
    assert row_from_member("a", member, now_ms=NOW_MS).as_dict() == member


def test_row_when_it_is_empty_then_it_is_a_core_row_that_begins_now() -> None:
    assert row_from_member("a", {}, now_ms=NOW_MS) == Row("a", "core", 0, 0, NOW, 11, 0, 0, NOW)


@pytest.mark.parametrize("falsy", [None, "", 0, Decimal("0.0"), False])
def test_row_when_its_renewal_time_is_falsy_then_it_is_migrated(falsy: object) -> None:
    member = {"last_renewal_at": falsy, "month": "2025-10", "tier_snapshot": "pro"}
    migrated = row_from_member("a", member, now_ms=NOW_MS)
    assert (migrated.last_renewal_at, migrated.anniversary_day) == ("2025-10-01T00:00:00.000Z", 1)
    assert migrated.last_active_at == migrated.last_renewal_at
    assert migrated.extra == ""  # the month is dropped


@pytest.mark.parametrize(
    ("month", "began"),
    [
        ("2025-00", "2024-12-01T00:00:00.000Z"),
        ("2025-13", "2026-01-01T00:00:00.000Z"),
        ("2025-99", "2033-03-01T00:00:00.000Z"),
        ("0099-01", "1999-01-01T00:00:00.000Z"),
        ("9998-12", "9998-12-01T00:00:00.000Z"),
        ("2025-1", NOW),
        ("May 2025", NOW),
        ("2025-01\n", NOW),
        ("٢٠٢٥-01", NOW),
        (202501, NOW),
    ],
)
def test_month_when_it_is_odd_then_it_is_read_as_javascript_reads_it(month: object, began: str) -> None:
    migrated = row_from_member("a", {"month": month}, now_ms=NOW_MS)
    assert (migrated.last_renewal_at, migrated.extra) == (began, "")


def test_month_when_the_row_has_a_renewal_time_then_it_is_an_unknown_member_and_stays() -> None:
    assert row(month="2025-10").extra == '{"month":"2025-10"}'


@pytest.mark.parametrize(
    ("given", "day"),
    [(None, 4), ("17", 4), (0, 4), (32, 4), (-1, 4), (True, 4), (Decimal("40.5"), 4), (17, 17), (3.0, 3)],
)
def test_anniversary_day_when_the_old_ledger_passes_over_it_then_it_is_inferred(given: object, day: int) -> None:
    assert row(anniversary_day=given).anniversary_day == day


@pytest.mark.parametrize(
    ("given", "count"), [(None, 0), (3.0, 3), (Decimal("3.0"), 3), (Decimal("1E+3"), 1000), (2**53 - 1, 2**53 - 1)]
)
def test_counter_when_it_is_an_integer_to_javascript_then_it_is_taken(given: object, count: int) -> None:
    assert row(monthly_consumed=given).monthly_consumed == count


@pytest.mark.parametrize(
    ("text", "stored"),
    [
        ("2026-05-11T23:02:57.123Z", "2026-05-11T23:02:57.123Z"),
        ("2026-05-11T23:02:57.123456Z", "2026-05-11T23:02:57.123Z"),
        ("2026-05-11T23:02:57.9999Z", "2026-05-11T23:02:57.999Z"),
        ("2026-05-11T23:02:57.5Z", "2026-05-11T23:02:57.500Z"),
        ("2026-05-11T23:02:57Z", "2026-05-11T23:02:57.000Z"),
        ("2026-05-11T23:02Z", "2026-05-11T23:02:00.000Z"),
        ("2026-05-11T23:02:57+02:30", "2026-05-11T20:32:57.000Z"),
        ("2026-05-11T23:02:57-02:00", "2026-05-12T01:02:57.000Z"),
        ("2026-05-11T24:00:00Z", "2026-05-12T00:00:00.000Z"),
        ("2024-02-29", "2024-02-29T00:00:00.000Z"),
        ("2026-05", "2026-05-01T00:00:00.000Z"),
        ("2026", "2026-01-01T00:00:00.000Z"),
        ("1970-01-01T00:00:00.000Z", "1970-01-01T00:00:00.000Z"),
        ("9998-12-31T23:59:59.999Z", "9998-12-31T23:59:59.999Z"),
    ],
)
def test_time_when_javascript_and_iso_8601_agree_then_it_is_stored_in_the_canonical_form(
    text: str, stored: str
) -> None:
    assert row(last_renewal_at=text, last_active_at=text).last_active_at == stored
    node = shutil.which("node")
    if node is not None:  # the old ledger's own word on it, where there is one
        script = f"process.stdout.write(new Date({json.dumps(text)}).toISOString())"
        assert subprocess.run([node, "-e", script], capture_output=True, text=True, check=True).stdout == stored


INTEGER = "want an integer from 0 to 2^53 - 1"
TIME = "want a time like 2026-05-11T23:02:57.123Z"
YEAR = "want a year from 1970 to 9998"
REJECTED: list[tuple[object, str]] = [
    (None, "it is null, want an object"),
    ([], "it is a list, want an object"),
    ("x", "it is a text, want an object"),
    (5, "it is a number, want an object"),
    (True, "it is true, want an object"),
    ({"lifetime_consumed": -1}, f"lifetime_consumed is -1, {INTEGER}"),
    ({"lifetime_consumed": Decimal("1.5")}, f"lifetime_consumed is 1.5, {INTEGER}"),
    ({"lifetime_gemini_consumed": 2**53}, f"lifetime_gemini_consumed is 9007199254740992, {INTEGER}"),
    ({"lifetime_gemini_consumed": 10**30}, f"lifetime_gemini_consumed is 1{'0' * 30}, {INTEGER}"),
    ({"monthly_consumed": "5"}, f'monthly_consumed is "5", {INTEGER}'),
    ({"monthly_consumed": Decimal("1E+999999")}, f"monthly_consumed is 1E+999999, {INTEGER}"),
    ({"monthly_consumed": Decimal("1E-999999")}, f"monthly_consumed is 1E-999999, {INTEGER}"),
    ({"monthly_gemini_consumed": True}, f"monthly_gemini_consumed is true, {INTEGER}"),
    ({"monthly_gemini_consumed": []}, f"monthly_gemini_consumed is [], {INTEGER}"),
    ({"anniversary_day": Decimal("17.5")}, "anniversary_day is 17.5, want an integer from 1 to 31"),
    ({"tier_snapshot": ""}, 'tier_snapshot is "", want 1 to 20 characters of A-Z a-z 0-9 _ -'),
    ({"tier_snapshot": "pro max"}, 'tier_snapshot is "pro max", want 1 to 20 characters of A-Z a-z 0-9 _ -'),
    ({"tier_snapshot": 1}, "tier_snapshot is 1, want 1 to 20 characters of A-Z a-z 0-9 _ -"),
    ({"last_renewal_at": "soon"}, f'last_renewal_at is "soon", {TIME}'),
    ({"last_renewal_at": 1778540577123}, f"last_renewal_at is 1778540577123, {TIME}"),
    ({"last_renewal_at": True}, f"last_renewal_at is true, {TIME}"),
    ({"last_renewal_at": []}, f"last_renewal_at is [], {TIME}"),
    ({"last_renewal_at": "2026-05-11T23:02:57.123"}, f'last_renewal_at is "2026-05-11T23:02:57.123", {TIME}'),
    ({"last_renewal_at": "2026-05-11 23:02:57Z"}, f'last_renewal_at is "2026-05-11 23:02:57Z", {TIME}'),
    ({"last_renewal_at": "2026-02-30T00:00:00.000Z"}, f'last_renewal_at is "2026-02-30T00:00:00.000Z", {TIME}'),
    ({"last_renewal_at": "2026-05-11T24:00:01Z"}, f'last_renewal_at is "2026-05-11T24:00:01Z", {TIME}'),
    ({"last_renewal_at": "2026-05-11T23:02:60Z"}, f'last_renewal_at is "2026-05-11T23:02:60Z", {TIME}'),
    ({"last_renewal_at": "2026-05-11T23:02:57+24:00"}, f'last_renewal_at is "2026-05-11T23:02:57+24:00", {TIME}'),
    ({"last_renewal_at": "1969-12-31T23:59:59.999Z"}, f'last_renewal_at is "1969-12-31T23:59:59.999Z", {YEAR}'),
    ({"last_renewal_at": "9999-01-01T00:00:00.000Z"}, f'last_renewal_at is "9999-01-01T00:00:00.000Z", {YEAR}'),
    ({"last_active_at": 5}, f"last_active_at is 5, {TIME}"),
    ({"last_active_at": "2026-13-01"}, f'last_active_at is "2026-13-01", {TIME}'),
    ({"last_renewal_at": None, "month": "9998-13"}, f'month is "9998-13", {YEAR}'),
    ({"last_renewal_at": None, "month": "0001-01"}, f'month is "0001-01", {YEAR}'),
    ({"install_id": "b"}, 'install_id is "b", want its key'),
    ({"install_id": 5}, "install_id is 5, want its key"),
    ({"note": "x" * MAX_EXTRA_BYTES}, f"its other members are {MAX_EXTRA_BYTES + 11} bytes of JSON, want at most"),
]


@pytest.mark.parametrize(("member", "cause"), REJECTED, ids=[cause for _, cause in REJECTED])
def test_row_when_it_cannot_be_taken_then_the_error_names_install_and_cause(member: object, cause: str) -> None:
    whole = PERIOD | member if isinstance(member, dict) else member
    with pytest.raises(LedgerFileError, match="^" + re.escape(f"row 'a': {cause}")):
        row_from_member("a", whole, now_ms=NOW_MS)


@pytest.mark.parametrize("key", ["", "a b", "a" * 65, "a*", "{a}", "é"])
def test_row_when_its_key_is_not_an_install_id_then_it_is_rejected(key: str) -> None:
    with pytest.raises(LedgerFileError, match="is not usable"):
        row_from_member(key, {}, now_ms=NOW_MS)


def test_row_when_its_key_is_a_uuid_in_upper_case_then_it_is_stored_in_lower_case() -> None:
    for named in (UPPER, UPPER.lower(), None):
        assert row_from_member(UPPER, PERIOD | {"install_id": named}, now_ms=NOW_MS).install_id == UPPER.lower()


def test_unknown_members_when_a_row_is_read_and_written_then_their_text_is_as_it_was(tmp_path: Path) -> None:
    others = (
        '"note":"né \\"quoted\\" 😀","price":1.10,"big":123456789012345678901234567890,"tiny":-0.000001,'
        '"deep":{"a":[1,{"b":null}],"e":[]},"held":"1 2","hold:x":true,"extra":{},"__proto__":1'
    )
    path = tmp_path / "credits.json"
    path.write_text('{"rows":{"a":{"note":0,"last_renewal_at":"2026-05-04","x":1}}}'.replace('"note":0', others))
    found = read(path)["a"]
    assert isinstance(found, Row)
    assert found.extra == "{" + others + ',"x":1}'
    assert line_from_row(found).endswith(b"," + others.encode() + b',"x":1}')
    path.write_bytes(b'{"rows":{' + line_from_row(found) + b"}}")
    assert read(path)["a"] == found


def test_undated_fields_when_a_row_has_no_period_then_they_are_those_that_now_fills() -> None:
    assert undated_fields({}) == {"last_renewal_at", "anniversary_day", "last_active_at"}
    assert undated_fields({"anniversary_day": 3, "last_active_at": NOW}) == {"last_renewal_at"}
    assert undated_fields({"month": "2025-10"}) == undated_fields(PERIOD) == undated_fields(5) == frozenset()


def test_merged_extra_when_both_have_members_then_the_given_ones_win_and_none_is_lost() -> None:
    assert merged_extra('{"a":1.10,"b":2}', '{"b":3,"c":4}') == '{"a":1.10,"b":3,"c":4}'
    assert merged_extra("", '{"a":1}') == merged_extra('{"a":1}', "") == '{"a":1}'


@pytest.mark.parametrize(
    "extra", ["[]", "{", '{"a":NaN}', '{"a":1,"a":2}', '{"monthly_consumed":1}', '{"a":"\\ud800"}']
)
def test_line_when_the_extra_was_edited_by_hand_then_the_row_is_refused_and_the_file_stays_valid(extra: str) -> None:
    broken = Row("a", "core", 0, 0, NOW, 11, 0, 0, NOW, extra=extra)
    with pytest.raises(LedgerFileError, match=r"^row 'a': "):
        line_from_row(broken)
