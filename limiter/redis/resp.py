"""The bytes of RESP, the protocol of Redis: every command's bytes are made here. hiredis reads the replies.

A `Template` exists because most of a decision's words, the limits of its tier, are the same in call after call.
"""

from collections.abc import Sequence

import hiredis

Argument = str | int | bytes | None


def encode(*words: Argument) -> bytes:
    """Return a whole command. None is the empty word."""
    if None in words:
        words = tuple(["" if word is None else word for word in words])
    return hiredis.pack_command(words)  # type: ignore[arg-type,no-any-return]  # its hints (3.5) mean one word


class Template:
    """A command on one key, whose other words are the same every time, but for at most one beside the key.

    Args:
        before: the words in front of the key, with the name of the command.
        after: those at the end. All are ASCII.
    """

    __slots__ = ("_after", "_after_bytes", "_head", "_head_bytes", "_longer_head")

    def __init__(self, before: Sequence[Argument], after: Sequence[Argument] = ()) -> None:
        words = _elements(before)
        count = len(before) + 1 + len(after)
        # A `$` begins the next word already: the fewer parts, the sooner `fill` has joined them.
        self._head = f"*{count}\r\n{words}$"
        self._longer_head = f"*{count + 1}\r\n{words}$"
        self._after = _elements(after)
        self._head_bytes, self._after_bytes = self._head.encode(), self._after.encode()

    def fill(self, key: str, word: str | None = None) -> bytes:
        """Return the command on a key, with the word behind the key, if any. Raises UnicodeEncodeError unless ASCII."""
        # So there are as many bytes as characters, or none at all.
        if word is None:
            return f"{self._head}{len(key)}\r\n{key}\r\n{self._after}".encode("ascii")
        return f"{self._longer_head}{len(key)}\r\n{key}\r\n${len(word)}\r\n{word}\r\n{self._after}".encode("ascii")

    def fill_bytes(self, key: bytes) -> bytes:
        """Return the command on a key of any bytes, as the server may name one."""
        return b"%b%d\r\n%b\r\n%b" % (self._head_bytes, len(key), key, self._after_bytes)


def _elements(words: Sequence[Argument]) -> str:
    """Return words as they stand in a command, without the count at its head."""
    return encode(*words).partition(b"\r\n")[2].decode("ascii")


def hmget(fields: Sequence[str]) -> Template:
    """Return the command that reads these fields of the hash at one key."""
    return Template(("HMGET",), fields)


HGETALL = Template(("HGETALL",))
ASKING = encode("ASKING")


def script_load(text: str) -> bytes:
    """Return the command that makes a script known to a server."""
    return encode("SCRIPT", "LOAD", text)
