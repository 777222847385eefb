"""`limiter row`: shows the row of one install."""

import time
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from limiter._util.timestamps import iso_from_ms
from limiter.bootstrap import open_limiter
from limiter.cli._console import OUT, ConfigOption, JsonOption, RedisOption, print_json, read_settings, run
from limiter.config.settings import Settings
from limiter.credits.models import Balance, Row
from limiter.errors import LimiterError

_LEAVE_MS = 60 * 60 * 1000  # a free leave is there again after it


def row(
    install_id: Annotated[str, typer.Argument(metavar="ID", help="The install id.")],
    redis: RedisOption = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Print the row of an install, its balance in each tier, and its live holds.

    Example: limiter row 5f0c1c1e-8d3a-4a53-9a0e-0d8f2f6f3c11 --redis redis://localhost:6379/0
    """
    run(_show(read_settings(config, redis=redis), install_id, as_json=json))


async def _show(settings: Settings, install_id: str, *, as_json: bool) -> None:
    async with open_limiter(settings) as limiter:
        found = await limiter.row(install_id)
        if found is None:
            raise LimiterError(f"there is no row {limiter.session.keys.install(install_id)}")
        balances = [await limiter.balance(install_id, tier=tier) for tier in limiter.tiers]
    if as_json:
        print_json(_document(found, balances))
    else:
        _print(found, balances)


def _document(row: Row, balances: list[Balance]) -> dict[str, object]:
    return {
        "row": row.as_dict(),
        "balances": {
            balance.tier: {
                "capped": balance.capped,
                "remaining": balance.remaining,
                "gemini_remaining": balance.gemini_remaining,
                "held": balance.held,
                "renews_at": balance.renews_at,
            }
            for balance in balances
        },
        "holds": [
            {
                "hold_id": hold.hold_id,
                "backend": hold.backend,
                "tier": hold.tier,
                "cost": hold.cost,
                "lapses_at": iso_from_ms(hold.expires_ms),
            }
            for hold in row.holds
        ],
        "flow": None if row.flow is None else asdict(row.flow),
        "streams": [{"hold_id": mark.name, "lease_ends_at": iso_from_ms(mark.until_ms)} for mark in row.streams],
        "left": [
            {"request": mark.name, "until": iso_from_ms(mark.until_ms), "retries": mark.retries} for mark in row.left
        ],
    }


def _print(row: Row, balances: list[Balance]) -> None:
    for name, value in row.as_dict().items():
        OUT.print(f"{name:<25} {value}", markup=False, soft_wrap=True)
    table = Table("as tier", "credits left", "held", "on gemini", "renews at", box=None, pad_edge=False)
    for balance in balances:
        table.add_row(
            balance.tier,
            _count(balance.remaining, balance.quota),
            str(balance.held),
            _count(balance.gemini_remaining, balance.gemini_cap),
            balance.renews_at or "never",
        )
    OUT.print()
    OUT.print(table)
    now_ms = balances[0].now_ms if balances else int(time.time() * 1000)
    for hold in row.holds:
        left_s = (hold.expires_ms - now_ms) / 1000
        state = f"expires in {left_s:.0f} s" if left_s > 0 else "expired: it can still be committed for an hour"
        OUT.print(f"\nhold {hold.hold_id}: {hold.cost} of {hold.tier} on {hold.backend}, {state}", markup=False)
    for mark in row.streams:
        left_s = (mark.until_ms - now_ms) / 1000
        state = f"in flight, its lease ends in {left_s:.0f} s" if left_s > 0 else "not in flight: its lease has ended"
        OUT.print(f"\nstream {mark.name}: {state}", markup=False)
    if row.flow is not None and row.flow.rate_until_ms > now_ms:
        OUT.print(f"\nrate: used up to {(row.flow.rate_until_ms - now_ms) / 1000:.1f} s ahead", markup=False)
    if row.flow is not None and row.flow.left_until_ms > now_ms:
        leaves = -(-(row.flow.left_until_ms - now_ms) // _LEAVE_MS)
        OUT.print(f"\nfree leaves: {leaves} used", markup=False)


def _count(left: int | None, limit: int | None) -> str:
    return "unlimited" if left is None else f"{left} of {limit}"
