"""What the README says in tables must be so."""

import re
from pathlib import Path

import pytest

from limiter.model import Reason, Status
from limiter.settings import DEFAULT_TIERS, load_settings

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def table(first_header: str) -> list[list[str]]:
    """The rows of the table whose first column is headed so."""
    block = README.split(f"\n| {first_header} |", 1)[1].split("\n\n", 1)[0]
    rows = block.splitlines()[2:]
    return [[cell.strip() for cell in row.strip().removeprefix("|").removesuffix("|").split("|")] for row in rows]


def words(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_settings_table_names_every_setting_with_its_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told = {words(row[0])[0]: words(row[1])[0] if words(row[1]) else "" for row in table("setting")}
    real = {item.name: item.value for item in load_settings()[1] if not item.name.startswith("tiers.")}
    assert {name: value for name, value in told.items() if name != "models" and not name.startswith("tiers.")} == real


def test_settings_table_names_every_default_tier_with_its_limits() -> None:
    told = {words(row[0])[0]: row[1] for row in table("setting") if "`tiers." in row[0]}
    real = {
        f"tiers.{name}": ", ".join(f"`{key} = {value}`" for key, value in limits.items())
        for name, limits in DEFAULT_TIERS.items()
    }
    assert told == real


def test_routes_table_names_what_is_served() -> None:
    from limiter.relay.app import routes  # noqa: PLC0415  a table of the module

    assert [words(row[0])[0] for row in table("route")] == [f"{method} {path}" for method, path in routes()]


def test_status_table_has_only_statuses_of_decisions_and_settlements() -> None:
    told = [words(row[0])[0] for row in table("status")]
    rows_and_balances = {"KNOWN", "CREATED", "SAME", "REPLACED", "MERGED", "EXISTS"}
    assert set(told) == {status.value for status in Status} - rows_and_balances


def test_answers_table_names_every_reason() -> None:
    told = [words(row[2])[0] for row in table("answer") if len(row) > 2 and words(row[2])]
    assert told[: len(Reason)] == [reason.value for reason in Reason]


def test_readme_shows_the_two_commands() -> None:
    assert "make run" in README
    assert "make test" in README
