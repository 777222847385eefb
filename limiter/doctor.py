"""Checks a Redis and the settings, and reports what to do about each problem.

It changes nothing but a key of its own, for some seconds. It also reports what it cannot check.
"""

import asyncio
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
from redis.asyncio import Redis
from redis.exceptions import NoPermissionError, RedisError, ResponseError

from limiter._util.open_files import clients_within, files_for, open_files
from limiter.config.settings import BackendSettings, Settings
from limiter.credits.keys import Keys
from limiter.credits.models import Backend
from limiter.errors import LedgerFileError, LimiterError, SettingsError
from limiter.ledger.file import LedgerFile
from limiter.licences.tokens import Licences
from limiter.redis.acl import acl_line, needed_commands, probes
from limiter.redis.cluster import primaries_of
from limiter.redis.connect import CLIENT_ERRORS, open_client
from limiter.redis.errors import is_unknown_command
from limiter.redis.server_checks import Finding, inspect, inspect_health, without_command
from limiter.redis.url import Kind, parse_url, redacted
from limiter.relay.upstream.client import base_url, tls_context

_SLOW_MS = 5.0
_SKEW_S = 2.0
_SAMPLES = 20
_BACKEND_S = 10.0
_BY_THE_LINE = "allow it, by the ACL line below"
_REFUSED = (401, 402, 403, 407)


def acl_line_for(settings: Settings) -> str | None:
    """Return the ACL line of a Redis user for these settings; None where there are no users."""
    if settings.redis.url.startswith("embedded:"):
        return None
    kind, database = _place(settings.redis.url)
    return acl_line(settings.redis.prefix, needed_commands(kind, database=database))


async def examine(settings: Settings) -> list[Finding]:
    """Check everything. Problems are returned, not raised."""
    findings = [*_licences(settings), *_persister(settings), *_open_files(settings), *_models(settings)]
    findings += [finding async for finding in _redis(settings)]
    findings += await asyncio.gather(
        _backend("gemini", settings.backends.gemini, is_on=bool(settings.backends.gemini.api_key.get_secret_value())),
        _backend("hardware", settings.backends.hardware, is_on=bool(settings.backends.hardware.url)),
    )
    return findings


async def _redis(settings: Settings) -> AsyncIterator[Finding]:
    try:
        redis = await open_client(
            settings.redis.url,
            timeout_ms=settings.redis.timeout_ms,
            embedded_maxmemory_mb=settings.redis.embedded_maxmemory_mb,
        )
    except LimiterError as error:
        yield Finding("problem", "redis", str(error), "give another redis.url, or start that Redis")
        return
    try:
        nodes = await primaries_of(redis)
        for node in nodes:
            where = f"redis {_where(node)}" if len(nodes) > 1 else "redis"
            async for finding in _server(node, settings, where):
                yield finding
    except NoPermissionError as error:
        yield Finding("problem", "redis", f"this user may not connect: {error}", _BY_THE_LINE)
    except CLIENT_ERRORS as error:
        advice = "check that it runs, that the URL leads there, and that user and password are right"
        yield Finding("problem", "redis", f"{redacted(settings.redis.url)}: {error}", advice)
    finally:
        await redis.aclose()


async def _server(node: Any, settings: Settings, where: str) -> AsyncIterator[Finding]:
    absent: list[str] = []
    missing = await _missing(node, settings, absent)
    for command in absent:
        yield without_command(where, command)
    if missing:
        yield Finding("problem", where, f"this user may not {missing}", _BY_THE_LINE)
    try:
        info: Mapping[str, Any] = await node.info()
    except NoPermissionError:
        return
    kind, _ = _place(settings.redis.url)
    for finding in inspect(info, subject=where, kind=kind, allow_eviction=settings.redis.allow_eviction):
        yield finding
    for finding in inspect_health(info, subject=where, kind=kind, wait_replicas=settings.redis.wait_replicas):
        yield finding
    for finding in _kept_answers(info, settings, where):
        yield finding
    if missing or absent:
        return
    yield Finding("ok", where, "this user may do all that limiter does")
    yield await _appendfsync(node, info, where)
    yield await _latency(node, where)
    yield await _clock(node, where)


async def _missing(node: Any, settings: Settings, absent: list[str]) -> str:
    """Try each command. Return what the user may not do, "" if it may do everything.

    absent: gets the commands that the server does not know.
    """
    kind, database = _place(settings.redis.url)
    key = Keys(settings.redis.prefix).probe()
    missing = []
    for command, probe in probes(needed_commands(kind, database=database), key):
        try:
            await node.execute_command(*probe)
        except NoPermissionError as error:
            text = str(error)
            if " key" in text:
                return f"touch the keys {settings.redis.prefix}:*"
            if f"'{command}'" not in text:  # denied to the connection itself, in its handshake
                raise
            missing.append(command.replace("|", " ").upper())
        except ResponseError as error:
            if is_unknown_command(error):
                absent.append(command.replace("|", " ").upper())
            continue  # it is permitted: the server refuses it for another reason
    return f"run {', '.join(missing)}" if missing else ""


def _kept_answers(info: Mapping[str, Any], settings: Settings, where: str) -> Iterator[Finding]:
    """Compare the budget of the answers that are kept for repeats with the memory of a server that may hold them."""
    maximum, keep_mb = int(info.get("maxmemory", 0)) >> 20, settings.idempotency.keep_mb
    if maximum and keep_mb > maximum // 2:
        text = f"has a maxmemory of {maximum} MiB, of which idempotency.keep_mb allows {keep_mb} for kept answers"
        yield Finding("warning", where, text, "raise maxmemory, or lower the setting to half of it: rows need the rest")


async def _appendfsync(node: Any, info: Mapping[str, Any], where: str) -> Finding:
    try:
        found = await node.config_get("appendfsync")
    except RedisError:
        return Finding("ok", where, "appendfsync is not visible to this user, which does not need it")
    policy = next((value for name, value in found.items() if _text(name) == "appendfsync"), "")
    if info.get("aof_enabled") and _text(policy) == "no":
        text = "appendfsync is no: a power failure loses what the system has not written yet, up to half a minute"
        return Finding("warning", where, text, "CONFIG SET appendfsync everysec")
    return Finding("ok", where, f"appendfsync {_text(policy)}")


async def _latency(node: Any, where: str) -> Finding:
    samples_ms = []
    for _ in range(_SAMPLES):
        began = time.perf_counter()
        await node.time()
        samples_ms.append((time.perf_counter() - began) * 1000)
    median_ms = statistics.median(samples_ms)
    text = f"answers in {median_ms:.2f} ms (median), {max(samples_ms):.2f} ms (slowest of {_SAMPLES})"
    if median_ms > _SLOW_MS:
        return Finding("warning", where, text, "each request waits for two answers: bring relay and Redis closer")
    return Finding("ok", where, text)


async def _clock(node: Any, where: str) -> Finding:
    seconds, microseconds = await node.time()
    skew_s = time.time() - (int(seconds) + int(microseconds) / 1_000_000)
    text = f"has a clock that is {-skew_s:+.1f} s off from this machine's"
    if abs(skew_s) > _SKEW_S:
        return Finding(
            "warning", where, text, "set both by NTP: licences expire by the one, periods renew by the other"
        )
    return Finding("ok", where, text)


def _licences(settings: Settings) -> list[Finding]:
    keys = settings.licence.public_keys
    try:
        Licences(keys)
    except SettingsError as error:
        return [Finding("problem", "licence", str(error), "`limiter licence keygen` makes a pair of keys")]
    return [Finding("ok", "licence", f"{len(keys)} public keys" if keys else "no public key: every install is core")]


def _persister(settings: Settings) -> list[Finding]:
    if not settings.persister.file:
        return [Finding("ok", "persister", "off: persister.file is empty")]
    path = Path(settings.persister.file).resolve()
    folder = next(each for each in path.parents if each.exists())
    findings = []
    try:
        with tempfile.TemporaryFile(dir=folder):
            findings.append(Finding("ok", "persister", f"{path} can be written"))
    except OSError as error:
        text = f"{folder} cannot be written: {error.strerror}"
        findings.append(
            Finding("problem", "persister", text, "give the user who runs limiter the right, or another file")
        )
    if path.exists():
        findings += _ledger(path)
    return findings


def _ledger(path: Path) -> list[Finding]:
    try:
        with LedgerFile(path) as file:
            next(file.members(), None)
    except LedgerFileError as error:
        return [
            Finding(
                "problem",
                "persister",
                str(error),
                "run `limiter verify` for details; move the file elsewhere if it is not wanted",
            )
        ]
    return []


def _models(settings: Settings) -> Iterator[Finding]:
    """Recommend a list of models where they are Gemini's, which differ in price a hundredfold."""
    if settings.relay.models == "any" and settings.backends.gemini.api_key.get_secret_value():
        text = "one credit buys any model that Gemini has, also its dearest: relay.models is any"
        yield Finding(
            "warning", "models", text, 'name the models to serve in [models], and set relay.models = "listed"'
        )


def _open_files(settings: Settings) -> Iterator[Finding]:
    """Compare the bounds of connections with what a process may open: the relay raises its soft limit to the hard."""
    files, subject = open_files(hard=True), "open files"
    if not files:
        yield Finding("ok", subject, "any number")
        return
    advice = "raise the limit of open files (LimitNOFILE= in systemd), or lower the setting"
    gemini, hardware = settings.backends.gemini, settings.backends.hardware
    used = {"gemini": gemini} if gemini.api_key.get_secret_value() else {}
    bounds = {name: each.max_connections for name, each in used.items()}
    if hardware.url:
        bounds["hardware"] = hardware.max_connections
    clients = settings.relay.max_connections or clients_within(files)
    # A request has one connection to a backend: without bounds there are as many as clients.
    needed = files_for(clients + (min(clients, sum(bounds.values())) if bounds and all(bounds.values()) else clients))
    if settings.relay.max_connections and needed > files:
        text = f"relay.max_connections is {clients}, which needs up to {needed} open files, and ulimit -Hn is {files}"
        yield Finding("warning", subject, text, advice)
    else:
        yield Finding("ok", subject, f"each process takes up to {clients} clients at a time (ulimit -Hn is {files})")
    for name, bound in bounds.items():
        if files_for(bound) > files:
            text = f"backends.{name}.max_connections is {bound}, and ulimit -Hn is {files}"
            yield Finding("warning", subject, text, advice)


async def _backend(name: Backend, backend: BackendSettings, *, is_on: bool) -> Finding:
    """Request a backend's models, as the relay does."""
    subject = f"backends.{name}"
    if not is_on:
        return Finding("ok", subject, "off")
    try:
        base = base_url(name, backend.url)
        tls: Any = tls_context(name, backend.ca_file)
    except SettingsError as error:
        return Finding("problem", subject, str(error), f"change the settings of {subject}")
    shown = str(base.with_user(None).with_query(None)).rstrip("/")
    key = backend.api_key.get_secret_value()
    timeout = aiohttp.ClientTimeout(total=_BACKEND_S, connect=min(backend.connect_s, _BACKEND_S))
    try:
        async with (
            aiohttp.ClientSession(
                timeout=timeout, headers={"Authorization": f"Bearer {key}"} if key else {}
            ) as session,
            session.get(base.joinpath("models").with_query(base.query), allow_redirects=False, ssl=tls) as answer,
        ):
            status = answer.status
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
        text = f"{shown} cannot be reached: {str(error) or type(error).__name__}"
        return Finding("problem", subject, text, f"check that it runs, and that {subject}.url leads there")
    if status in _REFUSED:
        return Finding("problem", subject, f"it refuses the key ({status})", f"set {subject}.api_key")
    if status >= 300:  # noqa: PLR2004  a status
        text = f"{shown}/models answers {status}"
        return Finding("warning", subject, text, f"check that {subject}.url ends as its documentation says, as in …/v1")
    return Finding("ok", subject, f"{shown} answers")


def _place(url: str) -> tuple[Kind, int]:
    """Return the kind of a URL, and its database number."""
    topology = None if url.startswith("embedded:") else parse_url(url)
    if topology is not None:
        return topology.kind, int(topology.database or 0)
    path = url.partition("://")[2].partition("?")[0].rpartition("/")[2]
    return "single", int(path) if path.isdecimal() else 0


def _where(node: "Redis") -> str:
    place = node.connection_pool.connection_kwargs
    return f"{place.get('host')}:{place.get('port')}"


def _text(word: bytes | str) -> str:
    return word.decode() if isinstance(word, bytes) else word
