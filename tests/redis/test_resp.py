"""The bytes of commands: a template yields what encoding the whole would, and no other module spells RESP."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import hiredis
import pytest

from limiter.redis.resp import ASKING, HGETALL, Argument, Template, encode, hmget, script_load
from tests.support.paths import ROOT

SHA = "0" * 40
USUAL: tuple[tuple[Argument, ...], ...] = ((), ("pro", 1000, None, b"\x20", 0), (None,), ("",))


def words_of(command: bytes) -> list[bytes]:
    """Read a command as a server does: it has the form of a reply that is a list."""
    reader = hiredis.Reader()
    reader.feed(command)
    words: list[bytes] = reader.gets()
    assert not reader.has_data()
    return words


def test_encode_when_words_are_of_all_kinds_then_a_server_reads_them() -> None:
    assert words_of(encode("SET", "schlüssel", 12, b"\xff\r\n", None, "")) == [
        *(b"SET", "schlüssel".encode(), b"12", b"\xff\r\n", b"", b"")
    ]


@pytest.mark.parametrize("after", USUAL)
def test_template_when_filled_then_it_is_the_command_of_all_words(after: tuple[Argument, ...]) -> None:
    template = Template(("EVALSHA", SHA, 1), after)
    assert template.fill("a:key") == encode("EVALSHA", SHA, 1, "a:key", *after)
    assert template.fill("a:key", "hold") == encode("EVALSHA", SHA, 1, "a:key", "hold", *after)
    assert template.fill("", "") == encode("EVALSHA", SHA, 1, "", "", *after)
    assert template.fill_bytes(b"a:\xff\r\nkey") == encode("EVALSHA", SHA, 1, b"a:\xff\r\nkey", *after)


@pytest.mark.parametrize("words", [("schlüssel",), ("key", "höld")])
def test_template_when_a_word_is_longer_in_bytes_then_it_raises_and_lies_about_no_length(
    words: tuple[str, ...],
) -> None:
    with pytest.raises(UnicodeEncodeError):
        HGETALL.fill(*words)


def test_template_when_its_own_words_are_not_ascii_then_it_cannot_be_made() -> None:
    with pytest.raises(UnicodeDecodeError):
        Template(("EVALSHA", SHA, 1), ("größer",))


def test_commands_when_named_then_they_are_those_of_redis() -> None:
    assert words_of(hmget(["a", "b"]).fill("key")) == [b"HMGET", b"key", b"a", b"b"]
    assert words_of(HGETALL.fill("key")) == [b"HGETALL", b"key"]
    assert words_of(script_load("return 1")) == [b"SCRIPT", b"LOAD", b"return 1"]
    assert words_of(ASKING) == [b"ASKING"]


def spelled_in(source: str) -> Iterator[int]:
    """Return the lines with the head of a command or word: `*` or `$`, a number or its place, and the end of a line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
            text = node.value
        elif isinstance(node, ast.JoinedStr):
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "0" for part in node.values)
        else:
            continue
        if re.search(r"[*$](\d+|%d)\r\n", text.decode("latin-1") if isinstance(text, bytes) else text):
            yield node.lineno


@pytest.mark.parametrize("text", [r'b"*2\r\n"', r'b"*%d\r\n$5\r\nHMGET\r\n"', r'f"${len(word)}\r\n{word}\r\n"'])
def test_resp_when_a_module_spells_it_then_it_is_found(text: str) -> None:
    assert list(spelled_in(f"one = 1\nhead = {text}\n")) == [2]


def test_resp_when_looked_for_then_one_module_spells_it() -> None:
    modules = (path.relative_to(ROOT) for path in sorted((ROOT / "limiter").rglob("*.py")))
    spelled = {path: list(spelled_in((ROOT / path).read_text())) for path in modules}
    assert [path for path, lines in spelled.items() if lines] == [Path("limiter/redis/resp.py")]
