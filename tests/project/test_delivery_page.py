"""The tables of docs/reference/delivery.md: each line of them is what the relay does."""

import re

import pytest

from limiter.config.settings import METERED_PATHS
from limiter.relay.upstream.first_event import FirstEvent, Verdict, is_error_document
from tests.support.paths import ROOT

_PAGE = (ROOT / "docs/reference/delivery.md").read_text()
_STREAMS, _WHOLE = _PAGE.split("\n## Whole answers\n")
EVENTS = re.findall(r"^\| `(.*?)` \| (nothing|carries|error) \|$", _STREAMS, re.MULTILINE)
BODIES = re.findall(r"^\| (?:`.*?`|every route) \| `(.*?)` \| (carries|error) \|$", _WHOLE, re.MULTILINE)


@pytest.mark.parametrize(("event", "verdict"), EVENTS)
def test_event_when_it_is_in_a_table_then_its_verdict_is_the_one_there(event: str, verdict: str) -> None:
    first = FirstEvent(is_sse=True)
    assert first.feed(f"{event}\n\n".encode()) == verdict
    assert first.end() == verdict


@pytest.mark.parametrize(("body", "verdict"), BODIES)
def test_body_when_it_is_in_the_table_then_its_verdict_is_the_one_there(body: str, verdict: str) -> None:
    assert is_error_document(body.encode()) is (verdict == "error")


def test_tables_when_they_are_read_then_each_route_has_what_carries_and_what_is_an_error() -> None:
    for path in METERED_PATHS:
        assert re.search(rf"^\| `{path}` \| .* \| carries \|$", _WHOLE, re.MULTILINE), path
    sections = {part.split("\n")[0].strip("`"): part for part in _STREAMS.split("\n### ")}
    for path in [path for path in METERED_PATHS if path != "/v1/embeddings"]:
        verdicts = re.findall(r"\| (nothing|carries|error) \|$", sections[path], re.MULTILINE)
        assert set(verdicts) == set(Verdict), path
