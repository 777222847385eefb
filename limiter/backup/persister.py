"""The task that dumps all rows every interval: the writer of the fleet, or a standby that can take over.

It decides when to dump and by which process; `dump` decides how.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from limiter._util.atomic_file import in_thread
from limiter._util.cancellation import CancelWatch
from limiter.backup.dump import DumpReport, dump
from limiter.backup.lease import Lease, LeaseState
from limiter.backup.publish import Writer
from limiter.config.settings import PersisterSettings
from limiter.credits.session import Session
from limiter.errors import LimiterError
from limiter.ledger.rotation import KEEP
from limiter.ledger.trailer import DumpedFile, Trailer, read_trailer
from limiter.log_events import event

OnChange = Callable[[Mapping[str, object]], None]
_LOG = logging.getLogger("limiter")
LEASE_S = 30.0
_RENEWALS = 3  # within a lease's time: two may fail before it expires


class Persister:
    """Dumps at once and then every interval, counted from the end of a dump, until it is stopped; then once more.

    While another persister has the lease, this one is a standby. Use it as `async with Persister(…):`, or run `run()`
    as a task and call `stop()`. An error is logged and shown in `report`, and the dump is retried after the interval.
    Cancelling `run()` ends it without the last dump.
    """

    def __init__(
        self,
        session: Session,
        path: Path,
        *,
        interval_s: float,
        keep: int = KEEP,
        lease_s: float = LEASE_S,
        on_change: OnChange | None = None,
    ) -> None:
        self._on_change = on_change
        self.last_error: str | None = None
        self.last_report: DumpReport | None = None
        self._good_at = ""
        self._session, self._path, self._interval_s, self._keep = session, path, interval_s, keep
        self._lease = Lease(session, lease_s=lease_s)
        self._leased: LeaseState | None = None
        self._file: DumpedFile | None = None
        self._stopped = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self.run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if self._task is not None:
            await self._task

    @property
    def last_good_at(self) -> str | None:
        """The time of the last good dump, by this persister or by the fleet; None if there is none."""
        noted = self._leased.good_at if self._leased is not None else ""
        return max(self._good_at, noted) or None

    @property
    def role(self) -> str:
        """Its role now: `writer`, `standby`, or `starting` before the first reply of Redis."""
        return "starting" if self._leased is None else "writer" if self._leased.is_mine else "standby"

    async def run(self) -> None:
        """Dump until `stop()`, and once after it."""
        cancel = CancelWatch()
        async with self._lease.kept(renew_every_s=self._lease.lease_s / _RENEWALS, renew=self._renew):
            while not self._stopped.is_set():
                await self._turn()
                self._notify()
                cancel.check()
                try:
                    async with asyncio.timeout(self._pause_s()):
                        await self._stopped.wait()
                except TimeoutError:
                    continue
            await self._turn()
        await self._release()

    def stop(self) -> None:
        """Make `run()` end after one more dump."""
        self._stopped.set()

    def report(self) -> Mapping[str, object]:
        """Return the state of the dumps, for readiness: the writer, the last good dump, and the error since, if any."""
        return {
            "file": str(self._path),
            "role": self.role,
            "epoch": None if self._leased is None else self._leased.epoch,
            "writer": None if self._leased is None else self._leased.owner,
            "last_good_at": self.last_good_at,
            "error": self.last_error,
        }

    def _pause_s(self) -> float:
        """Return the seconds until the next dump or, as standby, until the next attempt to take the lease."""
        return min(self._interval_s, self._lease.lease_s / _RENEWALS) if self.role == "standby" else self._interval_s

    async def _turn(self) -> None:
        try:
            await self._take_lease()
        except LimiterError as error:
            self._failed(error)
            return
        if self._leased is not None and self._leased.is_mine:
            await self._dump(self._leased)
        else:
            self.last_error = None

    def _notify(self) -> None:
        if self._on_change is not None:
            self._on_change(self.report())

    async def _take_lease(self) -> None:
        """Take the lease, or renew it."""
        before, role = self._leased, self.role
        trailer = await in_thread(_trailer_of, self._path)
        self._leased = await self._lease.take(least_epoch=trailer.epoch if trailer else 0, good_at=self._good_at)
        if self.role != role or (before is not None and before.owner != self._leased.owner):
            _LOG.info(
                "The persister is %s",
                self.role,
                extra=event(
                    "persister_role_changed", role=self.role, epoch=self._leased.epoch, writer=self._leased.owner
                ),
            )
            self._notify()

    async def _renew(self) -> LeaseState | None:
        """Keep the lease through long dumps and long intervals."""
        if self.role == "writer":
            await self._take_lease()
        return self._leased

    async def _release(self) -> None:
        if self.role == "writer":
            try:
                await self._lease.release()
            except LimiterError as error:
                _LOG.debug("The lease was not released, and will expire: %s", error, extra=event("lease_not_released"))

    async def _dump(self, leased: LeaseState) -> None:
        try:
            if self.last_report is None:  # later, a missing folder may be a disk that is not mounted
                await in_thread(self._path.parent.mkdir, parents=True, exist_ok=True)
            report = await dump(
                self._session, self._path, keep=self._keep, last=self._file, writer=Writer(self._lease, leased)
            )
        except (LimiterError, OSError) as error:
            self._failed(error)
        except Exception as error:  # noqa: BLE001  a bug must not end the task, and all dumps with it
            self.last_error = repr(error)
            _LOG.exception("A bug ended a dump: the file was not written", extra=event("dump_failed"))
        else:
            self._note(report)

    def _failed(self, error: Exception) -> None:
        self.last_error = str(error)
        _LOG.error("The file was not written: %s", error, extra=event("dump_failed"))

    def _note(self, report: DumpReport) -> None:
        self.last_report, self._file = report, report.file
        if report.is_set_aside:
            _LOG.warning(
                "%s may have had rows that Redis does not have: it was kept as %s",
                report.path,
                report.kept,
                extra=event("dump_set_aside"),
            )
        if report.clean:
            self._good_at, self.last_error = report.time, None
            return
        self.last_error = f"{report.broken} rows are not in {report.path}: see {report.broken_file}"
        _LOG.error("%s; the first: %s", self.last_error, report.first_broken[0], extra=event("dump_incomplete"))


def make_persister(session: Session, settings: PersisterSettings, *, on_change: OnChange | None = None) -> Persister:
    """Return the persister of these settings. on_change: called with each new report."""
    return Persister(
        session,
        Path(settings.file),
        interval_s=settings.interval_s,
        keep=settings.keep,
        lease_s=settings.lease_s,
        on_change=on_change,
    )


def _trailer_of(path: Path) -> Trailer | None:
    try:
        return read_trailer(path)
    except OSError:
        return None  # the dump will report what is wrong with it
