"""What a benchmark found: ratios of interleaved rounds, and the bars that they are held against.

A ratio is ours over theirs within one round; the machine may be busy, but it was the same for both.
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

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
            f"{self.ours:,.4g}",
            f"{self.theirs:,.4g}",
            self.unit,
            spread,
            bar,
            self.verdict,
        ]


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
    lines = [HEADS, ["---"] * len(HEADS), *(finding.cells() for finding in findings)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def as_text(findings: Iterable[Finding]) -> str:
    """Write the same for a terminal."""
    lines = [HEADS, *(finding.cells() for finding in findings)]
    widths = [max(len(cells[column]) for cells in lines) for column in range(len(HEADS))]
    return "\n".join("  ".join(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True)) for cells in lines)
