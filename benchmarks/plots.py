"""Draws what findings.json holds: the cost of a decision against installs and holds, and throughput against callers.

`python -m benchmarks.plots FINDINGS`, with matplotlib on the path: it is no dependency of this project.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt

from benchmarks.findings import PLOTS, Finding, Measured, read_store

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "limiter"  # the same findings give the same file
Sections = Mapping[str, Measured]


def _across(lines: Sequence[Finding]) -> list[int]:
    """Give the first number in each line's words."""
    return [int(re.findall(r"\d[\d,]*", line.what)[0].replace(",", "")) for line in lines]


def _found(sections: Sections, name: str) -> list[Finding]:
    return sections[name].findings if name in sections else []


def draw_cost(sections: Sections, path: Path) -> None:
    """Draw the server's time for a decision, as a ratio to that on few installs and without other live holds."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for name, marker in (("scripts-valkey", "o"), ("scripts-redis", "s")):
        for panel, operation, words in (
            (panels[0], "reserve", r"reserve, [\d,]+ installs"),
            (panels[1], "reserve", r"reserve, \d+ other live"),
            (panels[1], "commit", r"commit, \d+ other live"),
        ):
            lines = [line for line in _found(sections, name) if re.match(words, line.what) and line.unit == "µs"]
            if lines:
                below = [line.ratio - min(line.ratios) for line in lines]
                above = [max(line.ratios) - line.ratio for line in lines]
                ratios = [line.ratio for line in lines]
                label = f"{name.removeprefix('scripts-')}, {operation}"
                panel.errorbar(_across(lines), ratios, [below, above], marker=marker, capsize=3, label=label)
    for panel, title, bar in ((panels[0], "installs, against 1,000", 1.1), (panels[1], "other live holds", 1.5)):
        panel.axhline(bar, color="gray", linestyle="--", linewidth=1)
        panel.set(xscale="log", title=title, ylim=(0, 3))
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=8)
    panels[0].set_ylabel("server's processor time, ratio")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def draw_concurrency(sections: Sections, path: Path) -> None:
    """Draw the decisions a second of one process against how many callers it has at once."""
    lines = [line for line in _found(sections, "decisions") if line.group == "concurrency"]
    figure, panel = plt.subplots(figsize=(6, 3.4))
    panel.plot(_across(lines), [line.ours for line in lines], marker="o", label="limiter, reserve")
    panel.plot(_across(lines), [line.theirs for line in lines], marker="s", label="redis-py, evalsha of that script")
    panel.set_xscale("log", base=2)
    panel.set(xlabel="callers at once in one process", ylabel="decisions a second")
    panel.set_ylim(bottom=0)
    panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    store = Path(sys.argv[1])
    known = read_store(store)
    for file, draw in (("cost.svg", draw_cost), ("concurrency.svg", draw_concurrency)):
        if known.keys() & PLOTS[file][1]:
            draw(known, store.with_name(file))
