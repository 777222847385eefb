"""What the documents say in tables must be so."""

import re
from pathlib import Path
from typing import get_args

import pytest
from prometheus_client.parser import text_string_to_metric_families

from limiter.config.loader import load_settings
from limiter.config.settings import DEFAULT_TIERS
from limiter.credits.models import DecisionStatus, Reason, SettlementStatus
from limiter.log_events import LogEvent
from limiter.relay.handlers.openapi_schema import CODES
from limiter.relay.telemetry.metrics import FAILED, GAVE_UP, Answered, Metrics, SettlementKind
from limiter.relay.upstream.circuit_breaker import State as BreakerState
from limiter.relay.upstream.response import Outcome
from tests.support.paths import ROOT

REFERENCE = ROOT / "docs/reference"


def table(page: str, first_header: str) -> list[list[str]]:
    """The rows of a reference page's table whose first column is headed so."""
    text = (REFERENCE / page).read_text(encoding="utf-8")
    block = text.split(f"\n| {first_header} |", 1)[1].split("\n\n", 1)[0]
    rows = block.splitlines()[2:]
    return [[cell.strip() for cell in row.strip().removeprefix("|").removesuffix("|").split("|")] for row in rows]


def words(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_settings_table_names_every_setting_with_its_default_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = {words(row[0])[0]: words(row[1])[0] if words(row[1]) else "" for row in table("settings.md", "setting")}
    real = {item.name: item.value for item in load_settings()[1] if not item.name.startswith("tiers.")}
    documented = {name: value for name, value in rows.items() if name != "models" and not name.startswith("tiers.")}
    assert documented == real
    assert list(documented) == list(real)


def test_settings_table_explains_every_setting() -> None:
    obvious = {"backends.gemini.url"}
    assert {words(row[0])[0] for row in table("settings.md", "setting") if not row[2]} <= obvious


def test_settings_table_names_every_default_tier_with_its_limits() -> None:
    documented = {words(row[0])[0]: row[1] for row in table("settings.md", "setting") if "`tiers." in row[0]}
    real = {
        f"tiers.{name}": ", ".join(f"`{key} = {value}`" for key, value in limits.items())
        for name, limits in DEFAULT_TIERS.items()
    }
    assert documented == real


def test_routes_table_names_what_is_served() -> None:
    from limiter.relay.app import routes  # noqa: PLC0415  a table of the module

    documented = [words(row[0])[0] for row in table("http-api.md", "route")]
    assert documented == [f"{method} {path}" for method, path in routes()]


def test_status_table_has_only_statuses_of_decisions_and_settlements() -> None:
    documented = [words(row[0])[0] for row in table("row.md", "status")]
    assert set(documented) == {status.value for status in (*DecisionStatus, *SettlementStatus)}


def test_answers_table_names_every_reason_first() -> None:
    documented = [words(row[2])[0] for row in table("http-api.md", "answer")]
    assert documented[: len(Reason)] == [reason.value for reason in Reason]


def test_answers_tables_name_every_error_code_with_its_status() -> None:
    rows = [*table("http-api.md", "answer"), *table("http-api.md", "status")]
    documented = sorted((int(row[0][:3]), words(row[2])[0]) for row in rows)
    assert documented == sorted((status, str(code)) for status, codes in CODES.items() for code in codes)


def test_row_table_names_every_field_that_a_row_has() -> None:
    from limiter.credits.models import ROW_MEMBERS  # noqa: PLC0415  a table of the module

    documented = {field for row in table("row.md", "field") for field in words(row[0])}
    assert documented == {
        *ROW_MEMBERS,
        "held",
        "hold:<hold_id>",
        "flow",
        "run:<hold_id>",
        "left:<request>",
        "extra",
    } - {"install_id"}


def test_ledger_page_names_every_member_of_a_row() -> None:
    from limiter.credits.models import ROW_MEMBERS  # noqa: PLC0415  a table of the module

    documented = {member for row in table("ledger-format.md", "member of a row") for member in words(row[0])}
    assert documented == set(ROW_MEMBERS)


def test_metrics_table_names_every_metric_with_its_labels() -> None:
    documented = {words(row[0])[0]: set(words(row[1])) for row in table("metrics.md", "metric")}
    assert documented == {**exposed(), "limiter_process_*": set()}


def exposed() -> dict[str, set[str]]:
    """All metrics but those of the process, each used once, as a scrape shows them."""
    metrics = Metrics(tiers=["core"], routes=["/"])
    metrics.answered(Answered("GET", "/", 200, 0.1, 0.1))
    metrics.decided("ALLOWED", None, "core")
    metrics.settled("commit", "COMMITTED", backend="gemini", credits_=1)
    metrics.released("left")
    metrics.backend_called("gemini", "served")
    metrics.recorded("kept")
    metrics.over_bound("max_n")
    metrics.share_used_up("memory")
    metrics.connection_refused("all")
    metrics.watch_breaker("gemini", lambda: "open")
    metrics.watch_connections("gemini", lambda: 1)
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        if not family.name.startswith("limiter_process_"):
            name = f"{family.name}_total" if family.type == "counter" else family.name
            labels[name] = {label for sample in family.samples for label in sample.labels} - {"le"}
    return labels


def test_metrics_table_names_every_outcome_of_a_call_and_every_kind_of_settlement() -> None:
    documented = {words(row[0])[0]: set(words(row[2])) for row in table("metrics.md", "metric")}
    assert documented["limiter_backend_calls_total"] == set(get_args(Outcome))
    assert documented["limiter_settlements_total"] == {*get_args(SettlementKind), FAILED, GAVE_UP}
    assert documented["limiter_breaker_state"] == set(get_args(BreakerState))


def test_log_events_table_names_every_event() -> None:
    documented = [words(row[0])[0] for row in table("log-events.md", "event")]
    assert sorted(documented) == sorted(["request", *get_args(LogEvent)])


def test_alerts_when_they_name_a_metric_then_it_is_there() -> None:
    page = (ROOT / "docs/how-to/monitor.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\blimiter_[a-z_]+", page)) <= exposed().keys()


def test_troubleshooting_when_it_names_an_error_code_then_it_is_one() -> None:
    page = (ROOT / "docs/how-to/troubleshoot.md").read_text(encoding="utf-8")
    block = page.split("## Requests fail with 503", 1)[1].split("## Backends fail", 1)[0]
    documented = set(re.findall(r"^\| `(\w+)` \|", block, re.MULTILINE)) - {"no_relay"}  # nginx' own
    assert documented <= {str(code) for codes in CODES.values() for code in codes}
    assert {reason.value for reason in Reason} <= documented
