"""Puts another name of the model into a JSON body; every other byte stays as it is.

Read and written anew, a body would lose the digits of large numbers and all but the last of repeated members. Pure.
"""

import json
import re
from collections.abc import Iterator

import orjson

_BLANK = re.compile(r"[ \t\n\r]*")
_PIECE = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)
_MAX_BRACKETS = 100_000  # of a value that is nested too deeply for the quick way
_VALUES = json.JSONDecoder(parse_int=len, parse_float=len)  # of a number only its end is wanted


def with_model(body: bytes, model: str) -> bytes:
    """Return a body that names another model, wherever it does so at its top level.

    body: a JSON object; what is none may give any bytes. Raises RecursionError for one that is nested too deeply.
    """
    name = orjson.dumps(model)
    text = body.decode("latin-1")  # a character for each byte, so that its places are the body's
    parts: list[bytes] = []
    done = 0
    for begin, end in _models(text):
        parts += (body[done:begin], name)
        done = end
    return b"".join((*parts, body[done:]))


def _models(text: str) -> Iterator[tuple[int, int]]:
    """Yield where the value of each `model` at the top level begins and ends."""
    at = _skip(text, _skip(text, 0) + 1)
    while text[at] == '"':
        key, at = _VALUES.raw_decode(text, at)
        begin = _skip(text, _skip(text, at) + 1)
        end = _end_of(text, begin)
        if key == "model":
            yield begin, end
        at = _skip(text, end)
        if text[at] != ",":
            return
        at = _skip(text, at + 1)


def _skip(text: str, at: int) -> int:
    match = _BLANK.match(text, at)
    return match.end() if match else at


def _end_of(text: str, begin: int) -> int:
    """Return where a value ends."""
    try:
        return _VALUES.raw_decode(text, begin)[1]
    except RecursionError:
        depth = 0
        for count, piece in enumerate(_PIECE.finditer(text, begin)):
            if count > _MAX_BRACKETS:
                raise
            depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(piece[0], 0)
            if not depth:
                return piece.end()
        raise
