"""Atomic credits in Redis: reserve, commit and release them from any number of nodes."""

from limiter.credit_limiter import CreditLimiter
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
from limiter.hold import Hold
from limiter.model import Balance, Decision, HeldCredits, Reason, Row, Settlement, Status, Tier, Tiers
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
