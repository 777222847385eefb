"""Draws what findings.json holds: what a decision costs, throughput against callers, and the relays side by side.

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


def draw_relays(sections: Sections, path: Path) -> None:
    """Draw the other relays against ours: how many requests a second they serve, what their streams cost."""
    figure, panels = plt.subplots(1, 3, figsize=(10, 2.8))
    for panel, name, words, title in (
        (panels[0], "relay", "requests, 64 at once", "requests a second"),
        (panels[1], "streams", "processor time of a chunk", "processor time of a chunk"),
        (panels[2], "streams", "memory of an open stream", "memory of an open stream"),
    ):
        lines = [line for line in _found(sections, name) if line.what.startswith(words) and "relay" not in line.against]
        names = [*(line.against for line in lines), "limiter"]
        bars = panel.barh(names, [*(1 / line.ratio for line in lines), 1], color=["C7"] * len(lines) + ["C0"])
        panel.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
        panel.set(xscale="log", title=title)
        panel.margins(x=0.3)
        panel.tick_params(axis="y", labelsize=8)
        panel.title.set_fontsize(9)
        panel.tick_params(axis="x", which="both", bottom=False, labelbottom=False)
    figure.suptitle("against limiter = 1, on a logarithmic scale", fontsize=9, y=0.04)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


_DRAWN = {"cost.svg": draw_cost, "concurrency.svg": draw_concurrency, "relays.svg": draw_relays}

if __name__ == "__main__":
    store = Path(sys.argv[1])
    known = read_store(store)
    for file, draw in _DRAWN.items():
        if known.keys() & PLOTS[file][1]:
            draw(known, store.with_name(file))
