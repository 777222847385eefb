"""The ten fundamental tests stay short, complete, and shown in the tutorial."""

import ast
import re
from itertools import pairwise

import pytest

from limiter import CreditLimiter
from tests.support.paths import ROOT

MAX_LINES = 12
SOURCE = ROOT / "tests/fundamentals/test_fundamentals.py"
TESTS = [node for node in ast.parse(SOURCE.read_text()).body if isinstance(node, ast.AsyncFunctionDef)]
VERBS = ("hold", "reserve", "commit", "release", "debit", "balance", "row")


@pytest.mark.parametrize("test", TESTS, ids=lambda test: test.name)
def test_fundamental_when_counted_then_it_has_twelve_lines_at_most(test: ast.AsyncFunctionDef) -> None:
    assert test.end_lineno is not None
    assert test.end_lineno - test.lineno + 1 <= MAX_LINES


def test_fundamentals_when_listed_then_they_are_the_verbs_the_refusals_and_an_import() -> None:
    others = ("refusal_that_lasts", "refusal_that_passes", "import")
    assert [test.name for test in TESTS] == [f"test_{name}" for name in (*VERBS, *others)]
    assert all(callable(getattr(CreditLimiter, verb)) for verb in VERBS)


def test_tutorial_when_read_then_it_shows_each_of_them_in_its_order() -> None:
    page = (ROOT / "docs/tutorial/library.md").read_text(encoding="utf-8")
    shown = re.findall(r"literalinclude\} ../../tests/fundamentals/test_fundamentals.py\n:pyobject: (\w+)", page)
    assert set(shown) == {test.name for test in TESTS}
    places = [[test.name for test in TESTS].index(name) for name in shown]
    assert all(first < second for first, second in pairwise(places))
