"""The commands that the Redis user of limiter needs: the one list, and the ACL line that is made of it.

Each command has a harmless call by which a user can find out, without the right to read ACLs, whether it may run it.
"""

import re
from functools import cache

from limiter.redis.lua_source import compose, script_names
from limiter.redis.url import Kind

Probe = tuple[str | int, ...]
KEY = "{key}"  # stands for a key that does not exist
_NO_SCRIPT = "0" * 40
# SELECT needs no probe: each connection begins with it.
# SET comes first: it stores a string for some seconds, on which the commands for hashes then do nothing.
_PROBES: dict[str, Probe] = {
    "set": ("SET", KEY, "", "PX", 5000, "NX"),
    "hset": ("HSET", KEY, "field", "value"),
    "hdel": ("HDEL", KEY, "field"),
    "hget": ("HGET", KEY, "field"),
    "hgetall": ("HGETALL", KEY),
    "hlen": ("HLEN", KEY),
    "hmget": ("HMGET", KEY, "field"),
    "dump": ("DUMP", KEY),
    "exists": ("EXISTS", KEY),
    "get": ("GET", KEY),
    "pexpireat": ("PEXPIREAT", KEY, 4_102_444_800_000, "LT"),
    "pexpire": ("PEXPIRE", KEY, 5000),
    "del": ("DEL", KEY),
    "asking": ("ASKING",),
    "client|setname": ("CLIENT", "SETNAME", "limiter"),
    "cluster|nodes": ("CLUSTER", "NODES"),
    "cluster|slots": ("CLUSTER", "SLOTS"),
    "evalsha": ("EVALSHA", _NO_SCRIPT, 1, KEY),
    "info": ("INFO", "server"),
    "role": ("ROLE",),
    "scan": ("SCAN", 0, "COUNT", 1),
    "script|load": ("SCRIPT", "LOAD", "return 1"),
    "time": ("TIME",),
}
# What is sent from here; what the scripts run is read in them.
_SENT = {"client|setname", "dump", "evalsha", "hdel", "hget", "hgetall", "info", "scan", "script|load", "time"}
_SENT_TO: dict[Kind, set[str]] = {
    "single": set(),
    "sentinel": {"role"},
    "cluster": {"asking", "cluster|nodes", "cluster|slots"},
}


def needed_commands(kind: Kind, *, database: int = 0) -> list[str]:
    """Return the commands that a user needs, as ACL rules name them."""
    selects = {"select"} if database else set()
    return sorted(_SENT | _SENT_TO[kind] | _commands_of_scripts() | selects)


def acl_line(prefix: str, commands: list[str], *, user: str = "limiter") -> str:
    """Return the line that creates such a user, with a placeholder for its password."""
    allowed = " ".join(f"+{command}" for command in commands)
    return f"ACL SETUSER {user} reset on >PASSWORD ~{prefix}:* {allowed}"


def probes(commands: list[str], key: str) -> list[tuple[str, Probe]]:
    """Return a harmless call of each command, in an order in which they are harmless."""
    return [
        (command, tuple(key if word == KEY else word for word in probe))
        for command, probe in _PROBES.items()
        if command in commands
    ]


@cache
def _commands_of_scripts() -> frozenset[str]:
    called = re.compile(r'redis\.p?call\("([A-Z]+)"')
    return frozenset(word.lower() for name in script_names() for word in called.findall(compose(name).text))
