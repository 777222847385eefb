"""Write the pages that are made from the code: the commands' help, and the heads of the Lua scripts.

    python docs/generate.py [--check]

With --check nothing is written, and the exit code is 1 when a page is stale.
"""
# ruff: noqa: INP001, T201  a script of its own, which reports on stdout

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import typer

from limiter.cli.main import app
from limiter.redis.lua_source import script_names

DOCS = Path(__file__).resolve().parent
LUA = DOCS.parent / "lua"
_NOTE = "<!-- Written by docs/generate.py: `make docs-generate` writes it again. -->"
_CLI_HEAD = f"""\
# Command line

{_NOTE}

Every command explains itself with `--help`. In a checkout, `limiter` is `.venv/bin/limiter`. Settings come from
[limiter.toml and the environment](settings.md), and options win over them.

Exit codes: 0 done; 1 it could not be done, and a line on stderr says why; 2 wrong usage."""
_LUA_HEAD = f"""\
# Lua scripts

{_NOTE}

Each operation on Redis is one script in `lua/`, which Redis runs as one atomic step. The head of a script is its
contract: what it does, what it replies, and each key and argument with its type, unit and bound. Arguments are strings
on the wire. The paragraphs that scripts share are in `lua/include/`, and are pasted in place of their `--@include`
line; `limiter lua show NAME` prints a script as Redis receives it.

A test compares each head with what Python sends. A hash is the [row of an install](row.md) unless it says otherwise."""
_BINDING = re.compile(r"local (\w+) += .*?(KEYS|ARGV)\b(?:\[(\d+)\])?.*? -- (.+)")
# Of put_row: its last arguments are the values of a row's fields, which a table lists.
_REST = re.compile(r"local \w+ += \{ select\((\d+), unpack\(ARGV\)\) \}")
_FIELD = re.compile(r'  \{ "(\w+)", .* \}, +-- (.+)')
_MARKUP = re.compile(r"\[/?(?:bold|italic|dim|cyan)\]")


def pages() -> dict[Path, str]:
    """Return the text of each generated page."""
    return {
        DOCS / "reference" / "cli.md": "\n".join(cli_page()) + "\n",
        DOCS / "reference" / "lua-scripts.md": "\n".join(lua_page()) + "\n",
    }


def cli_page() -> Iterator[str]:
    """Yield the lines of the page of commands."""
    yield from _CLI_HEAD.splitlines()
    root = typer.main.get_command(app)
    for name, command in _commands(root, "limiter"):
        yield from ["", f"## {name}", ""]
        yield from _command(name, command)


def _commands(group: click.Command, prefix: str) -> Iterator[tuple[str, click.Command]]:
    for name, command in getattr(group, "commands", {}).items():
        if getattr(command, "commands", None):
            yield from _commands(command, f"{prefix} {name}")
        else:
            yield f"{prefix} {name}", command


def _command(name: str, command: click.Command) -> Iterator[str]:
    text, _, example = (command.help or "").partition("Example:")
    usage = " ".join([name, "[OPTIONS]", *map(_argument, filter(_is_argument, command.params))])
    yield from ["```sh", usage, "```", ""]
    yield from _plain(text).strip().splitlines()
    rows = [_parameter(each) for each in command.params if not getattr(each, "hidden", False)]
    if rows:
        yield from ["", "| argument or option | meaning |", "|---|---|"]
        yield from (f"| {what} | {meaning} |" for what, meaning in rows)
    if example.strip():
        yield from ["", "```sh", " ".join(example.split()), "```"]


def _parameter(parameter: click.Parameter) -> tuple[str, str]:
    names = [_argument(parameter)] if _is_argument(parameter) else [*parameter.opts, *parameter.secondary_opts]
    meaning = getattr(parameter, "help", None) or ""
    default = parameter.default
    if default not in (None, False, ()) and not callable(default):
        meaning = f"{meaning} Default: `{default}`."
    return ", ".join(f"`{each}`" for each in names), _plain(meaning).replace("|", r"\|")


def _is_argument(parameter: click.Parameter) -> bool:
    return parameter.param_type_name == "argument"


def _argument(parameter: click.Parameter) -> str:
    name = (parameter.metavar or parameter.name or "").upper().strip("[]")
    return name if parameter.required else f"[{name}]"


def _plain(text: str) -> str:
    return _MARKUP.sub("", text).replace("\f", "").replace("<", r"\<")


def lua_page() -> Iterator[str]:
    """Yield the lines of the page of scripts."""
    yield from _LUA_HEAD.splitlines()
    for name in script_names():
        yield from _script(name, (LUA / f"{name}.lua").read_text(encoding="utf-8").splitlines())


def _script(name: str, lines: list[str]) -> Iterator[str]:
    head, bindings, includes, rest = [], [], [], 0
    for line in lines[1:]:
        if line.startswith("--@include "):
            includes.append(line.split()[1])
        elif found := _REST.match(line):
            rest = int(found[1])
        elif found := _FIELD.match(line):
            bindings.append((found[1], f"ARGV[{rest}]", found[2]))
            rest += 1
        elif found := _BINDING.match(line):
            bindings.append((found[1], f"{found[2]}[{found[3]}]" if found[3] else f"all of {found[2]}", found[4]))
        elif line.startswith("--") and not bindings:
            head.append(line.removeprefix("--").removeprefix(" "))
    what = [line for line in head if not line.startswith((" ", "Reply:"))]
    reply = head[next((i for i, line in enumerate(head) if line.startswith("Reply:")), len(head)) :]
    yield from ["", f"## {name}", "", *what[: len(head) - len(reply)]]
    if reply:
        yield from ["", "```text", *reply, "```"]
    yield from ["", "| name | from | meaning |", "|---|---|---|"]
    for binding, place, comment in bindings:
        meaning = comment.replace("|", r"\|").replace("<", r"\<")
        yield f"| `{binding}` | `{place}` | {meaning} |"
    if includes:
        unique = ", ".join(f"`{include}`" for include in dict.fromkeys(includes))
        yield from ["", f"Includes: {unique}."]


def main() -> int:
    """Write the pages, or compare them."""
    stale = {
        path: text for path, text in pages().items() if not path.exists() or path.read_text(encoding="utf-8") != text
    }
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.relative_to(DOCS.parent)} is stale: run make docs-generate")
        return 1 if stale else 0
    for path, text in stale.items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path.relative_to(DOCS.parent)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
