"""Log events: each has a name of the table, each name of the table is used, and the document tells what to do."""

import ast
from collections.abc import Iterator
from typing import get_args

from limiter.log_events import LogEvent
from tests.support.paths import ROOT

NAMES = set(get_args(LogEvent))


def log_calls() -> Iterator[tuple[str, ast.Call]]:
    """Each call of a logger in the package, with where it stands."""
    for path in sorted((ROOT / "limiter").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in {"debug", "info", "warning", "error", "exception", "critical", "log"}
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id == "_LOG"
            ):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", node


def event_of(call: ast.Call) -> str | None:
    for keyword in call.keywords:
        if keyword.arg == "extra" and isinstance(keyword.value, ast.Call) and keyword.value.args:
            name = keyword.value.args[0]
            return name.value if isinstance(name, ast.Constant) and isinstance(name.value, str) else None
    return None


def test_log_calls_when_they_are_read_then_each_names_an_event_and_each_event_is_logged() -> None:
    used = set()
    for where, call in log_calls():
        if isinstance(call.args[0], ast.Constant) and call.args[0].value == "request":
            continue  # the access log's own line, of which there is one for each request
        name = event_of(call)
        assert name, f"{where} names no event"
        used.add(name)
    assert used == NAMES
