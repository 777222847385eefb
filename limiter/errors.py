"""Every error that this package raises on purpose. A refusal is none: it is a value (`Decision`)."""

ACL_HINT = "`limiter doctor` prints the ACL line to copy"


class LimiterError(Exception):
    """Base of all errors of this package."""


class LimiterUnavailable(LimiterError):  # noqa: N818  the field's word for it; "Error" would add nothing
    """No answer from Redis: the outcome is unknown, unless `executed` is False.

    Repeat reserve, commit or release with the same hold id: a repeat changes nothing the second time. Repeat a
    `debit` only when `executed` is False.
    """

    def __init__(self, message: str, *, executed: bool | None = None, hold_id: str | None = None) -> None:
        super().__init__(message)
        self.executed = executed
        self.hold_id = hold_id  # of a reserve, also when it was made there


class Overloaded(LimiterUnavailable):
    """More calls wait for Redis than this process keeps. Nothing was sent; Redis may well be there. Try again later."""

    def __init__(self, max_waiting: int) -> None:
        super().__init__(f"{max_waiting} calls wait for Redis already", executed=False)


class NotReplicated(LimiterError):  # noqa: N818  names the thing, as UnknownTier does
    """What was asked for is done, but too few replicas have it: a failover may lose it. Look at them, and repeat it."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"it is done, but a failover may lose it: {problem}")


class UnknownTier(LimiterError):  # noqa: N818  named in the public interface
    """The tier is not among the configured ones. Nothing was planned or debited."""


class InvalidInstallId(LimiterError):  # noqa: N818  named in the public interface
    """The install id cannot be part of a key. Nothing was planned or debited."""


class BrokenRow(LimiterError):  # noqa: N818  names the thing, as UnknownTier does
    """A stored row cannot be read; the message names its key and field. Mend it with redis-cli; nothing was changed."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key} {problem}")
        self.key = key


class ScriptContractError(LimiterError):
    """A script refused its arguments or answered something unexpected: a fault of this package or of its version."""


class SettingsError(LimiterError):
    """A setting, or a command-line value that stands for one, cannot be used. The message says what to do."""


class LedgerFileError(LimiterError):
    """A credits.json cannot be read or written. The message gives the line or the install id, and the cause."""


class LedgerRowError(LedgerFileError):
    """One row of it cannot be taken. fault: what is wrong, in the same words for all rows with that fault."""

    def __init__(self, install_id: str, cause: str, fault: str) -> None:
        super().__init__(f"row {install_id[:80]!r}: {cause}")
        self.fault = fault
