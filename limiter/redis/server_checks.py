"""The kind and the settings that a Redis server needs for rows to be safe on it: rules, applied to its INFO.

`connect` refuses a server with a problem and logs warnings; `doctor` shows everything. It connects to nothing and logs
nothing.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from limiter.redis.url import Kind

Level = Literal["ok", "warning", "problem"]
Info = Mapping[str, Any]
_OLDEST_MAJOR = 7  # scripts with a shebang line
_FULL = 0.8


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check.

    Args:
        level: ok, or how bad it is.
        subject: the name of what was checked; `text` continues the sentence.
        text: what was found.
        advice: what to do, "" if nothing.
    """

    level: Level
    subject: str
    text: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.subject} {self.text}: {self.advice}" if self.advice else f"{self.subject} {self.text}"


def inspect(info: Info, *, subject: str, kind: Kind, allow_eviction: bool) -> list[Finding]:
    """Check what a server is and how it is configured. A problem here does not go away, so the server is refused.

    Args:
        info: what INFO of the server returned.
        subject: the name of the server in the findings.
        kind: of the URL by which it was found.
        allow_eviction: whether it may evict rows.
    """
    return [
        *_mode(info, subject, kind),
        _version(info, subject),
        *_eviction(info, subject, allow_eviction=allow_eviction),
        *_aof(info, subject),
    ]


def inspect_health(info: Info, *, subject: str, kind: Kind, wait_replicas: int) -> list[Finding]:
    """Check the state of a server: what changes while it runs, and with other servers.

    Args:
        info: what INFO of the server returned.
        subject: the name of the server in the findings.
        kind: of the URL by which it was found.
        wait_replicas: how many replicas imports, restores and freed seats wait for.
    """
    return [
        *_memory(info, subject),
        *_aof_writes(info, subject),
        *_replication(info, subject, kind, wait_replicas),
    ]


def without_command(subject: str, command: str) -> Finding:
    """Return the problem of a server that does not know a command."""
    advice = f"take `rename-command {command.partition(' ')[0]} …` out of its configuration, or use another server"
    return Finding("problem", subject, f"has no {command} command, which limiter cannot do without", advice)


def _mode(info: Info, subject: str, kind: Kind) -> Iterator[Finding]:
    """Find a server of another kind than that of the URL, which would fail later and less clearly."""
    mode = info.get("redis_mode") or info.get("server_mode")  # Redis, Valkey
    if mode == "sentinel":
        advice = "give redis+sentinel://HOST:PORT,HOST:PORT/NAME"
        yield Finding("problem", subject, "is a Sentinel", advice)
    if mode == "cluster" and kind != "cluster":
        advice = "give redis+cluster://HOST:PORT,HOST:PORT"
        yield Finding("problem", subject, "is a node of a cluster", advice)
    if info.get("role") == "slave" and kind != "cluster":  # there, a failover may be under way
        advice = "give its primary, or redis+sentinel://…/NAME"
        yield Finding("problem", subject, "is a replica, which takes no writes", advice)


def _version(info: Info, subject: str) -> Finding:
    version, name = str(info["redis_version"]), "Redis"
    if "valkey_version" in info:
        version, name = str(info["valkey_version"]), "Valkey"
    if int(version.partition(".")[0]) < _OLDEST_MAJOR:
        return Finding("problem", subject, f"is {name} {version}, which is too old", "use Redis 7 or later, or Valkey")
    return Finding("ok", subject, f"is {name} {version}")


def _eviction(info: Info, subject: str, *, allow_eviction: bool) -> Iterator[Finding]:
    policy = str(info.get("maxmemory_policy", "noeviction"))
    if policy != "noeviction":
        advice = "set it to noeviction (CONFIG SET maxmemory-policy noeviction, and the same in its configuration)" + (
            "" if allow_eviction else ", or [redis] allow_eviction = true to accept that"
        )
        level: Level = "warning" if allow_eviction else "problem"
        yield Finding(level, subject, f"may evict rows (maxmemory-policy {policy})", advice)


def _aof(info: Info, subject: str) -> Iterator[Finding]:
    if not info.get("aof_enabled"):
        text = "runs without AOF, so that a crash loses what was debited since its last snapshot"
        yield Finding("warning", subject, text, "CONFIG SET appendonly yes, and the same in its configuration")


def _memory(info: Info, subject: str) -> Iterator[Finding]:
    used, maximum = int(info.get("used_memory", 0)), int(info.get("maxmemory", 0))
    if not maximum:
        text = "has no maxmemory: it can grow until its machine has no memory left, and be killed"
        advice = "CONFIG SET maxmemory to what the machine can spare, and the same in its configuration"
        yield Finding("warning", subject, text, advice)
    elif used > _FULL * maximum:
        text = f"uses {used / maximum:.0%} of maxmemory; when it is full, requests are refused"
        yield Finding("warning", subject, text, "raise maxmemory, or spread the rows over a cluster")


def _aof_writes(info: Info, subject: str) -> Iterator[Finding]:
    if info.get("aof_enabled") and info.get("aof_last_write_status", "ok") != "ok":
        yield Finding("problem", subject, "failed in its last write of the AOF", "look at its disk and its log")


def _replication(info: Info, subject: str, kind: Kind, wait_replicas: int) -> Iterator[Finding]:
    if info.get("role") == "slave":
        if kind == "cluster":  # it had slots a moment ago; with other kinds of URL, `_mode` finds it
            advice = "run this again: a failover seems to be under way"
            yield Finding("problem", subject, "is a replica, which takes no writes", advice)
        return
    replicas = int(info.get("connected_slaves", 0))
    if kind != "single" and not replicas:
        yield Finding("warning", subject, "has no replica: nothing takes its place when it fails", "add one")
    elif replicas and "min_slaves_good_slaves" not in info:
        text = "takes writes also when it is cut off from its replicas, and such writes are lost in a failover"
        yield Finding("warning", subject, text, "CONFIG SET min-replicas-to-write 1")
    if replicas < wait_replicas:
        text = f"has {replicas} replicas, and redis.wait_replicas is {wait_replicas}"
        advice = "add replicas, or lower it: imports, restores and freed seats wait for them in vain"
        yield Finding("warning", subject, text, advice)
