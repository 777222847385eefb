"""Every error that this package raises on purpose. A refusal is not an error but a value (`Decision`)."""

from enum import Enum

ACL_HINT = "`limiter doctor` prints the ACL line to copy"


class LimiterError(Exception):
    """Base of all errors of this package."""


class Execution(Enum):
    """Whether a call that was not answered was executed: not at all, or nobody knows. Unknown is not failed."""

    UNKNOWN = "unknown"
    NOT_EXECUTED = "not executed"


class LimiterUnavailable(LimiterError):  # noqa: N818  the usual term for it; "Error" would add nothing
    """Redis did not reply. `execution` says whether the outcome is unknown.

    Retry reserve, commit or release with the same hold id: they are idempotent. Retry a `debit` only if it is
    `NOT_EXECUTED`. `hold_id` is that of a failed reserve, also when the limiter generated it.
    """

    def __init__(self, message: str, *, execution: Execution = Execution.UNKNOWN, hold_id: str | None = None) -> None:
        super().__init__(message)
        self.execution = execution
        self.hold_id = hold_id


class Overloaded(LimiterUnavailable):
    """Too many calls of this process are waiting for Redis. Nothing was sent, and Redis may be fine. Retry later."""

    def __init__(self, max_waiting: int) -> None:
        super().__init__(f"{max_waiting} calls are waiting for Redis already", execution=Execution.NOT_EXECUTED)


class OutOfMemory(LimiterUnavailable):
    """Redis has used up its `maxmemory`. Nothing was done. It answers, commits and releases, but reserves nothing."""

    def __init__(self, text: str) -> None:
        super().__init__(f"Redis is out of memory: {text}", execution=Execution.NOT_EXECUTED)


class NotReplicated(LimiterError):  # noqa: N818  names the thing, as UnknownTier does
    """The operation is done, but too few replicas have it, so a failover may lose it. Check them, and repeat it."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"the operation is done, but a failover may lose it: {problem}")


class UnknownTier(LimiterError):  # noqa: N818  named in the public interface
    """The tier is not one of those configured. Nothing was planned or debited."""


class InvalidInstallId(LimiterError):  # noqa: N818  named in the public interface
    """The install id cannot be part of a key. Nothing was planned or debited."""


class BrokenRow(LimiterError):  # noqa: N818  names the thing, as UnknownTier does
    """A stored row cannot be read; the message names its key and field. Nothing was changed. Repair it in redis-cli."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key} {problem}")
        self.key = key


class ScriptContractError(LimiterError):
    """A script rejected its arguments or returned something unexpected: a bug in this package, or mixed versions."""


class SettingsError(LimiterError):
    """A setting, or a command-line option that overrides one, is not valid. The message says what to do."""


class LedgerFileError(LimiterError):
    """A credits.json cannot be read or written. The message has the line or the install id, and the cause."""


class LedgerRowError(LedgerFileError):
    """A row of a credits.json is not valid. `fault` describes the fault, in the same words for every such row."""

    def __init__(self, install_id: str, cause: str, fault: str) -> None:
        super().__init__(f"row {install_id[:80]!r}: {cause}")
        self.fault = fault
