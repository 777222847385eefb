"""One typed method per script of what the relay keeps in Redis beside the rows: claims, seats, counts of new installs.

Every key here has a TTL. Nothing here touches a row, or decides what a client is told.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, TypeVar, cast

from limiter.credits.limiter import CreditLimiter
from limiter.credits.scripts import Scripts
from limiter.redis.errors import with_timeout

T = TypeVar("T")
_SEATS_OUTLIVE_S = 30 * 86_400  # a licence that is renewed a little late finds its installs seated
_LATEST_MS = 4_102_444_800_000  # the year 2100: a licence "for ever" must still be a time that Redis takes


class ClaimStatus(StrEnum):
    """What claim.lua, keep.lua and drop.lua did or found."""

    CLAIMED = "CLAIMED"
    RUNNING = "RUNNING"
    KEPT = "KEPT"
    SPENT = "SPENT"
    BUSY = "BUSY"
    REUSED = "REUSED"
    LOST = "LOST"
    DROPPED = "DROPPED"
    GONE = "GONE"


class SeatStatus(StrEnum):
    """What seat.lua did."""

    SEATED = "SEATED"
    FULL = "FULL"


class MintStatus(StrEnum):
    """What mint.lua did."""

    MINTED = "MINTED"
    LIMITED = "LIMITED"
    RETURNED = "RETURNED"


@dataclass(frozen=True, slots=True)
class Claimed:
    """What claim.lua answered; `answer` is as `keep` was given it, empty but for KEPT."""

    status: ClaimStatus
    answer: bytes


@dataclass(frozen=True, slots=True)
class Seat:
    """An install on a licence's seat; times are epoch milliseconds."""

    install_id: str
    seated_ms: int
    used_ms: int


@dataclass(frozen=True, slots=True)
class Mint:
    """What mint.lua answered. wait_ms: until the next new install is let through, 0 unless LIMITED."""

    status: MintStatus
    wait_ms: int


class Call(Protocol):
    """Runs an operation on Redis, or refuses to: `RedisAvailability.call`, which fails at once while Redis is away."""

    async def __call__(self, operation: Callable[[], Awaitable[T]], /) -> T:
        """Run it. Raises what it raises, and LimiterUnavailable."""
        ...


async def _at_once(operation: Callable[[], Awaitable[T]]) -> T:
    return await operation()


class Stores:
    """The relay's own keys, on the Redis, prefix, clock and deadline of a limiter. Methods raise LimiterUnavailable."""

    __slots__ = ("_call", "_limiter", "_scripts", "_timeout_ms", "keys")

    def __init__(self, limiter: CreditLimiter, *, timeout_ms: int = 1000, call: Call = _at_once) -> None:
        self._limiter = limiter
        self._call = call
        self._timeout_ms = timeout_ms
        self._scripts = Scripts(limiter.channel, timeout_ms=timeout_ms)
        self.keys = limiter.keys

    @property
    def hold_ms(self) -> int:
        """How long a hold lives."""
        return self._limiter.hold_ms

    async def claim(
        self,
        claim_key: str,
        owner: str,
        fingerprint: str,
        *,
        claim_ms: int,
        attempt: int | None = None,
        missed_ms: int | None = None,
    ) -> Claimed:
        """Run claim.lua. A repeat by the same owner gives the same answer again.

        attempt: its number, where clients count them; 0 is always a new request. missed_ms: how long ago the first one
        ended without a claim: what was begun before that is another request's.
        """
        reply = await self._repeated(
            lambda: self._scripts.call(
                "claim",
                claim_key,
                owner,
                fingerprint,
                claim_ms,
                attempt,
                missed_ms,
                self._now_ms(),
            )
        )
        return Claimed(ClaimStatus(reply[0].decode()), reply[1])

    async def keep(
        self, claim_key: str, owner: str, fingerprint: str, *, keep_ms: int, answer: bytes = b"", busy_ms: int = 0
    ) -> ClaimStatus:
        """Run keep.lua: KEPT, or LOST when another attempt has the claim. After one without `busy_ms` it is final."""
        reply = await self._repeated(
            lambda: self._scripts.call("keep", claim_key, owner, fingerprint, busy_ms, answer, keep_ms, self._now_ms())
        )
        return ClaimStatus(reply[0].decode())

    async def drop(self, claim_key: str, owner: str) -> ClaimStatus:
        """Run drop.lua: DROPPED, GONE, or KEPT when it was served."""
        reply = await self._repeated(lambda: self._scripts.call("drop", claim_key, owner))
        return ClaimStatus(reply[0].decode())

    async def seat(self, subject: str, install_id: str, *, seats: int, expires_s: int) -> SeatStatus:
        """Run seat.lua. expires_s: the licence's `exp`; its seats are forgotten a month later."""
        lapses_ms = min((expires_s + _SEATS_OUTLIVE_S) * 1000, _LATEST_MS)
        reply = await self._repeated(
            lambda: self._scripts.call("seat", self.keys.seats(subject), install_id, seats, lapses_ms, self._now_ms())
        )
        return SeatStatus(reply[0].decode())

    async def seats(self, subject: str) -> list[Seat]:
        """List who has a seat of a subject's licence, the last used first."""
        key = self.keys.seats(subject)
        fields = await self._repeated(lambda: self._plain(self._limiter.redis.hgetall(key), key))
        seats = []
        for install_id, times in cast("dict[bytes, bytes]", fields).items():
            seated_ms, _, used_ms = times.decode().partition(" ")
            seats.append(Seat(install_id.decode(), int(seated_ms), int(used_ms)))
        return sorted(seats, key=lambda seat: (-seat.used_ms, seat.install_id))

    async def free(self, subject: str, install_id: str) -> bool:
        """Take an install off its seat. False when it had none."""
        key = self.keys.seats(subject)
        # Not repeated: the second answer would be "it had none".
        freed = await self._call(lambda: self._plain(self._limiter.redis.hdel(key, install_id), key))
        return bool(freed)

    async def mint(self, network: str | None, *, limit: int, period_ms: int) -> Mint:
        """Run mint.lua for one new install of a network, or of all. Never repeated once it may have counted."""
        return await self._mint(network, limit, period_ms, 0)

    async def return_mint(self, network: str | None, *, limit: int, period_ms: int) -> Mint:
        """Run mint.lua to give back what `mint` counted."""
        return await self._mint(network, limit, period_ms, 1)

    async def _mint(self, network: str | None, limit: int, period_ms: int, returns: int) -> Mint:
        status, wait_ms = await self._repeated(
            lambda: self._scripts.call("mint", self.keys.mint(network), limit, period_ms, returns, self._now_ms()),
            when_unknown=False,
        )
        return Mint(MintStatus(status.decode()), wait_ms)

    def _now_ms(self) -> int | None:
        return None if self._limiter.clock is None else self._limiter.clock()

    async def _repeated(self, attempt: Callable[[], Awaitable[T]], *, when_unknown: bool = True) -> T:
        # One deadline and one rule about repeats for every script: the limiter's.
        return await self._call(lambda: self._limiter.repeated(attempt, when_unknown=when_unknown))

    async def _plain(self, command: Awaitable[T], key: str) -> T:
        return await with_timeout(command, key, timeout_ms=self._timeout_ms)
