"""What the beginning of a stream says, however it is cut: nothing yet, something that a credit is for, an error."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limiter.relay.upstream.first_event import (
    FirstEvent,
    Verdict,
    error_at_end,
    is_error_document,
    status_of_error,
    verdict_of,
)

NOTHING, CARRIES, ERROR = Verdict.NOTHING, Verdict.CARRIES, Verdict.ERROR


def chat(finish_reason: str | None = None, **delta: object) -> str:
    return json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]})


EVENTS = [
    (chat(role="assistant"), NOTHING),
    (chat(role="assistant", content=""), NOTHING),
    (chat(role="assistant", content=None, refusal=None), NOTHING),
    (chat(), NOTHING),
    (chat(content="Hi"), CARRIES),
    (chat(reasoning_content="Hm"), CARRIES),
    (chat(reasoning="Hm"), CARRIES),
    (chat(refusal="No"), CARRIES),
    (chat(tool_calls=[{"index": 0, "id": "a"}]), CARRIES),
    (chat(tool_calls=[]), NOTHING),
    (chat(audio={"id": "a"}), CARRIES),
    (chat("stop"), CARRIES),
    (chat("length"), CARRIES),
    (chat("content_filter"), CARRIES),
    ('{"choices": [], "usage": {"total_tokens": 3}}', NOTHING),
    ('{"choices": [], "prompt_filter_results": [1]}', NOTHING),
    ('{"choices": [{"text": ""}]}', NOTHING),
    ('{"choices": [{"text": "Hi"}]}', CARRIES),
    ('{"choices": [{"text": "", "finish_reason": "stop"}]}', CARRIES),
    ('{"type": "response.created", "response": {}}', NOTHING),
    ('{"type": "response.in_progress"}', NOTHING),
    ('{"type": "response.queued"}', NOTHING),
    ('{"type": "response.output_item.added", "item": {"type": "message"}}', NOTHING),
    ('{"type": "response.output_text.delta", "delta": "Hi"}', CARRIES),
    ('{"type": "response.output_text.delta", "delta": ""}', NOTHING),
    ('{"type": "response.reasoning_summary_text.delta", "delta": "Hm"}', CARRIES),
    ('{"type": "response.completed", "response": {}}', CARRIES),
    ('{"type": "response.incomplete", "response": {}}', CARRIES),
    ('{"type": "response.failed", "response": {"error": {"code": "x"}}}', ERROR),
    ('{"type": "error", "message": "x"}', ERROR),
    ('{"type": "transcript.text.delta", "delta": "Hi"}', CARRIES),
    ('{"type": "ping"}', NOTHING),
    ('{"error": {"message": "overloaded"}}', ERROR),
    ('{"error": "overloaded"}', ERROR),
    ('{"error": null, "choices": [{"delta": {"content": "Hi"}}]}', CARRIES),
    ("[DONE]", NOTHING),
    (" ", NOTHING),
    ("{}", NOTHING),
    ("plain words", CARRIES),
    ('{"odd": 1}', CARRIES),
]


@pytest.mark.parametrize(("data", "verdict"), EVENTS)
def test_event_when_it_is_read_then_it_says_what_the_table_says(data: str, verdict: Verdict) -> None:
    assert verdict_of("", data.encode()) is verdict


def test_event_when_its_name_says_error_then_it_is_one_whatever_its_data() -> None:
    assert verdict_of("error", b"overloaded") is ERROR
    assert verdict_of("ping", b'{"n": 1}') is NOTHING


STREAM = ": ping\r\n\r\n\n\rdata:\n\nevent: ping\ndata: {}\n\n" + f"data: {chat(role='assistant')}\r\n\r\n"


@given(st.lists(st.integers(min_value=0, max_value=400), max_size=12), st.sampled_from(EVENTS), st.sampled_from("\n\r"))
def test_stream_when_it_is_cut_anywhere_then_its_first_event_decides(
    cuts: list[int], event: tuple[str, Verdict], end: str
) -> None:
    stream = (STREAM + f"data: {event[0]}{end}{end}" + f"data: {chat(content='later')}\n\n").encode()
    first = FirstEvent(is_sse=True)
    places = sorted({min(cut, len(stream)) for cut in cuts} | {0, len(stream)})
    for begin, stop in pairwise(places):
        first.feed(stream[begin:stop])
    assert first.verdict is (CARRIES if event[1] is NOTHING else event[1])


def test_stream_when_it_ends_without_a_blank_line_then_its_last_event_counts() -> None:
    first = FirstEvent(is_sse=True)
    assert first.feed(f"data: {chat(content='Hi')}".encode()) is NOTHING
    assert first.end() is CARRIES


def test_stream_when_it_holds_only_pings_and_done_then_it_carries_nothing() -> None:
    first = FirstEvent(is_sse=True)
    for part in (b": ping\n\n", b"\n", b"data: [DONE]\n\n"):
        assert first.feed(part) is NOTHING
    assert first.end() is NOTHING


def test_stream_when_one_event_is_huge_then_it_carries_and_memory_is_bounded() -> None:
    first = FirstEvent(is_sse=True)
    assert first.feed(b'data: {"b64_json": "' + b"x" * (100 << 10)) is CARRIES


def test_stream_when_it_is_no_sse_then_its_first_byte_that_is_not_blank_carries() -> None:
    first = FirstEvent(is_sse=False)
    assert first.feed(b" \r\n\t") is NOTHING
    assert first.feed(b"\nplain") is CARRIES


@pytest.mark.parametrize("cut", range(1, 12))
def test_stream_when_its_content_type_is_another_then_it_is_read_as_what_it_begins_like(cut: int) -> None:
    for begin, verdict in [
        (b'\xef\xbb\xbf: ping\n\ndata: {"error": "x"}\n\n', ERROR),
        (b"\r\nevent: error\ndata: x\n\n", ERROR),
        (b"id: 1\n: ping\n\ndata: [DONE]\n\n", NOTHING),
        (b'{"error": "x"}\n{"a": 1}\n', ERROR),
        (b'{"a": 1}\n{"error": "x"}\n', CARRIES),
        (b'[{\n"error": {"code": 503}\n}\n]', ERROR),
        (b'{\n"choices": []\n}', CARRIES),
        (b"dated words", CARRIES),
        (b"\xef\xbb words", CARRIES),
    ]:
        first = FirstEvent(is_sse=False)
        first.feed(begin[:cut])
        first.feed(begin[cut:])
        assert first.end() is verdict
        assert first.error == b"" or verdict is ERROR


def test_stream_when_it_cannot_be_read_then_its_first_byte_carries() -> None:
    assert FirstEvent(is_sse=True, is_packed=True).feed(b"\x1f\x8b") is CARRIES


def test_comment_when_it_never_ends_then_no_memory_is_used_for_it() -> None:
    first = FirstEvent(is_sse=True)
    for _ in range(100):
        assert first.feed(b":" + b"x" * (64 << 10)) is NOTHING
    assert len(first._line) == 1
    assert first.feed(b'\n\ndata: {"error": "x"}\n\n') is ERROR
    assert first.error == b'{"error": "x"}'


@pytest.mark.parametrize("tail", [b"", b"data: [DONE]\n\n", b": ping\n\n", b'data: {"choices": []}\n\n'])
def test_end_when_it_is_an_error_then_it_is_found_before_what_carries_nothing(tail: bytes) -> None:
    content = f"data: {chat(content='error')}\n\n".encode()
    assert error_at_end(content[20:] + content + tail) is None
    assert error_at_end(content[20:] + b'event: error\ndata: {"error": "x"}\n\n' + tail) == b'{"error": "x"}'
    assert error_at_end(b'data: {"error": "x"}\r\n\r\n' + content + tail) is None


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b'{"error": {"code": 429}}', 429),
        (b'[{"error": {"code": 503, "status": "UNAVAILABLE"}}]', 503),
        (b'{"error": {"code": "400"}}', 400),
        (b'{"object": "error", "code": 404}', 404),
        (b'{"error": {"code": "overloaded"}}', None),
        (b'{"error": {"code": true}}', None),
        (b'{"error": {"code": 99999}}', None),
        (b'{"error": "x"}', None),
        (b"x", None),
        (b"[]", None),
    ],
)
def test_error_when_it_names_a_status_then_that_is_known(data: bytes, status: int | None) -> None:
    assert status_of_error(data) == status


@pytest.mark.parametrize(
    ("body", "is_error"),
    [
        (b'{"error": {"message": "x"}}', True),
        (b'[{"error": {"code": 429}}]', True),
        (b'{"error": null, "choices": []}', False),
        (b'{"error": {"message": "x"}, "choices": [{"message": {"content": "Hi"}}]}', False),
        (b'{"object": "list", "data": [{"embedding": [1]}], "error": {}}', False),
        (b'{"choices": [{"message": {"content": "\\"error\\""}}]}', False),
        (b"[]", False),
        (b'"error"', False),
        (b'{"error"', False),
    ],
)
def test_body_when_it_is_whole_then_it_is_an_error_only_if_it_holds_nothing_else(body: bytes, is_error: bool) -> None:
    assert is_error_document(body) is is_error
