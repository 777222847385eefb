"""The JSON of a file: where it is broken, and what lies across the edge of a read."""

import re
from decimal import Decimal
from pathlib import Path

import pytest

from limiter import Row
from limiter.ledger.file import LedgerFile
from limiter.ledger.json_stream import READ_BYTES
from limiter.ledger.row_codec import json_bytes
from tests.support.ledger_files import cause_of, read

UPPER = "B879D5D7-BB73-4526-A28E-55A8AF93660B"


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
    '{"rows": {\n"a": {"x": NaN}}}': "line 2, column 6: row 'a': NaN is not a JSON number",
    '{"rows": {"a": {"x": Infinity}}}': "line 1, column 16: row 'a': Infinity is not a JSON number",
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
def test_row_when_its_json_cannot_be_used_then_it_alone_is_reported_with_its_text(
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
def test_file_when_it_is_a_bomb_then_it_is_refused_early(tmp_path: Path, bomb: str) -> None:
    filler = "[" if bomb.endswith("[") else '{"a":' if bomb.endswith(":") else "x"
    cause = cause_of(tmp_path / "f", bomb + filler * 1_200_000)
    assert re.search("nested more than 64|longer than 1,048,576|want an object|ends in the middle", cause), cause
