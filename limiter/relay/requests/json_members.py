"""The few members of a JSON body that a relay must know, found without building the document. No I/O.

A document of `[[],[],…]` would take thirty times its bytes, and more than a second of the event loop.

msgspec reads what is declared here, and skips the rest in C. A body in which one of these members stands twice is
refused, as readers differ about which of them counts.
"""

import codecs
import re
from collections.abc import Iterator

import msgspec
import orjson
from msgspec import Raw

MAX_MODEL_LENGTH = 1024
_ABSENT = Raw()


class Members(msgspec.Struct, frozen=True, gc=False):
    """What is known of a body: the model, and the text of other members as it is there; empty if they are not."""

    model: str
    stream: Raw = _ABSENT
    n: Raw = _ABSENT
    best_of: Raw = _ABSENT
    max_tokens: Raw = _ABSENT
    max_completion_tokens: Raw = _ABSENT
    max_output_tokens: Raw = _ABSENT
    input: Raw = _ABSENT
    prompt: Raw = _ABSENT


class InvalidBody(ValueError):  # noqa: N818  names the thing
    """The body is not JSON, no object, or ambiguous."""


class MissingModel(InvalidBody):
    """The body names no model, by a string of an acceptable length."""


_MEMBERS = msgspec.json.Decoder(Members)
_RAW = msgspec.json.Decoder(Raw)
_STRING = msgspec.json.Decoder(str)
_QUOTED = tuple((name, b'"%b"' % name.encode()) for name in Members.__struct_fields__)
_KNOWN = frozenset(Members.__struct_fields__)
_LONGEST_KEY = 6 * max(map(len, _KNOWN)) + 2  # all of it escaped, like \u006d
_ESCAPED_LETTER = re.compile(rb"\\u00(?:5[fF]|6[1-9a-fA-F]|7[0-9aA])")  # of a name above
_MODEL = re.compile(rb'"model"[ \t\r\n]*:[ \t\r\n]*("(?:[^"\\]++|\\.)*+")', re.DOTALL)
_BLANK = re.compile(rb"[ \t\r\n]*")
_TRAILING = re.compile(r"trailing characters \(byte (\d+)\)")
_MAX_WALKED = 1000  # members of a body that is walked through
_DECODED_AT_ONCE = 1 << 16
_QUOTE, _COMMA = b'",'
_TOO_DEEP = "it is nested too deeply"


def read_members(body: bytes) -> Members:
    """Return the members of a JSON object. Raises InvalidBody, of which MissingModel is one."""
    try:
        _check_utf8(body)
        members = _MEMBERS.decode(body)
    except msgspec.ValidationError:
        if body[_end_of_blank(body, 0) :][:1] == b"{":
            raise MissingModel("it names no model") from None
        raise InvalidBody("it is no object") from None
    except RecursionError:
        raise InvalidBody(_TOO_DEEP) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidBody(str(error)) from None
    if not 0 < len(members.model) <= MAX_MODEL_LENGTH:
        raise MissingModel(f"the name of its model is empty, or longer than {MAX_MODEL_LENGTH} characters")
    if not _is_plain(body, members):
        _check_unique(body)
    return members


def with_model(body: bytes, model: str) -> bytes:
    """Return a body that names another model, wherever it does so at its top level; every other byte stays as it is.

    body: one that `read_members` accepts; other bytes may give anything. Raises InvalidBody for one that is nested too
    deeply.
    """
    name = orjson.dumps(model)
    parts: list[bytes] = []
    done = 0
    for begin, end in _models(body):
        parts += (body[done:begin], name)
        done = end
    return b"".join((*parts, body[done:]))


def _check_utf8(body: bytes) -> None:
    """Raise UnicodeDecodeError where a body is not UTF-8, without a text of it in memory."""
    if body.isascii():
        return
    decoder = codecs.getincrementaldecoder("utf-8")()
    for at in range(0, len(body), _DECODED_AT_ONCE):
        decoder.decode(body[at : at + _DECODED_AT_ONCE])
    decoder.decode(b"", final=True)


def _is_plain(body: bytes, members: Members) -> bool:
    """Return whether each known member is certain to stand there once: its name does, anywhere, and is not escaped."""
    if _has_escaped_letter(body):
        return False
    for name, quoted in _QUOTED:  # noqa: SIM110  a loop is faster
        if getattr(members, name) and body.count(quoted) != 1:
            return False
    return True


def _has_escaped_letter(body: bytes) -> bool:
    return b"\\u00" in body and _ESCAPED_LETTER.search(body) is not None


def _check_unique(body: bytes) -> None:
    seen: set[str] = set()
    for name, _begin, _after in _walk(body):
        if name in _KNOWN:
            if name in seen:
                raise InvalidBody(f"it has the member {name!r} twice")
            seen.add(name)


def _models(body: bytes) -> Iterator[tuple[int, int]]:
    """Yield where the value of each `model` at the top level begins and ends."""
    if body.count(b'"model"') == 1 and not _has_escaped_letter(body) and (match := _MODEL.search(body)):
        yield match.span(1)
        return
    for name, begin, after in _walk(body):
        if name == "model":
            yield begin, begin + len(body[begin:after].rstrip(b" \t\r\n"))


def _walk(body: bytes) -> Iterator[tuple[str, int, int]]:
    """Yield the members at the top level: name, where the value begins, and what comes after it. Raises InvalidBody.

    A name that is too long to be a known one is "".
    """
    at = _end_of_blank(body, _end_of_blank(body, 0) + 1)
    for _ in range(_MAX_WALKED):
        if body[at] != _QUOTE:
            return
        colon = _next_after(body, at)
        name = _STRING.decode(body[at:colon]) if colon - at <= _LONGEST_KEY + 8 else ""
        begin = _end_of_blank(body, colon + 1)
        after = _next_after(body, begin)
        yield name, begin, after
        if body[after] != _COMMA:
            return
        at = _end_of_blank(body, after + 1)
    raise InvalidBody(f"it has more than {_MAX_WALKED} members")


def _end_of_blank(body: bytes, at: int) -> int:
    match = _BLANK.match(body, at)
    return match.end() if match else at


def _next_after(body: bytes, begin: int) -> int:
    """Return where the first byte after a value is that is not blank: there msgspec finds that it should have ended."""
    try:
        _RAW.decode(memoryview(body)[begin:])
    except RecursionError:
        raise InvalidBody(_TOO_DEEP) from None
    except msgspec.DecodeError as error:
        if found := _TRAILING.search(str(error)):
            return begin + int(found[1]) - 1
    raise InvalidBody("it is damaged")
