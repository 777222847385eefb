"""All benchmarks, into RESULTS.md beside this file and two plots: `make bench`, or `python -m benchmarks [SECTION...]`.

It takes half an hour to an hour. A section that is not asked for keeps the findings of its last run, which stand in
findings.json.
"""

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from benchmarks import decisions, ledger, races, relay, scripts, streams
from benchmarks.findings import PLOTS, Finding, Measured, as_markdown, read_store, write_store
from tests.support.redis_servers import binaries

HERE = Path(__file__).parent
_STORE = HERE / "findings.json"
_PLOTS = HERE.parent / ".cache" / "matplotlib"
_TITLES = {
    "scripts-valkey": "The scripts in Valkey: the server's cost of a decision",
    "scripts-redis": "The scripts in Redis",
    "decisions": "Decisions of one Python process",
    "races": "Races for one install's credits",
    "relay": "The relay: requests",
    "streams": "The relay: open streams",
    "ledger": "credits.json",
}


def _sections(rows: int) -> dict[str, Callable[[], list[Finding] | str]]:
    """Give what measures each section: findings, or a text for one that has nothing to compare."""
    return {
        "scripts-valkey": lambda: scripts.findings("valkey", scripts.ROUNDS),
        "scripts-redis": lambda: scripts.findings("redis", scripts.ROUNDS),
        "decisions": lambda: list(decisions.findings(decisions.ROUNDS)),
        "races": lambda: races.table(races.ROUNDS),
        "relay": lambda: relay.measure(relay.ROUNDS, peers=True),
        "streams": lambda: list(streams.findings(streams.ROUNDS, peers=True)),
        "ledger": lambda: ledger.findings(rows),
    }


def _write(sections: dict[str, Measured]) -> None:
    write_store(_STORE, sections)
    parts = [_HEAD.format(cores=os.cpu_count(), machine=platform.machine(), **_versions())]
    for name, title in _TITLES.items():
        if (section := sections.get(name)) and (section.findings or section.note):
            parts.append(f"\n## {title}\n\n{section.at}, load average before it {section.load:.1f}.\n")
            parts.append(f"\n{as_markdown(section.findings)}" if section.findings else "")
            parts.append(f"\n{section.note.rstrip()}\n" if section.note else "")
    for file, (title, needs) in PLOTS.items():
        if sections.keys() & needs:
            parts.append(f"\n![{title}]({file})\n")
    (HERE / "RESULTS.md").write_text("".join(parts))


_HEAD = """# Results

Written by `make bench`. Each line is of interleaved rounds: what counts is the ratio within a round, its median and its
spread; the absolute figures are one machine's on one day. {cores} cores ({machine}), shared by client, servers and
peers; Python {python}, aiohttp {aiohttp}, redis-py {redis}, hiredis {hiredis}, uvloop {uvloop}; {servers}.
[Performance](../docs/explanation/performance.md) says of the bars that are not reached where the rest goes.
"""


def _versions() -> dict[str, str]:
    found = [
        subprocess.run([str(path), "--version"], capture_output=True, text=True, check=True).stdout  # noqa: S603  ours
        for path in binaries().values()
        if path is not None
    ]
    servers = ", ".join(text.partition(" sha=")[0].strip() for text in found)
    return {name: version(name) for name in ("aiohttp", "redis", "hiredis", "uvloop")} | {
        "servers": servers,
        "python": platform.python_version(),
    }


def _plot() -> None:
    """Draw with matplotlib, which nothing else here needs: it has a folder of its own."""
    if not (_PLOTS / "matplotlib").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--target", str(_PLOTS)]
        subprocess.run([*pip, "matplotlib>=3.10"], check=True)  # noqa: S603  our own words
    environment = os.environ | {"PYTHONPATH": f"{HERE.parent}{os.pathsep}{_PLOTS}", "MPLCONFIGDIR": str(_PLOTS)}
    command = [sys.executable, "-m", "benchmarks.plots", str(_STORE)]
    subprocess.run(command, env=environment, check=True)  # noqa: S603  our own words


def main() -> None:
    """Measure what is asked for, and write everything that is known."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="section", help=f"{', '.join(_TITLES)}; all of them without")
    parser.add_argument("--rows", type=int, default=ledger.ROWS, help="of the ledger")
    asked = parser.parse_args()
    if unknown := set(asked.sections) - set(_TITLES):
        parser.error(f"no section {min(unknown)!r}: give {', '.join(_TITLES)}")
    known = read_store(_STORE)
    for name, measure in _sections(asked.rows).items():
        if not asked.sections or name in asked.sections:
            print(f"{name} …", flush=True)
            at, load = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), os.getloadavg()[0]
            found = measure()
            known[name] = Measured(at, load, [], found) if isinstance(found, str) else Measured(at, load, found)
            _write(known)
    _plot()
    print(f"written: {HERE / 'RESULTS.md'}")


if __name__ == "__main__":
    main()
