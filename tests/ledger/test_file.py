import asyncio
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from limiter import LedgerFileError, Row
from limiter._util.fingerprint_set import FingerprintSet
from limiter._util.timestamps import ms_from_iso
from limiter.ledger.file import LedgerFile, row_from_member, undated_fields
from limiter.ledger.json_stream import READ_BYTES
from limiter.ledger.row_codec import MAX_EXTRA_BYTES, json_bytes, line_from_row, merged_extra
from limiter.ledger.trailer import Trailer, check_trailer, read_trailer
from limiter.ledger.writer import LedgerWriter
from tests.support.ledger_files import write_ledger

NOW = "2026-05-11T23:02:57.123Z"
NOW_MS = ms_from_iso(NOW)
UPPER = "B879D5D7-BB73-4526-A28E-55A8AF93660B"
PERIOD = {"last_renewal_at": "2026-05-04T21:24:54.719Z"}


def row(install_id: str = "a", **fields: Any) -> Row:
    return row_from_member(install_id, PERIOD | fields, now_ms=NOW_MS)


def read(path: Path) -> dict[str, Row | LedgerFileError]:
    with LedgerFile(path) as file:
        return dict(file.rows(now_ms=NOW_MS))


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def cause_of(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(LedgerFileError) as caught:
        read(path)
    return str(caught.value).removeprefix(f"{path} ")


# One row: what the old ledger makes of it


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
def test_row_when_its_key_is_no_install_id_then_it_is_rejected(key: str) -> None:
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
def test_line_when_somebody_edited_the_extra_then_the_row_is_refused_and_not_the_file_spoilt(extra: str) -> None:
    broken = Row("a", "core", 0, 0, NOW, 11, 0, 0, NOW, extra)
    with pytest.raises(LedgerFileError, match=r"^row 'a': "):
        line_from_row(broken)


# A whole file


def test_file_when_it_is_the_old_ledgers_then_every_row_comes_in_its_order(tmp_path: Path) -> None:
    path = tmp_path / "credits.json"
    rows = {f"i-{number}": PERIOD | {"monthly_consumed": number} for number in range(2000)}
    path.write_text(json.dumps({"rows": rows}))
    found = read(path)
    assert list(found) == list(rows)
    assert all(isinstance(each, Row) and each.monthly_consumed == index for index, each in enumerate(found.values()))


def test_file_when_it_has_other_members_then_they_are_passed_over_and_meta_is_known(tmp_path: Path) -> None:
    path = tmp_path / "credits.json"
    path.write_text('{"a": [1, {"rows": {}}], "meta": {"format": 1}, "rows": {"a": {}}, "z": null, "y": {"q": [[]]}}')
    with LedgerFile(path) as file:
        assert [install_id for install_id, _ in file.members()] == ["a"]
        assert file.meta == {"format": 1}
        assert [install_id for install_id, _ in file.members()] == ["a"]  # and again


def test_file_when_it_begins_with_a_utf_8_mark_then_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "credits.json"
    path.write_bytes(b'\xef\xbb\xbf{"rows": {"a": {}}}')
    assert list(read(path)) == ["a"]


ESCAPE_AT_THE_EDGE = '{"rows": {"a": {"x": "' + "y" * (65536 - 24) + "\\ud83d"
BROKEN_FILES = {
    "": "line 1, column 1: it is empty",
    "  \n": "line 2, column 1: the file ends in the middle: it is truncated",
    "\ufeff": "line 1, column 1: it is empty",
    "5": "line 1, column 1: it is a number, want an object with a member rows",
    "null": "line 1, column 1: it is null, want an object with a member rows",
    "[]": "line 1, column 1: it is a list, want an object with a member rows",
    "{}": "line 1, column 3: it has no member rows",
    '{"rows": null}': "line 1, column 10: rows is null, want an object",
    '{"rows": []}': "line 1, column 10: rows is a list, want an object",
    '{"rows": {},\n "rows": {}}': "line 2, column 9: the member 'rows' is there twice",
    '{"rows": {"a": {}, "a": {}}}': "line 1, column 24: the install id 'a' is there twice",
    f'{{"rows": {{\n"{UPPER}": {{}},\n"{UPPER.lower()}": {{}}}}}}': (
        f"line 3, column 40: the install id '{UPPER.lower()}' is there twice"
    ),
    '{"rows": {"a": {"x": 1, "x": 2}}}': "line 1, column 16: row 'a': the member 'x' is there twice",
    '{"rows": {"a": {}}': "line 1, column 19: the file ends in the middle: it is truncated",
    '{"rows": {\n"a": {"lifetime_con': "line 2, column 20: the file ends in the middle: it is truncated",
    '{"rows": {"a": {}}} {': "line 1, column 21: it is not JSON: something follows its end",
    '{"rows": {\n"a": {"x": NaN}}}': "line 2, column 6: row 'a': NaN is no JSON number",
    '{"rows": {"a": {"x": Infinity}}}': "line 1, column 16: row 'a': Infinity is no JSON number",
    '{"rows": {"a": {},}}': "line 1, column 19: it is not JSON: want a name in quotes",
    "{'rows': {}}": "line 1, column 2: it is not JSON: want a name in quotes",
    '{"rows": {"a": {"x": 1e99999999999999999999}}}': "line 1, column 16: row 'a' has a number beyond every range",
    '{"rows": {}, "x": "\\ud83d"}': (
        "line 1, column 19: the member 'x' has an escape that is half of a surrogate pair"
    ),
    '{"rows":{"abc"': "line 1, column 15: the file ends in the middle: it is truncated",
    '{"foo":"",\n"rows":{"abc" ': "line 2, column 15: the file ends in the middle: it is truncated",
    '{"rows": {"a": {"x": 12345': "line 1, column 27: the file ends in the middle: it is truncated",
    '{"rows": {"a": {"x": "\\u12': "line 1, column 27: the file ends in the middle: it is truncated",
    '{"rows": {"a": {"x": tru': "line 1, column 25: the file ends in the middle: it is truncated",
    '{"rows": {"a": {"x": tru}}}': "line 1, column 22: it is not JSON: Expecting value",
    '{"rows": {"a": {"x": 1' + "0" * 5000 + "}}}": "line 1, column 16: row 'a' has a number beyond every range",
    '{"rows": {"a": {"x": ' + "[" * 100_000: "line 1, column 16: row 'a' is nested more than 64 deep",
    '{"rows": {"a": {}}, "x": "\n"}': "line 1, column 27: it is not JSON: Invalid control character at",
    '{"rows": {}, "x": ' + "[" * 70 + "]" * 70 + "}": "line 1, column 19: the member 'x' is nested more than 64 deep",
}


@pytest.mark.parametrize(("content", "cause"), BROKEN_FILES.items(), ids=list(BROKEN_FILES.values()))
def test_file_when_it_is_broken_then_the_error_gives_line_column_and_cause(
    tmp_path: Path, content: str, cause: str
) -> None:
    assert cause_of(tmp_path / "credits.json", content).startswith(cause)


def test_file_when_an_escaped_pair_lies_across_two_reads_then_it_is_one_character(tmp_path: Path) -> None:
    path = tmp_path / "credits.json"
    for shift in range(12):
        path.write_text(" " * 40 + ESCAPE_AT_THE_EDGE.replace("y" * 51, "y" * shift, 1) + '\\ude00 \\\\ud83d"}}}')
        found = read(path)["a"]
        assert isinstance(found, Row)
        assert found.extra.endswith('😀 \\\\ud83d"}')


@pytest.mark.parametrize(
    ("member", "fault"),
    [
        ('{"x":"\\ud83d"}', "it has an escape that is half of a surrogate pair"),
        (
            ESCAPE_AT_THE_EDGE.removeprefix('{"rows": {"a": ') + '"}',
            "it has an escape that is half of a surrogate pair",
        ),
        ('{"x":' + "[" * 70 + "]" * 70 + "}", "it is nested more than 64 deep"),
    ],
)
def test_row_when_nobody_else_could_take_its_json_then_it_alone_is_told_with_its_text(
    tmp_path: Path, member: str, fault: str
) -> None:
    path = tmp_path / "credits.json"
    path.write_text(f'{{"rows": {{"a": {member}, "b": {{"lifetime_consumed": 1}}}}}}')
    found = read(path)
    assert str(found["a"]) == f"row 'a': {fault}"
    assert isinstance(found["b"], Row)
    with LedgerFile(path) as file:
        assert json_bytes([entry.member for entry in file.entries()][:1]).decode() == f"[{member}]"


@pytest.mark.parametrize("number", ["1.5", "1e-5", "1E+5", "-15"])
def test_file_when_a_number_lies_across_two_reads_then_it_is_read_whole(tmp_path: Path, number: str) -> None:
    path = tmp_path / "credits.json"
    for before in range(1, len(number)):
        head = '{"rows": {}, "pad": "", "meta": '
        pad = "y" * (READ_BYTES - len(head) - before)
        path.write_text(head.replace('""', f'"{pad}"') + number + "}")
        with LedgerFile(path) as file:
            assert list(file.entries()) == []
            assert file.meta == Decimal(number)


def test_file_when_it_is_a_dump_then_its_rows_are_read_at_a_look_but_for_those_at_the_edge_of_a_read(
    tmp_path: Path,
) -> None:
    path = tmp_path / "credits.json"
    line = line_from_row(row("a")).decode()
    lines = [line.replace('"a"', f'"i-{number}"') for number in range(5000)]
    lines[10] = '"x": {}'
    path.write_text('{"rows": {\n' + ",\n".join(lines) + '\n}, "meta": {}}\n')
    with LedgerFile(path) as file:
        odd = [entry.install_id for entry in file.entries() if not entry.is_regular]
    assert "x" in odd
    assert len(odd) <= 3 + path.stat().st_size // READ_BYTES


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_file_when_it_is_utf_16_then_the_error_says_so(tmp_path: Path, encoding: str) -> None:
    content = '{"rows": {"a": {}}}'.encode(encoding)
    assert cause_of(tmp_path / "f", content) == "line 1, column 1: it is UTF-16 or UTF-32, want UTF-8: save it as that"


def test_file_when_it_is_latin_1_then_the_error_gives_the_place_in_characters(tmp_path: Path) -> None:
    content = '{"rows": {\n"a": {"é": 1, "note": "'.encode() + "é".encode("latin-1") + b' x"}}}'
    cause = cause_of(tmp_path / "f", content)
    assert re.match(r"line 2, column 2[456]: it is not UTF-8", cause), cause


def test_file_when_it_is_cut_within_a_character_then_it_is_truncated(tmp_path: Path) -> None:
    content = '{"rows": {"a": {"note": "é'.encode()[:-1]
    assert cause_of(tmp_path / "f", content).endswith(": the file ends in the middle: it is truncated")


def test_file_when_the_error_is_far_in_then_the_line_is_still_right(tmp_path: Path) -> None:
    lines = [f'"i-{number}": {{"note": "é"}},' for number in range(20_000)]
    lines[17_000] = '"i": {"note": nul},'
    cause = cause_of(tmp_path / "f", '{"rows": {\n' + "\n".join(lines) + '\n"z": {}}}')
    assert cause.startswith("line 17002, column 15: it is not JSON")


@pytest.mark.parametrize("bomb", ["[", '{"a":', '{"rows":{"a":[', '{"rows":{"a":{"b":"'])
def test_file_when_it_is_a_bomb_then_it_is_given_up_early(tmp_path: Path, bomb: str) -> None:
    filler = "[" if bomb.endswith("[") else '{"a":' if bomb.endswith(":") else "x"
    cause = cause_of(tmp_path / "f", bomb + filler * 1_200_000)
    assert re.search("nested more than 64|longer than 1,048,576|want an object|ends in the middle", cause), cause


def test_file_when_it_is_a_folder_or_a_pipe_or_missing_then_the_error_says_so(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, cause in (
        (tmp_path, "Is a directory"),
        (tmp_path / "pipe", "it is no regular file"),
        (tmp_path / "none", "No such file or directory"),
        (tmp_path / "none" / "credits.json", "No such file or directory"),
    ):
        with pytest.raises(LedgerFileError, match=f"{path} cannot be read: {cause}"):
            LedgerFile(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_file_when_it_may_not_be_read_then_the_error_says_so(tmp_path: Path) -> None:
    path = tmp_path / "credits.json"
    path.write_text('{"rows": {}}')
    path.chmod(0)
    with pytest.raises(LedgerFileError, match="Permission denied"):
        LedgerFile(path)


def test_seen_ids_when_many_are_added_then_each_is_new_once() -> None:
    seen = FingerprintSet()
    assert all(seen.add(f"i-{number}") for number in range(10_000))
    assert not any(seen.add(f"i-{number}") for number in range(10_000))
    assert len(seen) == 10_000


# Writing


async def test_write_when_rows_are_given_then_the_file_is_the_described_one(tmp_path: Path) -> None:
    path = tmp_path / "credits.json"
    written = await write_ledger(path, (row(name) for name in ("a", "b", "c")), now_ms=NOW_MS, epoch=7, sequence=41)
    lines = path.read_bytes().splitlines(keepends=True)
    assert lines[0] == b'{"rows": {\n'
    assert lines[1] == (
        b'"a":{"install_id":"a","tier_snapshot":"core","lifetime_consumed":0,"lifetime_gemini_consumed":0,'
        b'"last_renewal_at":"2026-05-04T21:24:54.719Z","anniversary_day":4,"monthly_consumed":0,'
        b'"monthly_gemini_consumed":0,"last_active_at":"2026-05-04T21:24:54.719Z"},\n'
    )
    checksum = "sha256:" + hashlib.sha256(path.read_bytes()[:-88]).hexdigest()
    assert json.loads(path.read_text())["meta"] == {
        "format": 1,
        "epoch": 7,
        "sequence": 41,
        "time": NOW,
        "rows": 3,
        "broken": 0,
        "checksum": checksum,
    }
    assert written.trailer == read_trailer(path) == Trailer(7, 41, NOW, 3, 0, checksum)
    assert check_trailer(path) == written
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert files(tmp_path) == ["credits.json"]


async def test_write_when_there_are_no_rows_then_the_file_is_an_empty_ledger(tmp_path: Path) -> None:
    path = tmp_path / "credits.json"
    await write_ledger(path, [], now_ms=NOW_MS)
    assert read(path) == {}


async def test_write_when_the_old_ledger_loads_it_then_its_rows_are_there(tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    path = tmp_path / "credits.json"
    await write_ledger(path, [row("a", monthly_consumed=7, note="é 😀", price=Decimal("1.10"))], now_ms=NOW_MS)
    script = """
        let ledger = JSON.parse(await require("fs/promises").readFile(process.argv[1], "utf8")) || { rows: {} };
        if (!ledger.rows) ledger.rows = {};
        const row = ledger.rows["a"];
        console.log(JSON.stringify([new Date(row.last_renewal_at).toISOString(), row.monthly_consumed, row.note]));
    """
    command = [node, "-e", f"(async () => {{ {script} }})()", str(path)]
    told = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=True)
    assert json.loads(told.stdout) == [PERIOD["last_renewal_at"], 7, "é 😀"]


async def test_write_when_it_publishes_then_file_and_folder_are_synced_around_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real calls run; they are only noted on the way."""
    path = tmp_path / "credits.json"
    path.write_text("old")
    noted: list[str] = []
    sync, rename = os.fsync, Path.replace

    def noting_sync(descriptor: int) -> None:
        target = Path(f"/proc/self/fd/{descriptor}").readlink()
        noted.append(f"fsync {'folder' if target == tmp_path else 'temp' if target.suffix == '.tmp' else target}")
        assert (path.read_text() == "old") == (target != tmp_path)
        sync(descriptor)

    def noting_rename(source: Path, target: Path) -> Path:
        assert source.parent == tmp_path
        assert stat.S_IMODE(source.stat().st_mode) == 0o600
        noted.append(f"rename to {target.name}")
        return rename(source, target)

    monkeypatch.setattr(os, "fsync", noting_sync)
    monkeypatch.setattr(Path, "replace", noting_rename)
    await write_ledger(path, [row()], now_ms=NOW_MS)
    assert noted == ["fsync temp", "rename to credits.json", "fsync folder"]


async def test_write_when_the_rows_fail_midway_then_the_old_file_stays_and_no_temp_file(tmp_path: Path) -> None:
    path = tmp_path / "credits.json"
    path.write_text("old")

    def failing() -> Iterator[Row]:
        yield from (row(f"i-{number}") for number in range(5000))
        raise RuntimeError("the source ended")

    with pytest.raises(RuntimeError, match="the source ended"):
        await write_ledger(path, failing(), now_ms=NOW_MS)
    assert path.read_text() == "old"
    assert files(tmp_path) == ["credits.json"]


async def test_write_when_it_is_cancelled_midway_then_the_old_file_stays_and_no_temp_file(tmp_path: Path) -> None:
    path = tmp_path / "credits.json"
    path.write_text("old")

    async def cancelling() -> AsyncIterator[Row]:
        for number in range(5000):
            yield row(f"i-{number}")
        task.cancel()
        await asyncio.sleep(0)

    task = asyncio.ensure_future(write_ledger(path, cancelling(), now_ms=NOW_MS))
    with pytest.raises(asyncio.CancelledError):
        await task
    assert path.read_text() == "old"
    assert files(tmp_path) == ["credits.json"]


FILL_THE_DISK = """
import asyncio, resource, sys
from pathlib import Path
from limiter.errors import LedgerFileError
from limiter.ledger.file import row_from_member
from tests.support.ledger_files import write_ledger
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
rows = (row_from_member(f"i-{number}", {}, now_ms=0) for number in range(100_000))
try:
    asyncio.run(write_ledger(Path(sys.argv[1]), rows, now_ms=0))
except LedgerFileError as error:
    print(error)
"""


def test_write_when_the_disk_is_full_then_the_old_file_stays_and_no_temp_file(tmp_path: Path) -> None:
    path = tmp_path / "credits.json"
    path.write_text("old")
    command = [sys.executable, "-c", FILL_THE_DISK, str(path)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert told == f"{path} cannot be written: File too large; nothing was replaced\n"
    assert path.read_text() == "old"
    assert files(tmp_path) == ["credits.json"]


async def test_write_when_the_target_is_a_folder_or_its_folder_is_missing_then_the_error_says_so(
    tmp_path: Path,
) -> None:
    for path, cause in (
        (tmp_path, "Is a directory"),
        (tmp_path / "none" / "credits.json", "No such file or directory"),
    ):
        with pytest.raises(LedgerFileError, match=f"{path} cannot be written: {cause}"):
            await write_ledger(path, [row()], now_ms=NOW_MS)


async def test_write_when_the_target_is_a_link_then_what_it_points_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "credits.json").write_text("old")
    (tmp_path / "credits.json").symlink_to("real/credits.json")
    await write_ledger(tmp_path / "credits.json", [row()], now_ms=NOW_MS)
    assert (tmp_path / "credits.json").is_symlink()
    assert list(read(tmp_path / "real" / "credits.json")) == ["a"]


async def test_write_when_killed_writers_left_temp_files_then_they_are_removed_and_a_living_ones_stays(
    tmp_path: Path,
) -> None:
    dead, fresh = tmp_path / ".credits.json.dead.tmp", tmp_path / ".credits.json.new.tmp"
    for path in (dead, fresh):
        path.write_text("half")
    with LedgerWriter(tmp_path / "credits.json"):
        alive = next(tmp_path / name for name in files(tmp_path) if tmp_path / name not in (dead, fresh))
        for path in (dead, alive):
            os.utime(path, (0, 0))
        await write_ledger(tmp_path / "credits.json", [row()], now_ms=NOW_MS)
        assert files(tmp_path) == sorted([alive.name, ".credits.json.new.tmp", "credits.json"])
