"""What of a stream may pass, however it is cut: nothing is lost or moved, and nothing can get into a line."""

import json
from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from limiter.relay.handlers.held_line import HeldLine

ERROR = b'data: {"error": {"message": "x"}}\n\n'
_LINES = st.sampled_from(
    [b'data: {"a": "\xc3\xbc"}', b"data: 1", b": ping", b"event: e", b"id: 7", b"", b"data", b"\xff", "ünï".encode()]
)
_ENDS = st.sampled_from([b"\n", b"\r\n", b"\r"])
_STREAMS = st.lists(st.tuples(_LINES, _ENDS)).map(lambda lines: b"".join(line + end for line, end in lines))
_CUTS = st.lists(st.integers(0, 80), max_size=8)


def parts(stream: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({min(cut, len(stream)) for cut in cuts} | {0, len(stream)})
    return [stream[begin:end] for begin, end in pairwise(places)]


def lines_of(stream: bytes) -> list[bytes]:
    return stream.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")


def events_of(stream: bytes) -> list[tuple[bytes, bytes]]:
    """Return name and data of each event, as the specification of server-sent events reads it."""
    found, name, data = [], b"", list[bytes]()
    for line in lines_of(stream)[:-1]:
        field, _, value = line.partition(b":")
        if not line:
            if data:
                found.append((name, b"\n".join(data)))
            name, data = b"", []
        elif field == b"data":
            data.append(value.removeprefix(b" "))
        elif field == b"event":
            name = value.removeprefix(b" ")
    return found


@given(_STREAMS, st.binary(max_size=12), _CUTS)
def test_stream_when_it_is_cut_anywhere_then_nothing_is_lost_or_moved(
    stream: bytes, last: bytes, cuts: list[int]
) -> None:
    lines, whole, passed = HeldLine(), stream + last, b""
    for part in parts(whole, cuts):
        out = lines.feed(part)
        passed += out
        assert whole.startswith(passed)
        assert not out or out.endswith((b"\n", b"\r"))
    assert passed + lines.rest() == whole


@given(_STREAMS, _LINES, st.integers(0, 40), _CUTS)
@example(b"event: e\n", b'data: {"a": "\xc3\xbc"}', 12, [])
@example(b"data: 1\r", b"", 0, [])
def test_stream_when_it_breaks_off_then_an_error_is_an_event_of_its_own(
    stream: bytes, last: bytes, cut: int, cuts: list[int]
) -> None:
    lines, passed = HeldLine(), b""
    for part in parts(stream + last[:cut], cuts):
        passed += lines.feed(part)
    sent = passed + lines.break_off() + ERROR
    before, error = events_of(passed + b"\n\n"), events_of(sent)[-1]
    assert json.loads(error[1])["error"]
    assert events_of(sent)[:-1] == before
    assert all(line in [*lines_of(stream), b"event: error", b""] for line in lines_of(sent[: -len(ERROR)]))
    assert lines.rest() == b""


@given(_STREAMS, _LINES, st.integers(0, 40), _CUTS)
def test_comment_when_it_follows_a_stream_then_no_event_comes_of_it(
    stream: bytes, last: bytes, cut: int, cuts: list[int]
) -> None:
    lines, passed = HeldLine(), b""
    for part in parts(stream + last[:cut], cuts):
        passed += lines.feed(part)
    passed += lines.rest()
    sent = passed + lines.comment(b"credits {}")
    assert b": credits {}" in lines_of(sent)
    assert events_of(sent) == events_of(passed)


def test_line_when_it_is_longer_than_64_kib_then_it_passes_as_it_arrives() -> None:
    lines = HeldLine()
    long = b"data: " + b"x" * (100 << 10)
    assert lines.feed(long[: 60 << 10]) == b""
    assert lines.feed(long[60 << 10 :]) == long
    assert lines.feed(b"yz") == b""
    assert lines.break_off() == b"\n\n"
