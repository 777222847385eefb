"""What the beginning of a stream says: whether it carries something yet, which a credit is for, or is an error.

It reads and decides; nothing is changed, kept back or debited here. docs/reference/delivery.md has the same as tables.
"""

from collections.abc import Mapping
from enum import StrEnum

import orjson

_MAX_EVENT_BYTES = 64 << 10
_BOM = b"\xef\xbb\xbf"  # allowed at the beginning of an event stream
_FIELDS = (b":", b"data:", b"event:", b"id:", b"retry:")
_DONE = b"[DONE]"
_NOTHING_YET = frozenset(
    {
        "heartbeat",
        "keepalive",
        "ping",
        "response.content_part.added",
        "response.created",
        "response.in_progress",
        "response.queued",
        "response.reasoning_summary_part.added",
    }
)
_ERRORS = frozenset({"error", "response.failed"})
_ITEM_ADDED = "response.output_item.added"
_TO_BE_FILLED = frozenset({"message", "reasoning"})  # items that are added empty; others are tool calls
_TYPED = ("response.", "transcript.")  # events whose name says as much as the `type` in their data
_ENVELOPE = frozenset(
    {
        "created",
        "error",
        "id",
        "model",
        "object",
        "obfuscation",
        "provider",
        "service_tier",
        "system_fingerprint",
        "usage",
    }
)
_ASKED_FOR = ("choices", "data", "output", "text", "segments", "candidates")
_CODES = range(400, 600)


class Verdict(StrEnum):
    """What a stream has said so far."""

    NOTHING = "nothing"  # comments, pings, roles, empty deltas
    CARRIES = "carries"
    ERROR = "error"


class FirstEvent:
    """Reads a stream until its first event that carries something, or is an error.

    is_sse: whether it is read as server-sent events: so by its Content-Type, or as it begins like them.
    error: the data of the event that is an error.

    Args:
        is_sse: whether its Content-Type is that of server-sent events. Of any other stream the first line of JSON, or
            the first document, carries if it is no error; and of what is no JSON the first byte that is not blank.
        is_packed: whether it cannot be read; then its first byte carries.
    """

    __slots__ = (
        "_data",
        "_event",
        "_has_begun",
        "_is_json",
        "_is_packed",
        "_line",
        "_size",
        "_was_cr",
        "error",
        "is_sse",
        "verdict",
    )

    def __init__(self, *, is_sse: bool, is_packed: bool = False) -> None:
        self.is_sse = is_sse and not is_packed
        self._is_packed, self._is_json = is_packed, False
        self._line = b""
        self._data: list[bytes] = []
        self._event = ""
        self._size = 0
        self._was_cr = self._has_begun = False
        self.error = b""
        self.verdict = Verdict.NOTHING

    def feed(self, data: bytes) -> Verdict:
        """Read on. After the first verdict but NOTHING it does not change."""
        if self.verdict is Verdict.NOTHING and data:
            if self._is_packed:
                self.verdict = Verdict.CARRIES
            elif self.is_sse:
                self._read_lines(data)
            elif self._is_json:
                self._read_json(data)
            else:
                self._recognise(data)
        return self.verdict

    def end(self) -> Verdict:
        """Read the end of the stream: an event that no blank line ended counts, as some backends omit it."""
        if self.verdict is Verdict.NOTHING:
            if self.is_sse:
                if self._line:
                    self._read_line(self._line)
                if not _is_cut(b"\n".join(self._data)):
                    self._dispatch()
            elif self._line.strip():
                self._decide(Verdict.ERROR if is_error_document(self._line) else Verdict.CARRIES, self._line)
        return self.verdict

    def _decide(self, verdict: Verdict, data: bytes) -> None:
        self.verdict = verdict
        self._line = b""
        if verdict is Verdict.ERROR:
            self.error = data

    def _recognise(self, data: bytes) -> None:
        """Find out what a stream is whose Content-Type does not say it."""
        text = (self._line + data).removeprefix(_BOM).lstrip()
        if text.startswith(_FIELDS):
            self.is_sse, self._line = True, b""
            self._read_lines(text)
        elif text.startswith((b"{", b"[")):
            self._is_json, self._line = True, b""
            self._read_json(text)
        elif text and not any(field.startswith(text) for field in _FIELDS) and not _BOM.startswith(text):
            self._decide(Verdict.CARRIES, text)
        else:
            self._line = text

    def _read_json(self, data: bytes) -> None:
        """Read a stream of JSON up to the end of its first line, or of its first document if that has many lines."""
        self._line += data
        if len(self._line) > _MAX_EVENT_BYTES:
            self._decide(Verdict.CARRIES, b"")  # no error is so long
        elif b"\n" in data:
            for text in (self._line.partition(b"\n")[0], self._line):
                if is_error_document(text):
                    self._decide(Verdict.ERROR, text)
                    return
                if not _is_cut(text):
                    self._decide(Verdict.CARRIES, text)
                    return

    def _read_lines(self, data: bytes) -> None:
        if self._was_cr and data.startswith(b"\n"):
            data = data[1:]  # the second half of a line's end
        self._was_cr = data.endswith(b"\r")
        *lines, self._line = (self._line + data).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        for line in lines:
            self._read_line(line)
            if self.verdict is not Verdict.NOTHING:
                return
        if self._line.startswith(b":"):
            self._line = b":"  # nobody reads the rest of a comment
        elif self._size + len(self._line) > _MAX_EVENT_BYTES:
            self._decide(Verdict.CARRIES, b"")  # no ping is so long, nor an error

    def _read_line(self, line: bytes) -> None:
        if not self._has_begun:
            self._has_begun, line = True, line.removeprefix(_BOM)
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
        elif name == b"error":  # llama.cpp's server wrote errors so
            self._event = "error"
            self._data.append(value)

    def _dispatch(self) -> None:
        data, event = b"\n".join(self._data), self._event
        self._data, self._event, self._size = [], "", 0
        if data or event:
            self._decide_on(event, data)

    def _decide_on(self, event: str, data: bytes) -> None:
        verdict = verdict_of(event, data)
        if verdict is not Verdict.NOTHING:
            self._decide(verdict, data)


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
        if _is_error_list(document):
            return Verdict.ERROR
        return Verdict.NOTHING if _is_empty(document) else Verdict.CARRIES
    kind = document.get("type") or (event if event.startswith(_TYPED) else None)
    if document.get("error") or document.get("object") == "error" or kind in _ERRORS:
        return Verdict.ERROR
    choices = document.get("choices")
    if isinstance(choices, list):
        carries = any(_choice(choice) for choice in choices if isinstance(choice, dict))
    elif isinstance(kind, str):
        carries = _typed(kind, document)
    else:
        carries = any(name not in _ENVELOPE and not _is_empty(value) for name, value in document.items())
    return Verdict.CARRIES if carries else Verdict.NOTHING


def is_error_document(body: bytes) -> bool:
    """Return whether a whole 2xx JSON body is an error: `error` and nothing that was asked for, or an array of such."""
    if b'"error"' not in body:
        return False
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return False
    return _is_error_list(document if isinstance(document, list) else [document])


def error_at_end(tail: bytes) -> bytes | None:
    """Return the data of the error with which an event stream ends, but for what carries nothing, as `[DONE]`; or None.

    tail: the end of the stream, from anywhere within it.
    """
    if b"error" not in tail and b"response.failed" not in tail:
        return None
    lines = tail.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    for text in reversed(lines.split(b"\n\n")):
        event = FirstEvent(is_sse=True)
        event.feed(text.strip(b"\n") + b"\n\n")
        if event.verdict is not Verdict.NOTHING:
            return event.error if event.verdict is Verdict.ERROR else None
    return None


def status_of_error(data: bytes) -> int | None:
    """Return the HTTP status that an error names for itself in `code` or `status`, or None."""
    try:
        document = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    if isinstance(document, list):
        document = document[0] if document else None
    if not isinstance(document, dict):
        return None
    error = document.get("error")
    for each in (error, document):
        if isinstance(each, dict):
            for name in ("code", "status", "status_code"):
                code = each.get(name)
                text = str(code) if isinstance(code, int | str) else ""
                if text.isascii() and text.isdigit() and len(text) == len("400") and int(text) in _CODES:
                    return int(text)
    return None


def _is_error_list(document: object) -> bool:
    return (
        isinstance(document, list)
        and bool(document)
        and all(isinstance(each, dict) and _is_error(each) for each in document)
    )


def _is_error(document: Mapping[str, object]) -> bool:
    is_error = bool(document.get("error")) or document.get("object") == "error"
    return is_error and not any(document.get(name) for name in _ASKED_FOR)


def _is_empty(value: object) -> bool:
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def _is_cut(data: bytes) -> bool:
    """Return whether data begins as a JSON object or array and is not a whole one."""
    if not data.lstrip().startswith((b"{", b"[")):
        return False
    try:
        orjson.loads(data)
    except orjson.JSONDecodeError:
        return data.strip() != _DONE
    return False


def _typed(kind: str, document: Mapping[str, object]) -> bool:
    """Return whether an event of OpenAI's Responses or transcriptions carries something."""
    if kind in _NOTHING_YET:
        return False
    if kind == _ITEM_ADDED:
        item = document.get("item")
        return isinstance(item, dict) and item.get("type") not in _TO_BE_FILLED
    return not _is_empty(document.get("delta")) if kind.endswith(".delta") else True


def _choice(choice: Mapping[str, object]) -> bool:
    """Return whether a choice of a chat or text completion carries something: any finish, any member but the role."""
    if choice.get("finish_reason") or choice.get("text"):
        return True
    delta = choice.get("delta") or choice.get("message")
    return isinstance(delta, dict) and any(name != "role" and not _is_empty(value) for name, value in delta.items())
