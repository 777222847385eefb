"""Errors of Redis and redis-py, translated: was the command executed, is a row broken, and what to do about it."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from redis.exceptions import (
    AskError,
    BusyLoadingError,
    ClusterDownError,
    DataError,
    MasterDownError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from limiter._util.cancellation import CancelWatch
from limiter.errors import ACL_HINT, BrokenRow, Execution, LimiterUnavailable, OutOfMemory, ScriptContractError

T = TypeVar("T")
_NOT_EXECUTED = (
    AskError,  # and MOVED, after too many redirections
    BusyLoadingError,
    ReadOnlyError,
    ClusterDownError,
    MasterDownError,
    NoScriptError,  # flushed again between loading and running it
    TryAgainError,
)
# Without an error class in redis-py 8.1: too few replicas (min-replicas-to-write), a disk that cannot be written.
_REFUSALS = ("NOREPLICAS ", "MISCONF ")
# The text of a script's error in that case: Valkey and Redis 7.2, Redis 7.0.
_DENIED_IN_SCRIPT = ("ACL failure in script", "The user executing the script can't")


def is_unknown_command(error: Exception) -> bool:
    """Return whether a server does not know a command, as its configuration may rename or disable one."""
    return str(error).lower().startswith("unknown command")


def translate_error(error: Exception, row_key: str) -> Exception:  # noqa: PLR0911  a table of cases
    """Translate an error of redis-py into one of this package, which names the key where that helps."""
    text = str(error)
    if isinstance(error, OutOfMemoryError):
        return OutOfMemory(text.rstrip("."))
    if isinstance(error, _NOT_EXECUTED) or text.startswith(_REFUSALS):
        return LimiterUnavailable(f"Redis cannot do this now: {text}", execution=Execution.NOT_EXECUTED)
    if isinstance(error, RedisTimeoutError | TimeoutError):
        return LimiterUnavailable("Redis did not answer in time: the outcome is unknown")
    if isinstance(error, DataError):
        return ScriptContractError(f"an argument cannot be sent to Redis: {text}")
    if isinstance(error, RedisConnectionError | OSError):
        return LimiterUnavailable(f"Redis is not reachable: {text}")
    if isinstance(error, NoPermissionError) or any(words in text for words in _DENIED_IN_SCRIPT):
        # A script may have been executed in part.
        execution = Execution.NOT_EXECUTED if isinstance(error, NoPermissionError) else Execution.UNKNOWN
        return LimiterUnavailable(f"Redis does not let this user do it: {text}; {ACL_HINT}", execution=execution)
    if text.startswith("BADROW "):
        return BrokenRow(row_key, text.removeprefix(f"BADROW {row_key} "))
    if text.startswith("WRONGTYPE"):
        return BrokenRow(row_key, "is not a hash: delete or rename this key")
    if isinstance(error, ResponseError):
        return ScriptContractError(f"Redis refused a script on {row_key}: {text}")
    return LimiterUnavailable(f"Redis failed: {text}")


async def with_timeout(command: Awaitable[T], key: str, *, timeout_ms: int) -> T:
    """Await a command of redis-py about a key, for no longer than timeout_ms.

    Raises LimiterUnavailable, BrokenRow, ScriptContractError.
    """
    cancel = CancelWatch()
    try:
        async with asyncio.timeout(timeout_ms / 1000):
            answer = await command
    except (RedisError, OSError, TimeoutError) as error:
        cancel.check()
        raise translate_error(error, key) from error
    cancel.check()
    return answer
