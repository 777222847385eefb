"""A form on its way through: the model's name changes, and not one other byte, however the bytes are cut."""

import itertools
import random
import sys
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limiter.relay.requests.multipart_rewriter import MAX_PARTS, ModelField, TooManyParts

BOUNDARY = "b0undary"


def form(*parts: tuple[bytes, bytes], end: bytes = b"--b0undary--\r\n", preamble: bytes = b"") -> bytes:
    return preamble + b"".join(b"--b0undary\r\n%s\r\n\r\n%s\r\n" % part for part in parts) + end


MODEL = b'Content-Disposition: form-data; name="model"'
FILE = b'Content-Disposition: form-data; name="file"; filename="a.wav"\r\nContent-Type: audio/wav'
OTHER = b'Content-Disposition: form-data; name="language"'
NOISE = random.Random(7).randbytes(50_000) + b"\r\n--b0undar\r\n--b0undarX\r\n\r\n--"


def passed(body: bytes, cuts: list[int]) -> tuple[bytes, list[str]]:
    """Return the output for a form that arrives in two pieces, and the names that were seen."""
    names: list[str] = []

    def rename(name: str) -> str:
        names.append(name)
        return f"mapped-{name}"

    field = ModelField(BOUNDARY, rename)
    edges = [0, *sorted(cut % (len(body) + 1) for cut in cuts), len(body)]
    pieces = [field.feed(body[start:end]) for start, end in itertools.pairwise(edges)]
    return b"".join(pieces) + field.rest(), names


@given(cuts=st.lists(st.integers(0, 60_000), max_size=30), order=st.permutations([0, 1, 2]))
def test_form_when_it_is_cut_anywhere_then_only_the_model_changes(cuts: list[int], order: list[int]) -> None:
    def made(model: bytes) -> bytes:
        parts = [(MODEL, model), (FILE, NOISE), (OTHER, b"de")]
        return form(*(parts[number] for number in order))

    assert passed(made(b"whisper"), cuts) == (made(b"mapped-whisper"), ["whisper"])


@given(
    body=st.lists(st.sampled_from([b"\r\n--b0undary", b"--", b"\r\n", MODEL, FILE, b"x", b"\r\n\r\n"])).map(b"".join)
)
def test_bytes_when_they_are_hardly_a_form_then_they_pass_alike_in_one_piece_and_byte_by_byte(body: bytes) -> None:
    whole = passed(body, [])
    assert passed(body, list(range(len(body)))) == whole
    assert whole[0].replace(b"mapped-", b"") == body


@pytest.mark.parametrize(
    "head",
    [
        b"content-disposition: form-data; name=model",
        b'Content-Type: text/plain\r\nContent-Disposition: form-data;name="model"\r\nX: y',
        b'CONTENT-DISPOSITION: FORM-DATA; NAME="model"; x=y',
    ],
)
def test_model_when_its_head_is_written_otherwise_then_it_is_found(head: bytes) -> None:
    assert passed(form((head, b"w")), [])[1] == ["w"]


@pytest.mark.parametrize(
    ("head", "value"),
    [
        (MODEL + b'; filename="model"', b"w"),
        (b'Content-Disposition: form-data; name="models"', b"w"),
        (b'Content-Disposition: form-data; name="x"; title="; name=model"', b"w"),
        (b'X-Content-Disposition: form-data; name="model"', b"w"),
        (MODEL, b"w" * 5000),
        (MODEL, b"\xff\xfe"),
        (MODEL + b"\r\nX: " + b"x" * 10_000, b"w"),
    ],
    ids=["a file", "another name", "in a title", "another header", "too long", "no text", "a long head"],
)
def test_part_when_it_is_not_a_model_name_then_it_passes_as_it_is(head: bytes, value: bytes) -> None:
    body = form((head, value), (OTHER, b"de"))
    assert passed(body, [5, 99]) == (body, [])


def test_file_when_it_passes_then_no_more_than_a_boundary_is_held_back() -> None:
    field = ModelField(BOUNDARY, str)
    sent = field.feed(form((FILE, b""), end=b""))
    for _ in range(100):
        sent += field.feed(b"x" * 1000)
    assert len(form((FILE, b""), end=b"")) + 100_000 - len(sent) < len(BOUNDARY) + 4


def test_form_when_it_has_many_parts_then_it_passes_and_with_one_more_it_is_refused() -> None:
    parts = [(OTHER, b"de")] * (MAX_PARTS - 1)
    assert passed(form((MODEL, b"w"), *parts), [7, 777])[1] == ["w"]
    with pytest.raises(TooManyParts):
        passed(form((MODEL, b"w"), *parts, (OTHER, b"de")), [7, 777])


@pytest.mark.parametrize(
    "head",
    [
        b'Content-Disposition: form-data; name="language"\r\nContent-Disposition: form-data; name="model"',
        b'Content-Disposition: form-data;\r\n name="model"',
    ],
    ids=["two lines", "a folded line"],
)
def test_model_when_only_some_readers_see_it_then_it_is_renamed(head: bytes) -> None:
    assert passed(form((MODEL, b"a"), (head, b"b")), []) == (
        form((MODEL, b"mapped-a"), (head, b"mapped-b")),
        ["a", "b"],
    )


def steps_for(body: bytes) -> int:
    """Return how many steps of this program a body takes that arrives at once: calls and the lines between them."""
    steps = 0

    def count(_frame: FrameType, _kind: str, _argument: Any) -> Any:
        nonlocal steps
        steps += 1
        return count

    field = ModelField(BOUNDARY, str)
    before = sys.gettrace()
    sys.settrace(count)
    try:
        for begin in range(0, len(body), 1 << 16):
            field.feed(body[begin : begin + (1 << 16)])
    except TooManyParts:
        pass
    finally:
        sys.settrace(before)
    return steps


def test_form_when_it_is_all_parts_then_it_takes_no_more_steps_than_an_honest_one_of_its_size() -> None:
    tiny = b"\r\n--b0undary\r\n\r\n\r\n"
    honest = steps_for(form((MODEL, b"w"), *[(OTHER, b"de")] * 50, (FILE, b"z" * (4 << 20))))
    assert steps_for(tiny * (4 * (1 << 20) // len(tiny))) < 5 * honest
    assert steps_for(tiny * ((1 << 20) // len(tiny))) == steps_for(tiny * (4 * (1 << 20) // len(tiny)))


def test_form_when_it_is_fed_then_each_byte_is_copied_a_few_times_only() -> None:
    copied = 0

    class Counted(bytes):
        """Bytes that count what is cut out of them."""

        def __getitem__(self, key: Any) -> Any:
            nonlocal copied
            cut = bytes(self)[key]
            if isinstance(key, slice):
                copied += len(cut)
                return Counted(cut)
            return cut

        def __add__(self, other: Any) -> "Counted":
            return Counted(bytes(self) + bytes(other))

    field = ModelField(BOUNDARY, str)
    field._held = Counted(field._held)
    piece = form(*[(OTHER, b"x" * 20)] * (MAX_PARTS - 1), (FILE, b"z" * 50_000), end=b"")
    field.feed(piece)
    assert copied < 4 * len(piece)
