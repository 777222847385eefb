"""The installs on a licence's seats, counted in Redis across all nodes."""

from dataclasses import dataclass
from enum import StrEnum
from typing import cast

from limiter.credits.session import Session

_OUTLIVE_LICENCE_S = 30 * 86_400  # a licence that is renewed a little late keeps its seats
_MAX_EXPIRY_MS = 4_102_444_800_000  # the year 2100: a licence "for ever" must still be a time that Redis accepts


class SeatStatus(StrEnum):
    """The result of licence_seat.lua."""

    SEATED = "SEATED"
    FULL = "FULL"


@dataclass(frozen=True, slots=True)
class Seat:
    """An install on a licence's seat; times are epoch milliseconds."""

    install_id: str
    seated_ms: int
    used_ms: int


class Seats:
    """The seats of all licences on one session. Methods raise LimiterUnavailable."""

    __slots__ = ("_scripts", "_session")

    def __init__(self, session: Session) -> None:
        self._session = session
        self._scripts = session.scripts()

    async def take(self, subject: str, install_id: str, *, seats: int, expires_s: int) -> SeatStatus:
        """Seat an install, or record that it uses its seat. Run licence_seat.lua.

        Args:
            subject: of the licence.
            install_id: the install.
            seats: how many the licence has.
            expires_s: the licence's `exp`, in epoch seconds; its seats expire a month later.
        """
        key = self._session.keys.seats(subject)
        expires_ms = min((expires_s + _OUTLIVE_LICENCE_S) * 1000, _MAX_EXPIRY_MS)
        reply = await self._session.retry(
            lambda: self._scripts.call("licence_seat", key, install_id, seats, expires_ms, self._session.now_ms())
        )
        return SeatStatus(reply[0].decode())

    async def list(self, subject: str) -> list[Seat]:
        """Return the seats of a subject's licence, the last used first."""
        key = self._session.keys.seats(subject)
        fields = await self._session.retry(lambda: self._session.command(self._session.redis.hgetall(key), key))
        seats = []
        for install_id, times in cast("dict[bytes, bytes]", fields).items():
            seated_ms, _, used_ms = times.decode().partition(" ")
            seats.append(Seat(install_id.decode(), int(seated_ms), int(used_ms)))
        return sorted(seats, key=lambda seat: (-seat.used_ms, seat.install_id))

    async def free(self, subject: str, install_id: str) -> bool:
        """Free an install's seat. Return whether it had one."""
        key = self._session.keys.seats(subject)
        # Not repeated: the second answer would be "it had none".
        freed = await self._session.once(lambda: self._session.command(self._session.redis.hdel(key, install_id), key))
        return bool(freed)
