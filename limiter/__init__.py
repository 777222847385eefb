"""Atomic credits in Redis: reserve, commit and release them from any number of nodes."""

from limiter.credits.hold import Hold
from limiter.credits.limiter import CreditLimiter
from limiter.credits.models import Balance, Decision, HeldCredits, Reason, Row, Settlement, Status, Tier, Tiers
from limiter.errors import (
    BrokenRow,
    InvalidInstallId,
    LedgerFileError,
    LimiterError,
    LimiterUnavailable,
    Overloaded,
    ScriptContractError,
    SettingsError,
    UnknownTier,
)
from limiter.redis.connect import connect

__version__ = "0.1.0"

__all__ = [
    "Balance",
    "BrokenRow",
    "CreditLimiter",
    "Decision",
    "HeldCredits",
    "Hold",
    "InvalidInstallId",
    "LedgerFileError",
    "LimiterError",
    "LimiterUnavailable",
    "Overloaded",
    "Reason",
    "Row",
    "ScriptContractError",
    "SettingsError",
    "Settlement",
    "Status",
    "Tier",
    "Tiers",
    "UnknownTier",
    "connect",
]
