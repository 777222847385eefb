"""What the beginning of a stream says: whether it carries something yet, which a credit is for, or is an error.

It reads and decides; nothing is changed, kept back or debited here. docs/reference/delivery.md has the same as tables.
"""

from collections.abc import Mapping
from enum import StrEnum

import orjson

_MAX_EVENT_BYTES = 64 << 10
_EMPTY: tuple[object, ...] = (None, "", [], {}, False)
_NOTHING_YET = frozenset(
    {
        "ping",
        "response.created",
        "response.in_progress",
        "response.queued",
        "response.output_item.added",
        "response.content_part.added",
        "response.reasoning_summary_part.added",
        "keepalive",
    }
)
_ERRORS = frozenset({"error", "response.failed"})
_DONE = b"[DONE]"


class Verdict(StrEnum):
    """What a stream has said so far."""

    NOTHING = "nothing"  # comments, pings, roles, empty deltas
    CARRIES = "carries"
    ERROR = "error"


class FirstEvent:
    """Reads a stream until its first event that carries something, or is an error.

    is_sse: whether it is a stream of server-sent events; of any other kind the first byte that is not blank carries.
    """

    __slots__ = ("_data", "_event", "_is_sse", "_line", "_size", "_was_cr", "verdict")

    def __init__(self, *, is_sse: bool) -> None:
        self._is_sse = is_sse
        self._line = b""
        self._data: list[bytes] = []
        self._event = ""
        self._size = 0
        self._was_cr = False
        self.verdict = Verdict.NOTHING

    def feed(self, data: bytes) -> Verdict:
        """Read on. After the first verdict but NOTHING it does not change."""
        if self.verdict is Verdict.NOTHING:
            if self._is_sse:
                self._read_lines(data)
            elif data.strip():
                self.verdict = Verdict.CARRIES
        return self.verdict

    def end(self) -> Verdict:
        """Read the end of the stream: an event that no blank line ended counts, as some backends omit it."""
        if self.verdict is Verdict.NOTHING and self._is_sse:
            if self._line:
                self._read_line(self._line)
            self._dispatch()
        return self.verdict

    def _read_lines(self, data: bytes) -> None:
        if self._was_cr and data.startswith(b"\n"):
            data = data[1:]  # the second half of a line's end
        self._was_cr = data.endswith(b"\r")
        *lines, self._line = (self._line + data).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        for line in lines:
            self._read_line(line)
            if self.verdict is not Verdict.NOTHING:
                return
        if self._size + len(self._line) > _MAX_EVENT_BYTES and not self._line.startswith(b":"):
            self.verdict = Verdict.CARRIES  # no ping is so long, nor an error

    def _read_line(self, line: bytes) -> None:
        if not line:
            self._dispatch()
            return
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
            self._size += len(value)
        elif name == b"event":
            self._event = value.decode(errors="replace")

    def _dispatch(self) -> None:
        data, event = b"\n".join(self._data), self._event
        self._data, self._event, self._size = [], "", 0
        if data or event:
            self.verdict = verdict_of(event, data)


def verdict_of(event: str, data: bytes) -> Verdict:  # noqa: PLR0911  a table of cases
    """Return what one server-sent event says. event: its name, or ""."""
    if event in _ERRORS:
        return Verdict.ERROR
    text = data.strip()
    if not text or text == _DONE or event in _NOTHING_YET:
        return Verdict.NOTHING
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError:
        return Verdict.CARRIES  # a form of its own: it says something
    if not isinstance(document, dict):
        return Verdict.NOTHING if document in _EMPTY else Verdict.CARRIES
    kind = document.get("type")
    if kind in _ERRORS or document.get("error"):
        return Verdict.ERROR
    if isinstance(kind, str):
        return Verdict.CARRIES if _typed(kind, document) else Verdict.NOTHING
    choices = document.get("choices")
    if isinstance(choices, list):
        carries = any(_choice(choice) for choice in choices if isinstance(choice, dict))
        return Verdict.CARRIES if carries else Verdict.NOTHING
    return Verdict.NOTHING if document in _EMPTY else Verdict.CARRIES


def is_error_document(body: bytes) -> bool:
    """Return whether a whole 2xx JSON body is an error: `error` and nothing that was asked for, or an array of such."""
    if b'"error"' not in body:
        return False
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return False
    documents = document if isinstance(document, list) else [document]
    return bool(documents) and all(isinstance(each, dict) and _is_error(each) for each in documents)


def _is_error(document: Mapping[str, object]) -> bool:
    return bool(document.get("error")) and not any(
        document.get(name) for name in ("choices", "data", "output", "text", "candidates")
    )


def _typed(kind: str, document: Mapping[str, object]) -> bool:
    """Return whether an event of OpenAI's Responses or transcriptions carries something."""
    if kind in _NOTHING_YET:
        return False
    return document.get("delta") not in _EMPTY if kind.endswith(".delta") else True


def _choice(choice: Mapping[str, object]) -> bool:
    """Return whether a choice of a chat or text completion carries something: any finish, any member but the role."""
    if choice.get("finish_reason") or choice.get("text"):
        return True
    delta = choice.get("delta") or choice.get("message")
    return isinstance(delta, dict) and any(name != "role" and value not in _EMPTY for name, value in delta.items())
