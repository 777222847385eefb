"""What the README says in tables must be so."""

import re
from pathlib import Path
from typing import get_args

import pytest
from prometheus_client.parser import text_string_to_metric_families

from limiter.config.loader import load_settings
from limiter.config.settings import DEFAULT_TIERS
from limiter.credits.models import Reason, Status
from limiter.relay.telemetry.metrics import FAILED, GAVE_UP, Answered, Metrics, SettlementKind
from limiter.relay.upstream.circuit_breaker import State as BreakerState
from limiter.relay.upstream.response import Outcome
from tests.support.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


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


def test_metrics_table_names_every_metric_with_its_labels() -> None:
    told = {words(row[0])[0]: set(words(row[1])) for row in table("metric")}
    assert told == {**exposed(), "limiter_process_*": set()}


def exposed() -> dict[str, set[str]]:
    """All metrics but those of the process, each used once, as a scrape shows them."""
    metrics = Metrics(tiers=["core"], routes=["/"])
    metrics.answered(Answered("GET", "/", 200, 0.1, 0.1))
    metrics.decided("ALLOWED", None, "core")
    metrics.settled("commit", "COMMITTED", backend="gemini", credits_=1)
    metrics.backend_called("gemini", "served")
    metrics.watch_breaker("gemini", lambda: "open")
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        if not family.name.startswith("limiter_process_"):
            name = f"{family.name}_total" if family.type == "counter" else family.name
            labels[name] = {label for sample in family.samples for label in sample.labels} - {"le"}
    return labels


def test_metrics_table_names_every_outcome_of_a_call_and_every_kind_of_settlement() -> None:
    told = {words(row[0])[0]: set(words(row[2])) for row in table("metric")}
    assert told["limiter_backend_calls_total"] == set(get_args(Outcome))
    assert told["limiter_settlements_total"] == {*get_args(SettlementKind), FAILED, GAVE_UP}
    assert told["limiter_breaker_state"] == set(get_args(BreakerState))


def test_readme_shows_the_two_commands() -> None:
    assert "make run" in README
    assert "make test" in README
