"""The right to replace the ledger's file, of one persister in the fleet: a lease in Redis with a growing epoch.

It does not use the file. A lease alone does not keep a paused process from writing: `publish` renews it once more
at the last moment, under the lock of the file's folder.
"""

import asyncio
import logging
import os
import socket
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum

from limiter._util.cancellation import CancelWatch
from limiter.credits.session import Session
from limiter.errors import LimiterError
from limiter.log_events import event

_LOG = logging.getLogger("limiter")


class LeaseStatus(StrEnum):
    """The result of lease.lua."""

    LEASED = "LEASED"
    STANDBY = "STANDBY"
    RETURNED = "RETURNED"


@dataclass(frozen=True, slots=True)
class LeaseState:
    """The reply of lease.lua.

    Args:
        status: its result.
        epoch: increases each time that the lease gets a new owner.
        owner: of the lease now.
        checksum: of the file that was published last, or was about to be.
        good_at: the time of the fleet's last good dump, or "".
    """

    status: LeaseStatus
    epoch: int
    owner: str
    checksum: str
    good_at: str

    @property
    def is_mine(self) -> bool:
        """Whether the caller has the lease."""
        return self.status is LeaseStatus.LEASED


class LeaseLost(LimiterError):  # noqa: N818  names the thing, as UnknownTier does
    """Another owner had the lease meanwhile. owner: of the lease now, "" if it is free again."""

    def __init__(self, owner: str) -> None:
        super().__init__(f"the lease was lost to {owner}" if owner else "the lease expired, and another had it")
        self.owner = owner


class Lease:
    """A lease by its key, by default that of the persisters. Methods are idempotent, and raise LimiterUnavailable."""

    def __init__(self, session: Session, *, lease_s: float, owner: str | None = None, key: str | None = None) -> None:
        self.lease_s = lease_s
        self.owner = owner or f"{socket.gethostname()[:48]}:{os.getpid()}:{uuid.uuid4().hex[:12]}"
        self._session = session
        self._scripts = session.scripts(timeout_ms=1000)
        self._key = key or session.keys.lease()

    async def take(self, *, least_epoch: int = 0, checksum: str = "", good_at: str = "") -> LeaseState:
        """Take the lease or renew it, for another `lease_s`. Run lease.lua."""
        return await self._call(least_epoch, max(1, round(self.lease_s * 1000)), checksum, good_at)

    async def release(self) -> LeaseState:
        """Release the lease, so that others can take it at once. Has no effect if another owner has it."""
        return await self._call(0, 0, "", "")

    @asynccontextmanager
    async def kept(
        self,
        *,
        renew_every_s: float,
        since: LeaseState | None = None,
        renew: Callable[[], Awaitable[LeaseState | None]] | None = None,
    ) -> AsyncIterator["LeaseKeeper"]:
        """Renew the lease in a task of its own until the block ends. It neither takes it nor releases it.

        A failed renewal is only logged, for the next one may succeed: an expired lease is noticed when it is needed, by
        `LeaseKeeper.check` or by the next `take`.

        Args:
            renew_every_s: seconds between renewals; several should fit into `lease_s`.
            since: the result of taking it. With it, the keeper stops once another owner has had the lease, and `check`
                raises; without it, the keeper goes on.
            renew: the call that renews it; by default `take`.
        """
        keeper = LeaseKeeper(self, since, renew or self.take)
        keeping = asyncio.create_task(keeper.keep(renew_every_s))
        try:
            yield keeper
        finally:
            keeping.cancel()
            await asyncio.wait({keeping})

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


class LeaseKeeper:
    """Renews a lease, and notes if another owner has had it. Created by `Lease.kept`."""

    def __init__(
        self, lease: Lease, since: LeaseState | None, renew: Callable[[], Awaitable[LeaseState | None]]
    ) -> None:
        self._lease, self._since, self._renew = lease, since, renew
        self._renewed_s = time.monotonic()
        self._lost_to: str | None = None

    async def check(self) -> None:
        """Raise LeaseLost if another owner has had the lease since it was taken, even if it is free again.

        Raises LimiterUnavailable if that cannot be known.
        """
        # It should have been renewed by then: this process was paused.
        if time.monotonic() - self._renewed_s > self._lease.lease_s / 2:
            await self._renew_once()
        if self._lost_to is not None:
            raise LeaseLost(self._lost_to)

    async def keep(self, every_s: float) -> None:
        """Renew the lease until it is lost."""
        cancel = CancelWatch()
        while self._lost_to is None:
            await asyncio.sleep(every_s)
            try:
                await self._renew_once()
            except LimiterError as error:
                _LOG.debug("The lease was not renewed: %s", error, extra=event("lease_not_renewed"))
            cancel.check()

    async def _renew_once(self) -> None:
        called_s = time.monotonic()
        state = await self._renew()
        self._renewed_s = called_s
        if self._since is None or state is None:
            return
        if not state.is_mine:
            self._lost_to = state.owner
        elif state.epoch != self._since.epoch:
            self._lost_to = ""
