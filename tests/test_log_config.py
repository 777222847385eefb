"""The format of log lines, and what must not appear in them."""

import io
import json
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from limiter.log_config import set_up_logging, short_names
from limiter.log_events import event
from tests.support.relay import new_install

JWT = "eyJhbGciOiJFZERTQSJ9.eyJ0aWVyIjoicHJvIn0.c2lnbmF0dXJl"
Lines = Callable[[], list[dict[str, Any]]]


def int_of(text: str) -> int:
    return int(text)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def lines(stream: io.StringIO) -> Lines:
    set_up_logging(stream=stream, hide=["operators-key", "x"])
    return lambda: [json.loads(line) for line in stream.getvalue().splitlines()]


def test_event_when_it_has_a_name_then_json_has_name_and_sentence_separately(lines: Lines) -> None:
    logging.getLogger("limiter").error(
        "No calls to %r", "gemini", extra=event("circuit_breaker_opened", backend="gemini")
    )
    (line,) = lines()
    assert (line["event"], line["message"]) == ("circuit_breaker_opened", "No calls to 'gemini'")
    assert line["backend"] == "gemini"


def test_event_when_it_is_text_then_its_name_precedes_its_sentence() -> None:
    stream = io.StringIO()
    set_up_logging(style="text", stream=stream)
    logging.getLogger("limiter").error("No calls to %r", "gemini", extra=event("circuit_breaker_opened"))
    assert "circuit_breaker_opened: No calls to 'gemini'" in stream.getvalue()


def test_line_when_it_is_not_for_a_terminal_then_it_is_json_with_its_time_level_and_fields(lines: Lines) -> None:
    logging.getLogger("limiter.request").info("request", extra={"route": "/v1/credits", "duration_ms": 1.5})
    (line,) = lines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", line.pop("time"))
    assert line == {
        "level": "info",
        "event": "request",
        "logger": "limiter.request",
        "route": "/v1/credits",
        "duration_ms": 1.5,
    }


def test_line_when_it_is_for_a_terminal_then_it_is_columns_in_the_order_of_the_fields() -> None:
    terminal = Terminal()
    set_up_logging(stream=terminal)
    logging.getLogger("limiter.request").info("request", extra={"route": "/v1/credits", "backend": "gemini"})
    plain = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue())
    assert re.search(r"\[info +\] request +\[limiter\.request\] route=/v1/credits backend=gemini\n$", plain)


@pytest.mark.parametrize("style", ["json", "text"])
def test_style_when_it_is_set_then_the_terminal_does_not_matter(style: Any) -> None:
    terminal = Terminal()
    set_up_logging(stream=terminal, style=style)
    logging.getLogger("limiter").warning("one")
    assert terminal.getvalue().startswith("{") == (style == "json")


@pytest.mark.parametrize("style", ["json", "text"])
def test_line_when_a_text_has_a_secret_then_it_is_masked_in_the_traceback_too(stream: io.StringIO, style: Any) -> None:
    set_up_logging(stream=stream, style=style, hide=["operators-key"])
    log = logging.getLogger("limiter.relay")
    log.warning("sent %s with Authorization: Bearer abc123", JWT, extra={"url": "http://host/?key=operators-key"})
    # The source lines in a traceback are this program's own: only what the error says can hold a secret.
    with pytest.raises(ValueError, match="Bearer") as caught:
        int_of(f"{JWT} and operators-key Bearer abc123")
    log.error("unexpected", exc_info=caught.value)
    said = stream.getvalue()
    assert "Traceback" in said
    for secret in (JWT, "operators-key", "abc123"):
        assert secret not in said
    assert said.count("***") >= 6


def test_hide_when_a_value_is_very_short_then_it_is_not_masked(lines: Lines) -> None:
    logging.getLogger("limiter").warning("an extra box")
    assert lines()[0]["event"] == "an extra box"


@pytest.mark.parametrize("style", ["json", "text"])
def test_line_when_a_text_has_newlines_then_it_stays_one_line(stream: io.StringIO, style: Any) -> None:
    set_up_logging(stream=stream, style=style)
    logging.getLogger("limiter").warning("a\n2026 [error] forged\x1b[2J", extra={"more": "b\r\nc"})
    assert stream.getvalue().count("\n") == 1
    assert "\x1b" not in stream.getvalue()


def test_level_when_it_is_warning_then_info_is_left_out(stream: io.StringIO) -> None:
    set_up_logging(stream=stream, level="warning")
    logging.getLogger("limiter").info("less")
    logging.getLogger("limiter").warning("more")
    assert "less" not in stream.getvalue()
    assert "more" in stream.getvalue()


def test_set_up_when_it_is_repeated_then_each_line_is_written_once(stream: io.StringIO) -> None:
    set_up_logging(stream=stream)
    set_up_logging(stream=stream)
    logging.getLogger("limiter").warning("one")
    assert len(stream.getvalue().splitlines()) == 1


def test_short_name_when_the_key_is_the_same_then_so_is_the_name_and_it_does_not_contain_the_id() -> None:
    install_id = new_install()
    name = short_names("a key")(install_id)
    assert name == short_names("a key")(install_id)
    assert re.fullmatch(r"[0-9a-f]{12}", name)
    assert name not in install_id.replace("-", "")
    assert len({name, short_names("a key")(new_install()), short_names("another")(install_id)}) == 3


def test_short_name_when_there_is_no_key_then_each_process_has_its_own_names() -> None:
    install_id = new_install()
    names = short_names()
    assert names(install_id) == names(install_id) != short_names()(install_id)


def test_hide_when_a_value_has_characters_that_json_escapes_then_it_is_masked_too(
    stream: io.StringIO,
) -> None:
    set_up_logging(stream=stream, style="json", hide=['my"own\\key'])
    logging.getLogger("limiter").warning('sent my"own\\key')
    assert json.loads(stream.getvalue())["event"] == "sent ***"


# How many lines there may be


@pytest.fixture
def bounded(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> tuple[Lines, Callable[[float], None]]:
    """Return a log of three lines a second for each event and five for requests, and what sets its clock."""
    now_s = [100.0]
    monkeypatch.setattr("limiter.log_config.time.monotonic", lambda: now_s[0])
    set_up_logging(stream=stream, events_per_s=3, requests_per_s=5)

    def set_time(to_s: float) -> None:
        now_s[0] = to_s

    return lambda: [json.loads(line) for line in stream.getvalue().splitlines()], set_time


def test_event_when_it_repeats_within_a_second_then_its_lines_are_bounded_and_what_was_left_out_is_counted(
    bounded: tuple[Lines, Callable[[float], None]],
) -> None:
    lines, set_time = bounded
    for second in range(2):
        set_time(100.1 + second)
        for _ in range(1000):
            logging.getLogger("limiter").error("It failed", extra=event("backend_failed"))
    logging.getLogger("limiter").error("Another", extra=event("dump_failed"))
    set_time(102.5)
    logging.getLogger("limiter").error("Later", extra=event("dump_failed"))
    names = [line["event"] for line in lines()]
    assert names == [
        *["backend_failed"] * 3,
        "log_lines_left_out",
        *["backend_failed"] * 3,
        "dump_failed",
        "log_lines_left_out",
        "dump_failed",
    ]
    left_out = [line for line in lines() if line["event"] == "log_lines_left_out"]
    assert [(line["of"], line["left_out"], line["level"]) for line in left_out] == [
        ("backend_failed", 997, "error")
    ] * 2


def test_requests_when_most_are_refused_then_those_that_are_served_are_still_logged(
    bounded: tuple[Lines, Callable[[float], None]],
) -> None:
    lines, _ = bounded
    for _ in range(100):
        logging.getLogger("limiter.request").info("request", extra={"status": 401})
    logging.getLogger("limiter.request").info("request", extra={"status": 200})
    assert [line["status"] for line in lines()] == [*[401] * 5, 200]


def test_lines_when_some_were_left_out_before_the_end_then_they_are_counted(
    bounded: tuple[Lines, Callable[[float], None]],
) -> None:
    lines, _ = bounded
    for _ in range(5):
        logging.getLogger("a.library").error("With %s", object())
    logging.getLogger().handlers[0].close()
    assert [(line["event"], line.get("left_out")) for line in lines()][3:] == [("log_lines_left_out", 2)]
