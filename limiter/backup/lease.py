"""Who may replace the ledger's file: one persister of the fleet, by a lease in Redis with a growing epoch.

It knows no file. A lease alone does not keep a paused process from writing: `publishing` asks for it again at the
last moment, under the lock of the file's folder.
"""

import os
import socket
import uuid
from dataclasses import dataclass
from enum import StrEnum

from limiter.credits.session import Session


class LeaseStatus(StrEnum):
    """What lease.lua did."""

    LEASED = "LEASED"
    STANDBY = "STANDBY"
    RETURNED = "RETURNED"


@dataclass(frozen=True, slots=True)
class LeaseState:
    """What lease.lua answered.

    owner: who has the lease. checksum: of the file that was published last, or was about to be. good_at: the time of
    the fleet's last good dump, or "".
    """

    status: LeaseStatus
    epoch: int
    owner: str
    checksum: str
    good_at: str

    @property
    def is_mine(self) -> bool:
        """Whether the caller has it."""
        return self.status is LeaseStatus.LEASED


class Lease:
    """The way to a lease; without `key` the persisters'. Methods raise LimiterUnavailable, and may be repeated."""

    def __init__(self, session: Session, *, lease_s: float, owner: str | None = None, key: str | None = None) -> None:
        self.lease_s = lease_s
        self.owner = owner or f"{socket.gethostname()[:48]}:{os.getpid()}:{uuid.uuid4().hex[:12]}"
        self._session = session
        self._scripts = session.scripts(timeout_ms=1000)
        self._key = key or session.keys.lease()

    async def take(self, *, least_epoch: int = 0, checksum: str = "", good_at: str = "") -> LeaseState:
        """Take the lease or keep it, for another `lease_s`. Run lease.lua."""
        return await self._call(least_epoch, max(1, round(self.lease_s * 1000)), checksum, good_at)

    async def give_back(self) -> LeaseState:
        """Let another take it at once; without any effect when it is another's."""
        return await self._call(0, 0, "", "")

    async def _call(self, least_epoch: int, lease_ms: int, checksum: str, good_at: str) -> LeaseState:
        status, epoch, owner, noted, good = await self._session.retry(
            lambda: self._scripts.call(
                "lease",
                self._key,
                self.owner,
                least_epoch,
                lease_ms,
                checksum,
                good_at,
                self._session.now_ms(),
            )
        )
        return LeaseState(LeaseStatus(status.decode()), epoch, owner.decode(), noted.decode(), good.decode())
