"""One typed method for each script about the claims of Idempotency-Keys. Every key has a TTL.

Nothing here touches a row, or decides how a client is answered.
"""

from dataclasses import dataclass
from enum import StrEnum

from limiter.credits.session import Session


class ClaimStatus(StrEnum):
    """The status that one of the idempotency scripts returns."""

    CLAIMED = "CLAIMED"
    RUNNING = "RUNNING"
    KEPT = "KEPT"
    SPENT = "SPENT"
    LIMITED = "LIMITED"
    BUSY = "BUSY"
    REUSED = "REUSED"
    LOST = "LOST"
    DROPPED = "DROPPED"
    GONE = "GONE"
    COUNTED = "COUNTED"
    EXCEEDED = "EXCEEDED"


@dataclass(frozen=True, slots=True)
class Claimed:
    """The reply of idempotency_claim.lua.

    Attributes:
        status: what became of the claim.
        answer: the recorded one if the status is KEPT, else empty.
        wait_ms: how long the answer is not returned any more if the status is LIMITED, in milliseconds.
    """

    status: ClaimStatus
    answer: bytes
    wait_ms: int = 0


class Claims:
    """The claims on one session. Methods raise LimiterUnavailable."""

    __slots__ = ("_scripts", "_session", "keys")

    def __init__(self, session: Session) -> None:
        self._session = session
        self._scripts = session.scripts()
        self.keys = session.keys

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
        """Run idempotency_claim.lua: claim a key for an attempt. A repeat by the same owner gets the same reply again.

        Args:
            claim_key: from `Keys`.
            owner: the attempt's id.
            fingerprint: that of the request; another one under the same key is REUSED or BUSY.
            claim_ms: how long the claim lives, in milliseconds.
            attempt: its number, if the client counts them; 0 is always a new request.
            missed_ms: how long ago the first attempt ended without a claim: an earlier record is another request's.
        """
        reply = await self._session.retry(
            lambda: self._scripts.call(
                "idempotency_claim", claim_key, owner, fingerprint, claim_ms, attempt, missed_ms, self._session.now_ms()
            )
        )
        return Claimed(ClaimStatus(reply[0].decode()), *reply[1:])

    async def record(
        self, claim_key: str, owner: str, fingerprint: str, *, keep_ms: int, busy_ms: int = 0
    ) -> ClaimStatus:
        """Run idempotency_record.lua: record that an attempt was served. Return KEPT, or LOST if another has the claim.

        It works also while Redis is out of memory.

        Args:
            claim_key: from `Keys`.
            owner: the attempt's id.
            fingerprint: that of the request.
            keep_ms: how long the record is kept, in milliseconds.
            busy_ms: how long the attempt may still run, in milliseconds; 0 for a final record.
        """
        reply = await self._session.retry(
            lambda: self._scripts.call(
                "idempotency_record", claim_key, owner, fingerprint, busy_ms, keep_ms, self._session.now_ms()
            )
        )
        return ClaimStatus(reply[0].decode())

    async def keep(self, claim_key: str, owner: str, fingerprint: str, *, keep_ms: int, answer: bytes) -> ClaimStatus:
        """Run idempotency_keep.lua: record that an attempt was served, with the packed answer; like `record`.

        Raises OutOfMemory.
        """
        reply = await self._session.retry(
            lambda: self._scripts.call(
                "idempotency_keep", claim_key, owner, fingerprint, answer, keep_ms, self._session.now_ms()
            )
        )
        return ClaimStatus(reply[0].decode())

    async def count_kept(self, kept_key: str, size_b: int, *, budget_b: int, keep_ms: int) -> bool:
        """Run idempotency_budget.lua: count bytes that are to be kept. Return False if the budget has no room for them.

        Args:
            kept_key: from `Keys`.
            size_b: the bytes.
            budget_b: for all that is kept at a time, in bytes.
            keep_ms: how long these are kept, in milliseconds.
        """
        reply = await self._session.retry(
            lambda: self._scripts.call(
                "idempotency_budget", kept_key, size_b, budget_b, keep_ms, self._session.now_ms()
            )
        )
        return ClaimStatus(reply[0].decode()) is ClaimStatus.COUNTED

    async def drop(self, claim_key: str, owner: str) -> ClaimStatus:
        """Run idempotency_drop.lua for an attempt that was not served: DROPPED, GONE, or KEPT if it was served."""
        reply = await self._session.retry(lambda: self._scripts.call("idempotency_drop", claim_key, owner))
        return ClaimStatus(reply[0].decode())
