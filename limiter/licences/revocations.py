"""Revoked licences: the list in Redis, and the copy of it that each relay process keeps.

A licence is revoked by its subject, with all others of that customer, or alone by its id. The copy is compared with the
list once a second, so a request costs no call to Redis for it.
"""

import asyncio
import logging
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Self, cast

from limiter._util.ids import random_id
from limiter.credits.session import Session
from limiter.errors import LimiterError
from limiter.log_events import event

MAX_REVOKED = 10_000  # a relay holds all of them in memory: a few megabytes
MAX_NAME_BYTES = 512
_NEVER_MS = 4_102_444_800_000  # the year 2100: the expiry of a licence that is not known
_KEPT_S = 86_400  # after a licence has expired, and whatever the clocks say
_EVERY_S = 1.0
_VERSION = ""  # the field with the list's version; no subject is empty
_LOG = logging.getLogger("limiter.relay")


class RevocationStatus(StrEnum):
    """The result of licence_revoke.lua."""

    REVOKED = "REVOKED"
    RESTORED = "RESTORED"
    GONE = "GONE"
    FULL = "FULL"


@dataclass(frozen=True, slots=True)
class Revocation:
    """An entry of the list. name: a subject or an id. expires_ms: when it is forgotten; None if it is kept for good."""

    name: str
    revoked_ms: int
    expires_ms: int | None


class Revocations:
    """The list in Redis. Methods raise LimiterUnavailable."""

    __slots__ = ("_key", "_scripts", "_session")

    def __init__(self, session: Session) -> None:
        self._session = session
        self._scripts = session.scripts()
        self._key = session.keys.revoked()

    async def revoke(self, name: str, *, expires_s: int | None = None) -> RevocationStatus:
        """Revoke all licences of a subject, or the one with an id. Run licence_revoke.lua.

        Args:
            name: the subject or the id.
            expires_s: the licence's `exp`, in epoch seconds, where it is known: after it the entry is not needed.
        """
        if len(name.encode(errors="surrogatepass")) > MAX_NAME_BYTES:
            raise LimiterError(
                f"a name of more than {MAX_NAME_BYTES} bytes cannot be revoked: revoke its licence by id"
            )
        return await self.change(name, _NEVER_MS if expires_s is None else min((expires_s + _KEPT_S) * 1000, _NEVER_MS))

    async def restore(self, name: str) -> RevocationStatus:
        """Undo `revoke`. Run licence_revoke.lua."""
        return await self.change(name, 0)

    async def list(self) -> list[Revocation]:
        """Return the entries, the last revoked first."""
        fields, now_ms = await self.fields(), await self._session.retry(self._session.server_time_ms)
        entries = []
        for name, times in fields.items():
            revoked_ms, _, expires = times.decode().partition(" ")
            if name and int(expires) > now_ms:
                expires_ms = None if int(expires) >= _NEVER_MS else int(expires)
                entries.append(Revocation(name.decode(errors="replace"), int(revoked_ms), expires_ms))
        return sorted(entries, key=lambda entry: (-entry.revoked_ms, entry.name))

    async def fields(self) -> dict[bytes, bytes]:
        """Return the list as Redis has it, with its version."""
        session, key = self._session, self._key
        return cast("dict[bytes, bytes]", await session.retry(lambda: session.command(session.redis.hgetall(key), key)))

    async def version(self) -> bytes | None:
        """Return the version, which every change of the list changes; None while nothing is revoked."""
        session, key = self._session, self._key
        version = await session.once(lambda: session.command(session.redis.hget(key, _VERSION), key))
        return cast("bytes | None", version)

    async def change(
        self, name: str, expires_ms: int, *, version: str | None = None, limit: int = MAX_REVOKED
    ) -> RevocationStatus:
        """Run licence_revoke.lua. expires_ms: 0 restores. version: by default a random one."""
        arguments = (name, expires_ms, version or random_id(), limit, self._session.now_ms())
        reply = await self._session.retry(lambda: self._scripts.call("licence_revoke", self._key, *arguments))
        return RevocationStatus(reply[0].decode())


class RevokedNames:
    """A process's copy of the list: `name in revoked`. Use it as `async with RevokedNames(…):`, which keeps it fresh.

    While Redis is unavailable, what was read last counts.
    """

    def __init__(self, session: Session) -> None:
        self._list = Revocations(session)
        self._names: frozenset[str] = frozenset()
        self._version: bytes | None = None
        self._is_known = True
        self._task: asyncio.Task[None] | None = None

    def __contains__(self, name: object) -> bool:
        return name in self._names

    async def __aenter__(self) -> Self:
        await self.refresh()
        self._task = asyncio.create_task(self._refresh_for_ever(), name="revoked licences")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def refresh(self) -> None:
        """Read the list, if it has changed. A failure is logged, but the next ones in a row are not."""
        try:
            if await self._list.version() == self._version:
                self._is_known = True
                return
            fields = await self._list.fields()
        except Exception as error:  # noqa: BLE001  a bug must not end the task: no revocation would be seen any more
            if self._is_known:
                _LOG.warning(
                    "The revoked licences were not read: the list that was read last counts (%s)",
                    error,
                    extra=event("revocations_not_read"),
                )
            self._is_known = False
            return
        self._version = fields.pop(_VERSION.encode(), None)
        self._names = frozenset(name.decode(errors="surrogatepass") for name in fields)
        self._is_known = True

    async def _refresh_for_ever(self) -> None:
        while True:
            await asyncio.sleep(_EVERY_S)
            await self.refresh()
