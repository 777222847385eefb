"""Atomic credits in Redis: reserve, commit and release them from any number of nodes."""

from limiter.credits.hold import Hold
from limiter.credits.limiter import CreditLimiter
from limiter.credits.models import (
    Balance,
    Decision,
    DecisionStatus,
    HeldCredits,
    PutStatus,
    Reason,
    Row,
    Settlement,
    SettlementStatus,
    Tier,
    Tiers,
)
from limiter.errors import (
    BrokenRow,
    Execution,
    InvalidInstallId,
    LedgerFileError,
    LimiterError,
    LimiterUnavailable,
    OutOfMemory,
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
    "DecisionStatus",
    "Execution",
    "HeldCredits",
    "Hold",
    "InvalidInstallId",
    "LedgerFileError",
    "LimiterError",
    "LimiterUnavailable",
    "OutOfMemory",
    "Overloaded",
    "PutStatus",
    "Reason",
    "Row",
    "ScriptContractError",
    "SettingsError",
    "Settlement",
    "SettlementStatus",
    "Tier",
    "Tiers",
    "UnknownTier",
    "connect",
]
