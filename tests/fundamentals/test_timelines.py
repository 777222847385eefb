"""The timelines of the docs, line by line against the real scripts: each table is one install, its clock set by it."""

import ast
import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from limiter import CreditLimiter
from limiter.credits.models import Balance, Decision, Settlement
from tests.support.credits import Clock, LimiterWith
from tests.support.paths import ROOT

Line = dict[str, str]
FIRST_COLUMNS = ("On", "At")


def timelines(page: str) -> list[list[Line]]:
    """Return the tables of a page whose first column is a time, each line by its columns."""
    text = (ROOT / "docs/explanation" / page).read_text(encoding="utf-8")
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        header, _, *rows = ([cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines())
        if header[0] in FIRST_COLUMNS:
            found.append([dict(zip(header, row, strict=True)) for row in rows])
    return found


def tables(page: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("timeline", timelines(page), ids=lambda lines: next(iter(lines[0].values())))


def moment_of(line: Line, before: datetime) -> datetime:
    """Read "On 31 January at 10:00" or "At 10:00:00"."""
    if "On" in line:
        moment = datetime.strptime(f"{line['On']} 2026", "On %d %B at %H:%M %Y").replace(tzinfo=UTC)
    else:
        moment = datetime.strptime(f"{line['At']} 2026", "At %H:%M:%S %Y").replace(tzinfo=UTC)
    assert moment > before
    return moment


def call_of(line: Line) -> tuple[str, dict[str, Any]]:
    """Read "`debit(tier="pro", cost=5)`"."""
    call = ast.parse(line["call"].strip("`"), mode="eval").body
    assert isinstance(call, ast.Call)
    assert isinstance(call.func, ast.Name)
    return call.func.id, {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}


def as_told(answer: Decision | Settlement | Balance | str) -> str:
    match answer:
        case Balance():
            return ""
        case Decision(reason=None):
            return f"`{answer.status}` on {answer.backend}"
        case Decision():
            return f"`{answer.status}`: {answer.reason}"
        case Settlement():
            return f"`{answer.status}`"
    return f"`{answer}`"


async def replay(limiter: CreditLimiter, clock: Clock, timeline: list[Line]) -> None:
    """Make each call at its time, and compare what the line says of it."""
    before, tier = datetime(1900, 1, 1, tzinfo=UTC), "core"
    for line in timeline:
        before = moment_of(line, before)
        clock.now_ms = int(before.timestamp() * 1000)
        operation, arguments = call_of(line)
        tier = arguments.get("tier", tier)
        if operation in {"reserve", "debit"}:
            arguments = {"tier": tier, "has_hardware": True, **arguments}
        assert as_told(await getattr(limiter, operation)("alice", **arguments)) == line["answer"], line
        assert await state(limiter, tier, line) == {name: line[name] for name in STATE if name in line}, line


STATE = ("left", "renews", "debited", "held")


async def state(limiter: CreditLimiter, tier: str, line: Line) -> Line:
    balance, row = await limiter.balance("alice", tier=tier), await limiter.row("alice")
    renews = "never"
    if balance.renews_ms is not None:
        moment = datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=balance.renews_ms)
        renews = f"on {moment.day} {moment:%B at %H:%M}"
    values = {
        "left": "unlimited" if balance.remaining is None else str(balance.remaining),
        "renews": renews,
        "debited": str(row.lifetime_consumed if row else 0),
        "held": str(balance.held),
    }
    return {name: value for name, value in values.items() if name in line}


@tables("credits-and-periods.md")
async def test_timeline_of_periods_when_replayed_then_the_scripts_answer_the_same(
    limiter: CreditLimiter, clock: Clock, timeline: list[Line]
) -> None:
    await replay(limiter, clock, timeline)


@tables("holds.md")
async def test_timeline_of_holds_when_replayed_then_the_scripts_answer_the_same(
    limiter_with: LimiterWith, clock: Clock, timeline: list[Line]
) -> None:
    """The limiter of the page: a tier `core` of three credits, and holds of ten minutes, which is the default."""
    await replay(limiter_with(core={"lifetime": 3}), clock, timeline)


def test_pages_when_read_then_they_have_their_timelines() -> None:
    assert [len(timelines(page)) for page in ("credits-and-periods.md", "holds.md")] == [4, 4]
