"""The format of log lines: JSON for machines, columns in a terminal, and never a secret.

This is the only module that uses structlog. All others log through the standard library, so that an application that
uses this package as a library keeps its own configuration. structlog renders the columns; the JSON, a line for each
request, is rendered here at a third of its cost.
"""

import hashlib
import logging
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from datetime import UTC, datetime
from itertools import islice
from typing import Any, Literal, TextIO

import orjson
import structlog
from structlog.typing import EventDict, WrappedLogger

from limiter.log_events import event

LogFormat = Literal["auto", "json", "text"]
Line = MutableMapping[str, Any]
Clean = Callable[[Line], None]
_LOG = logging.getLogger("limiter.log")
_REQUESTS = "limiter.request"  # the logger of the access log
_HIDDEN = "***"
_SECRETS = re.compile(r"(?i:(?<=\bbearer\s))\S+|\beyJ[\w-]{8,}\.[\w-]+\.[\w-]*")  # what follows Bearer; any JWT
_MIN_SECRET = 6  # characters: masking shorter ones would hide ordinary words
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), 127)} | {ord("\n"): "\\n", ord("\t"): "\\t"}
_NAME_BYTES = 6
_EXTRAS = structlog.stdlib.ExtraAdder()
_FIRST_OWN = len(logging.makeLogRecord({}).__dict__)
_OF_EVERY_RECORD = frozenset((*logging.makeLogRecord({}).__dict__, "message", "asctime"))


def set_up_logging(
    *,
    level: str = "INFO",
    style: LogFormat = "auto",
    hide: Iterable[str] = (),
    events_per_s: int = 0,
    requests_per_s: int = 0,
    stream: TextIO | None = None,
) -> None:
    """Send all logs of this process to a stream, replacing any earlier configuration.

    Args:
        level: the lowest level that is logged.
        style: "auto" is text in a terminal, and JSON otherwise.
        hide: values that must not appear in a log, such as the operator's keys.
        events_per_s: how many lines of one event a second may have; 0 for any number.
        requests_per_s: the same for the lines of requests, for each class of status.
        stream: stderr by default.
    """
    stream = stream or sys.stderr
    is_text = style == "text" or (style == "auto" and stream.isatty())
    hidden = sorted((value for value in hide if len(value) >= _MIN_SECRET), key=len, reverse=True)
    clean = _cleaner(hidden)
    handler = _BoundedHandler(stream, events_per_s, requests_per_s)
    handler.setFormatter(_columns(clean, colors=stream.isatty()) if is_text else _JsonLines(clean, hidden))
    # No line shows these, so they are not collected for each record; see the logging HOWTO of Python.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None  # noqa: SLF001
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


def short_names(key: str = "") -> Callable[[str], str]:
    """Return a function that maps an install id to a short name, from which the id cannot be recovered.

    With the same key the names are the same everywhere; without a key each process has its own.
    """
    secret = hashlib.sha256(key.encode()).digest() if key else secrets.token_bytes(32)

    def short_name(install_id: str) -> str:
        return hashlib.blake2b(install_id.encode(), key=secret, digest_size=_NAME_BYTES).hexdigest()

    return short_name


class _BoundedHandler(logging.StreamHandler[TextIO]):
    """Writes at most some lines of one event within a second, and then how many it left out.

    What is repeated by a client's doing, or by a fault, fills no disk.
    """

    def __init__(self, stream: TextIO, events_per_s: int, requests_per_s: int) -> None:
        super().__init__(stream)
        self._events_per_s, self._requests_per_s = events_per_s, requests_per_s
        self._second = 0
        self._counts: dict[tuple[str, int], int] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, unless there were too many like it within this second."""
        second = int(time.monotonic())
        if second != self._second:
            counts, self._counts, self._second = self._counts, {}, second
            self._report(counts)
        kind, limit = self._kind(record)
        count = self._counts[kind] = self._counts.get(kind, 0) + 1
        if not limit or count <= limit:
            super().emit(record)

    def close(self) -> None:
        """Report what was left out last."""
        counts, self._counts = self._counts, {}
        self._report(counts)
        super().close()

    def _kind(self, record: logging.LogRecord) -> tuple[tuple[str, int], int]:
        """Return the kind of a line, of which there are few, and how many lines of it a second may have."""
        if record.name == _REQUESTS:
            return ("request", getattr(record, "status", 0) // 100), self._requests_per_s
        return (getattr(record, "event", record.name), record.levelno), self._events_per_s

    def _report(self, counts: Mapping[tuple[str, int], int]) -> None:
        for (name, detail), count in counts.items():
            limit, level = self._events_per_s, detail
            if name == "request":
                limit, level = self._requests_per_s, logging.INFO
            if limit and count > limit:
                left_out = count - limit
                _LOG.log(
                    level,
                    "%d lines of %s were left out of a second",
                    left_out,
                    name,
                    extra=event("log_lines_left_out", left_out=left_out, of=name),
                )


class _JsonLines(logging.Formatter):
    """Formats a record as JSON: time, level, event, logger, message, extra fields, exception."""

    def __init__(self, clean: Clean, hidden: Sequence[str]) -> None:
        super().__init__()
        self._clean = clean
        self._suspicious = ("eyJ", "\\u", "\\n", "\x7f", *(_dumped(value)[1:-1] for value in hidden))

    def format(self, record: logging.LogRecord) -> str:
        event_name = getattr(record, "event", None)
        line: Line = {
            "time": datetime.fromtimestamp(record.created, UTC),
            "level": record.levelname.lower(),
            "event": event_name or record.getMessage(),
            "logger": record.name,
        }
        if event_name is not None:
            line["message"] = record.getMessage()
        # What a record has of its own comes after what every record has.
        own = islice(record.__dict__.items(), _FIRST_OWN, None)
        line.update([item for item in own if item[0] not in _OF_EVERY_RECORD])
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        text = _dumped(line)
        if self._is_suspicious(text):
            self._clean(line)
            text = _dumped(line)
        return text

    def _is_suspicious(self, text: str) -> bool:
        for sign in self._suspicious:
            if sign in text:
                return True
        return "bearer" in text.lower()


def _dumped(value: object) -> str:
    return orjson.dumps(value, default=repr, option=orjson.OPT_NON_STR_KEYS | orjson.OPT_UTC_Z).decode()


def _columns(clean: Clean, *, colors: bool) -> logging.Formatter:
    """Return the formatter for a terminal."""

    def cleaned(_logger: WrappedLogger, _method: str, line: EventDict) -> EventDict:
        clean(line)
        return line

    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            _add_extras,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
        ],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,  # before `cleaned`, so that tracebacks are cleaned, too
            cleaned,
            structlog.dev.ConsoleRenderer(
                colors=colors,
                timestamp_key="time",
                sort_keys=False,
                exception_formatter=structlog.dev.plain_traceback,  # the rich one shows the values of variables
            ),
        ],
    )


def _add_extras(logger: WrappedLogger, method: str, line: EventDict) -> EventDict:
    """Add the fields of a record, and put the name of a log event before its sentence."""
    sentence = line["event"]
    line = _EXTRAS(logger, method, line)
    name = getattr(line["_record"], "event", None)
    line["event"] = sentence if name is None else f"{name}: {sentence}"
    return line


def _cleaner(hidden: Sequence[str]) -> Clean:
    """Return a function that masks secrets and escapes control characters: a newline in a value must not end the line.

    Nearly every line is clean, which `is_clean` finds out at little cost.
    """

    def is_clean(text: str) -> bool:
        return not (
            "eyJ" in text
            or "bearer" in text.lower()
            or any(value in text for value in hidden)
            or not text.isprintable()
        )

    def clean_text(text: str) -> str:
        for value in hidden:
            text = text.replace(value, _HIDDEN)
        return _SECRETS.sub(_HIDDEN, text)

    def clean(line: Line) -> None:
        texts = {name: value for name, value in line.items() if isinstance(value, str)}
        if not is_clean(" ".join(texts.values())):
            for name, text in texts.items():
                cleaned = clean_text(text)
                line[name] = cleaned if name == "exception" else cleaned.translate(_CONTROL)

    return clean
