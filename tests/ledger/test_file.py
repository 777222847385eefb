"""A whole file: which rows come of it, and which files cannot be read at all."""

import json
import os
from pathlib import Path

import pytest

from limiter import LedgerFileError, Row
from limiter.ledger.file import LedgerFile
from limiter.ledger.json_stream import READ_BYTES
from limiter.ledger.row_codec import line_from_row
from tests.support.ledger_files import PERIOD, read, row


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


def test_file_when_it_is_a_folder_or_a_pipe_or_missing_then_the_error_says_so(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, cause in (
        (tmp_path, "Is a directory"),
        (tmp_path / "pipe", "it is not a regular file"),
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
