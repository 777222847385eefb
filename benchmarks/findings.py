"""What a benchmark found: ratios of interleaved rounds, and the bars that they are held against.

A ratio is ours over theirs within one round; the machine may be busy, but it was the same for both.
"""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Direction = Literal["at least", "at most"]


@dataclass(frozen=True, slots=True)
class Bar:
    """What a ratio has to be."""

    ratio: float
    direction: Direction

    def __str__(self) -> str:
        return f"{'≥' if self.direction == 'at least' else '≤'} {self.ratio:g}"

    def is_reached(self, ratio: float) -> bool:
        """Tell whether a ratio is good enough."""
        return ratio >= self.ratio if self.direction == "at least" else ratio <= self.ratio


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the results: medians of ours and theirs in `unit`, and the ratio of each round."""

    what: str
    against: str
    ours: float
    theirs: float
    unit: str
    ratios: tuple[float, ...]
    bar: Bar | None = None
    group: str = ""

    @property
    def ratio(self) -> float:
        """The median ratio."""
        return statistics.median(self.ratios)

    @property
    def verdict(self) -> str:
        """Whether the bar is reached."""
        return "" if self.bar is None else "reached" if self.bar.is_reached(self.ratio) else "**not reached**"

    def cells(self) -> list[str]:
        """Give the line's cells, as in `HEADS`."""
        spread = f"{self.ratio:.2f} ({min(self.ratios):.2f} to {max(self.ratios):.2f})"
        bar = "" if self.bar is None else str(self.bar)
        return [
            self.what,
            self.against,
            _short(self.ours),
            _short(self.theirs),
            self.unit,
            spread,
            bar,
            self.verdict,
        ]


def _short(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= _WHOLE else f"{number:.3g}"


_WHOLE = 100
HEADS = ["what", "against", "ours", "theirs", "unit", "ratio, median (spread)", "bar", ""]


def compared(
    what: str,
    against: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    *,
    unit: str,
    bar: Bar | None = None,
    group: str = "",
) -> Finding:
    """Make a finding of the rounds' numbers, ours and theirs of the same round at the same place."""
    ratios = tuple(mine / other for mine, other in zip(ours, theirs, strict=True))
    return Finding(what, against, statistics.median(ours), statistics.median(theirs), unit, ratios, bar, group)


def as_markdown(findings: Iterable[Finding]) -> str:
    """Write a table for RESULTS.md."""
    return markdown_table(HEADS, [finding.cells() for finding in findings])


def markdown_table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Write a table of any columns."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (heads, ["---"] * len(heads), *lines))


def as_text(findings: Iterable[Finding]) -> str:
    """Write the same for a terminal."""
    lines = [HEADS, *(finding.cells() for finding in findings)]
    widths = [max(len(cells[column]) for cells in lines) for column in range(len(HEADS))]
    return "\n".join("  ".join(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True)) for cells in lines)


@dataclass(frozen=True, slots=True)
class Measured:
    """One section's findings, when they were made, and the machine's load average just before. note: Markdown."""

    at: str
    load: float
    findings: list[Finding]
    note: str = ""


def write_store(path: Path, sections: Mapping[str, Measured]) -> None:
    """Keep what was measured, for a later run of other sections and for the plots."""
    document = {name: asdict(section) for name, section in sections.items()}
    path.write_text(json.dumps(document, indent=1) + "\n")


def read_store(path: Path) -> dict[str, Measured]:
    """Read what `write_store` kept; nothing when there is no such file."""
    stored = json.loads(path.read_text()) if path.exists() else {}
    return {
        name: Measured(**section | {"findings": [_finding(**one) for one in section["findings"]]})
        for name, section in stored.items()
    }


def _finding(*, ratios: list[float], bar: dict[str, Any] | None, **rest: Any) -> Finding:
    return Finding(ratios=tuple(ratios), bar=Bar(**bar) if bar else None, **rest)


# What is drawn: the file's name, its title, and the sections of which one at least must be known.
PLOTS = {
    "cost.svg": ("Cost of a decision against installs and live holds", {"scripts-valkey", "scripts-redis"}),
    "concurrency.svg": ("Decisions a second against how many at once", {"decisions"}),
    "relays.svg": ("Requests a second, and the cost of streams, of each relay against ours", {"relay", "streams"}),
}
