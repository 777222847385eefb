"""A form on its way through: the model's name changes, and not one other byte, however the bytes are cut."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limiter.relay.requests.multipart_rewriter import ModelField

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
