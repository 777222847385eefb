"""Composes the scripts of `lua/`: one file per operation, with its includes pasted in.

Compose here and nowhere else: the SHA by which the server finds a script depends on every byte of its text.
"""

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_PACKAGED = Path(__file__).parents[1] / "lua"  # in the wheel
_FOLDER = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[2] / "lua"  # in a checkout
# The names that an include defines follow its own, as a hint for readers; after a comma they continue on the next line.
_INCLUDE = re.compile(r"^--@include (\w+) ->(?: .+,\n-- )* .+$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Script:
    """One operation: its name, composed text and SHA-1."""

    name: str
    text: str
    sha: str


def script_names() -> list[str]:
    """List the operations: the files of `lua/`, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.lua"))


def summary(name: str) -> str:
    """Return the first sentence of a script's head: what it does."""
    head = re.match(r"#!.*\n((?:-- .*\n)+)", (_FOLDER / f"{name}.lua").read_text(encoding="utf-8"))
    text = head[1].replace("\n-- ", " ").removeprefix("-- ") if head else ""
    return text.partition(". ")[0].strip().removesuffix(".") + "."


def load_scripts() -> None:
    """Compose all scripts: what is composed at its first use may then find no file to open."""
    for name in script_names():
        compose(name)


@cache
def compose(name: str) -> Script:
    """Return one operation's script, includes in place. Raise FileNotFoundError for an unknown name."""

    def paste(directive: re.Match[str]) -> str:
        return (_FOLDER / "include" / f"{directive[1]}.lua").read_text(encoding="utf-8").rstrip("\n")

    text = _INCLUDE.sub(paste, (_FOLDER / f"{name}.lua").read_text(encoding="utf-8"))
    return Script(name, text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())
