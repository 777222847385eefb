"""How log lines look: JSON for machines, columns in a terminal, and never a secret.

It is the one module that knows structlog: every other logs by the standard library, so that who uses this package as a
library keeps their own set-up. structlog writes the columns; JSON, of which each request is a line, costs a third here.
"""

import hashlib
import logging
import re
import secrets
import sys
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

import orjson
import structlog
from structlog.typing import EventDict, WrappedLogger

LogFormat = Literal["auto", "json", "text"]
Line = MutableMapping[str, Any]
Clean = Callable[[Line], None]
_HIDDEN = "***"
_SECRETS = re.compile(r"(?i:(?<=\bbearer\s))\S+|\beyJ[\w-]{8,}\.[\w-]+\.[\w-]*")  # what stands after Bearer; any JWT
_LEAST_SECRET = 6  # characters: shorter ones would blot out words
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), 127)} | {ord("\n"): "\\n", ord("\t"): "\\t"}
_NAME_BYTES = 6
_EXTRAS = structlog.stdlib.ExtraAdder()
_OF_EVERY_RECORD = frozenset((*logging.makeLogRecord({}).__dict__, "message", "asctime"))


def set_up_logging(
    *, level: str = "INFO", style: LogFormat = "auto", hide: Iterable[str] = (), stream: TextIO | None = None
) -> None:
    """Send every log line of this process to a stream (stderr), in place of what was set up before.

    style: "auto" is text in a terminal, else JSON. hide: values that must not appear, as the operator's keys.
    """
    stream = stream or sys.stderr
    is_text = style == "text" or (style == "auto" and stream.isatty())
    hidden = sorted((value for value in hide if len(value) >= _LEAST_SECRET), key=len, reverse=True)
    clean = _cleaner(hidden)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_columns(clean, colors=stream.isatty()) if is_text else _JsonLines(clean, hidden))
    # What no line shows need not be found out for each; the logging HOWTO of Python says how.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None  # noqa: SLF001
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


def short_names(key: str = "") -> Callable[[str], str]:
    """Give a function that turns an install id into a short name: the same for the same key, telling nothing of the id.

    Without a key each process has its own names.
    """
    secret = hashlib.sha256(key.encode()).digest() if key else secrets.token_bytes(32)

    def short_name(install_id: str) -> str:
        return hashlib.blake2b(install_id.encode(), key=secret, digest_size=_NAME_BYTES).hexdigest()

    return short_name


class _JsonLines(logging.Formatter):
    """Writes a record as JSON: time, level, event, logger, message, what else the record has, the error."""

    def __init__(self, clean: Clean, hidden: Sequence[str]) -> None:
        super().__init__()
        self._clean = clean
        self._suspicious = ("eyJ", "\\u", "\\n", "\x7f", *(_dumped(value)[1:-1] for value in hidden))

    def format(self, record: logging.LogRecord) -> str:
        line: Line = {
            "time": datetime.fromtimestamp(record.created, UTC),
            "level": record.levelname.lower(),
            "event": getattr(record, "event", None) or record.getMessage(),
            "logger": record.name,
        }
        if hasattr(record, "event"):
            line["message"] = record.getMessage()
        line.update({name: value for name, value in record.__dict__.items() if name not in _OF_EVERY_RECORD})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        text = _dumped(line)
        if "bearer" in text.lower() or any(sign in text for sign in self._suspicious):
            self._clean(line)
            text = _dumped(line)
        return text


def _dumped(value: object) -> str:
    return orjson.dumps(value, default=repr, option=orjson.OPT_NON_STR_KEYS | orjson.OPT_UTC_Z).decode()


def _columns(clean: Clean, *, colors: bool) -> logging.Formatter:
    """Give the formatter for people."""

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
            structlog.processors.format_exc_info,  # before the cleaner, which then sees the traceback, too
            cleaned,
            structlog.dev.ConsoleRenderer(
                colors=colors,
                timestamp_key="time",
                sort_keys=False,
                exception_formatter=structlog.dev.plain_traceback,  # the rich one shows variables, and what is in them
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
    """Make what blots out secrets, and control characters: a line's end in a text is not the line's end."""

    def is_clean(text: str) -> bool:
        """Tell at little cost that there is nothing to do, as for nearly every line."""
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
