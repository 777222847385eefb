"""The rules of the credits once more, in plain Python and one dict: what the scripts are compared with.

Written from the rules and not from the Lua: dates step month by month over `datetime`, holds are summed afresh each
time, and nothing is packed. It answers with the library's own values, so that a comparison is one `==`.
"""

import calendar
import math
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from limiter import Balance, Decision, DecisionStatus, PutStatus, Reason, Row, Settlement, SettlementStatus, Tier, Tiers
from limiter.credits.models import MAX_COUNT, Backend, Counter, Leave, StreamStatus
from limiter.credits.scripts import PutMode

GRACE_MS = 60 * 60 * 1000  # in which a lapsed hold still shows in the row
HOUR_MS = 60 * 60 * 1000
RETRIES = 20  # of a request that was left, in which it is the same leave
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def moment(ms: int) -> datetime:
    return _EPOCH + timedelta(milliseconds=ms)


def epoch_ms(when: datetime) -> int:
    return (when - _EPOCH) // timedelta(milliseconds=1)


def parse(text: str) -> datetime:
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC)


def iso(when: datetime) -> str:
    return when.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def next_renewal(began: datetime, anniversary_day: int) -> datetime:
    """One calendar month on, on the anniversary day or the last day of a shorter month, without milliseconds."""
    year, month = (began.year + 1, 1) if began.month == 12 else (began.year, began.month + 1)
    _, length = calendar.monthrange(year, month)
    return began.replace(year=year, month=month, day=min(anniversary_day, length), microsecond=0)


@dataclass
class Held:
    backend: Backend
    tier: str
    counter: Counter
    cost: int
    expires_ms: int

    def is_live(self, now_ms: int) -> bool:
        return now_ms < self.expires_ms

    def is_dead(self, now_ms: int) -> bool:
        return self.expires_ms + GRACE_MS <= now_ms


@dataclass
class Account:
    """One install's row."""

    began: datetime
    anniversary_day: int
    last_active: datetime
    tier_snapshot: str = "core"
    consumed: dict[Counter, int] = field(default_factory=lambda: {"lifetime": 0, "monthly": 0})
    on_gemini: dict[Counter, int] = field(default_factory=lambda: {"lifetime": 0, "monthly": 0})
    extra: str = ""
    holds: dict[str, Held] = field(default_factory=dict)
    rate_until_ms: int = 0
    left_until_ms: int = 0
    streams: dict[str, int] = field(default_factory=dict)
    left: dict[str, tuple[int, int]] = field(default_factory=dict)

    def rolled_over(self, now: datetime) -> "Account":
        """This row as it stands at that time; a copy."""
        account = deepcopy(self)
        while next_renewal(account.began, account.anniversary_day) <= now:
            account.began = next_renewal(account.began, account.anniversary_day)
            account.consumed["monthly"] = account.on_gemini["monthly"] = 0
        return account

    def live(self, now_ms: int) -> list[Held]:
        return [held for held in self.holds.values() if held.is_live(now_ms)]

    def drop_dead(self, now_ms: int) -> None:
        self.holds = {hold_id: held for hold_id, held in self.holds.items() if not held.is_dead(now_ms)}

    def drop_dead_marks(self, now_ms: int) -> None:
        self.streams = {name: until_ms for name, until_ms in self.streams.items() if now_ms < until_ms + GRACE_MS}
        self.left = {request: mark for request, mark in self.left.items() if now_ms < mark[0]}

    def in_flight(self, now_ms: int) -> int:
        return len(self.live(now_ms)) + sum(now_ms < until_ms for until_ms in self.streams.values())

    def rate_wait_ms(self, tier: Tier, now_ms: int) -> int:
        """How long until there is room for one more request in the rate; it is clamped to what a burst may use."""
        if tier.rate_ms is None or tier.burst_ms is None:
            return 0
        used = min(max(self.rate_until_ms - now_ms, 0), tier.burst_ms)
        return max(0, used + tier.rate_ms - tier.burst_ms)

    def use_rate(self, tier: Tier, now_ms: int) -> None:
        if tier.rate_ms is not None and self.rate_wait_ms(tier, now_ms) == 0:
            self.rate_until_ms = max(self.rate_until_ms, now_ms) + tier.rate_ms

    def is_beyond(self, free_leaves: int | None, now_ms: int) -> bool:
        """Take one of the free leaves; return whether there is none."""
        used = max(self.left_until_ms - now_ms, 0)
        if free_leaves is not None:
            used = min(used, free_leaves * HOUR_MS)
            if used + HOUR_MS > free_leaves * HOUR_MS:
                return True
        self.left_until_ms = now_ms + used + HOUR_MS
        return False

    def debit(self, held: Held, *, backend: Backend, cost: int, now: datetime, tiers: Tiers) -> None:
        was_lifetime = self.tier_snapshot in tiers and tiers[self.tier_snapshot].counter == "lifetime"
        counter = held.counter
        if counter == "monthly" and was_lifetime and self.consumed["monthly"] == self.on_gemini["monthly"] == 0:
            self.began, self.anniversary_day = now, now.day
        self.consumed[counter] = min(self.consumed[counter] + cost, MAX_COUNT)
        if backend == "gemini":
            self.on_gemini[counter] = min(self.on_gemini[counter] + cost, MAX_COUNT)
        self.tier_snapshot, self.last_active = held.tier, now

    def fields(self) -> dict[str, str]:
        """The hash as Redis shows it, without `held`, which only sums up the holds."""
        fields = {
            "tier_snapshot": self.tier_snapshot,
            "lifetime_consumed": str(self.consumed["lifetime"]),
            "lifetime_gemini_consumed": str(self.on_gemini["lifetime"]),
            "monthly_consumed": str(self.consumed["monthly"]),
            "monthly_gemini_consumed": str(self.on_gemini["monthly"]),
            "last_renewal_at": iso(self.began),
            "last_active_at": iso(self.last_active),
            "anniversary_day": str(self.anniversary_day),
        }
        if self.extra:
            fields["extra"] = self.extra
        for hold_id, held in self.holds.items():
            words = (held.backend, held.tier, held.counter, str(held.cost), str(held.expires_ms))
            fields[f"hold:{hold_id}"] = " ".join(words)
        fields |= {f"run:{hold_id}": str(until_ms) for hold_id, until_ms in self.streams.items()}
        fields |= {f"left:{request}": f"{until_ms} {retries}" for request, (until_ms, retries) in self.left.items()}
        return fields

    @classmethod
    def of(cls, row: Row) -> "Account":
        return cls(
            began=parse(row.last_renewal_at),
            anniversary_day=row.anniversary_day,
            last_active=parse(row.last_active_at),
            tier_snapshot=row.tier_snapshot,
            consumed={"lifetime": row.lifetime_consumed, "monthly": row.monthly_consumed},
            on_gemini={"lifetime": row.lifetime_gemini_consumed, "monthly": row.monthly_gemini_consumed},
            extra=row.extra,
        )


class ReferenceLimiter:
    """The operations of `CreditLimiter`, by the same names; set `now_ms` and `tiers` as the test goes."""

    def __init__(self, tiers: Tiers, *, now_ms: int = 0, hold_ms: int = 600_000) -> None:
        self.tiers, self.now_ms, self.hold_ms = tiers, now_ms, hold_ms
        self.rows: dict[str, Account] = {}

    @property
    def now(self) -> datetime:
        return moment(self.now_ms)

    def reserve(
        self,
        install_id: str,
        *,
        tier: str,
        has_hardware: bool,
        has_gemini: bool = True,
        cost: int = 1,
        hold_id: str,
        may_create: bool = True,
    ) -> Decision:
        limits, account = self.tiers[tier], self._account(install_id)
        if install_id not in self.rows and not may_create:
            return self._decision(DecisionStatus.UNKNOWN_INSTALL, account, limits, hold_id)
        held = account.holds.get(hold_id)
        if held and held.is_live(self.now_ms):
            return self._decision(DecisionStatus.REPLAY, account, limits, hold_id, backend=held.backend)
        can = [name for name, there in (("gemini", has_gemini), ("hardware", has_hardware)) if there]
        wait_ms = account.rate_wait_ms(limits, self.now_ms)
        backend, reason = self._plan(account, limits, cost, can=can, in_flight=limits.max_in_flight)
        if backend:
            account.use_rate(limits, self.now_ms)
            account.drop_dead_marks(self.now_ms)
            account.drop_dead(self.now_ms)
            account.holds[hold_id] = Held(backend, tier, limits.counter, cost, self.now_ms + self.hold_ms)
        self.rows[install_id] = account
        status = DecisionStatus.ALLOWED if backend else DecisionStatus.DENIED
        decision = self._decision(status, account, limits, hold_id, backend=backend, reason=reason)
        return decision._replace(rate_wait_ms=wait_ms)

    def commit(
        self,
        install_id: str,
        hold_id: str,
        *,
        backend: Backend | None = None,
        cost: int | None = None,
        stream_ms: int | None = None,
    ) -> Settlement:
        account = self._account(install_id)
        held = account.holds.pop(hold_id, None)
        if held is None:
            return Settlement(SettlementStatus.GONE)
        backend, cost = backend or held.backend, cost or held.cost
        account.drop_dead(self.now_ms)
        account.debit(held, backend=backend, cost=cost, now=self.now, tiers=self.tiers)
        if stream_ms is not None:
            account.streams[hold_id] = self.now_ms + stream_ms
        self.rows[install_id] = account
        status = SettlementStatus.COMMITTED if held.is_live(self.now_ms) else SettlementStatus.LATE
        return Settlement(status, held.tier, backend, cost)

    def renew_stream(self, install_id: str, hold_id: str, *, stream_ms: int) -> StreamStatus:
        streams = self.rows[install_id].streams if install_id in self.rows else {}
        if hold_id not in streams:
            return StreamStatus.GONE
        streams[hold_id] = self.now_ms + stream_ms
        return StreamStatus.RENEWED

    def end_stream(self, install_id: str, hold_id: str) -> StreamStatus:
        streams = self.rows[install_id].streams if install_id in self.rows else {}
        return StreamStatus.GONE if streams.pop(hold_id, None) is None else StreamStatus.ENDED

    def leave(self, install_id: str, hold_id: str, *, tier: str, leave: Leave) -> Settlement:
        account = self._account(install_id)
        if hold_id not in account.holds:
            return Settlement(SettlementStatus.GONE)
        until_ms, retries = account.left.get(leave.request or "", (0, 0)) if leave.is_retry else (0, 0)
        is_same = until_ms > self.now_ms and retries < RETRIES
        if not is_same and account.is_beyond(self.tiers[tier].free_leaves, self.now_ms):
            return self.commit(install_id, hold_id, backend=leave.backend)._replace(is_beyond=True)
        account = self.rows[install_id]
        if not is_same:
            account.is_beyond(self.tiers[tier].free_leaves, self.now_ms)
            until_ms, retries = self.now_ms + HOUR_MS, -1
        if leave.request:
            account.left[leave.request] = until_ms, retries + 1
        self.release(install_id, hold_id)
        return Settlement(SettlementStatus.RELEASED)

    def release(self, install_id: str, hold_id: str) -> SettlementStatus:
        account = self.rows.get(install_id)
        if account is None or account.holds.pop(hold_id, None) is None:
            return SettlementStatus.GONE
        account.drop_dead(self.now_ms)
        return SettlementStatus.RELEASED

    def debit(
        self,
        install_id: str,
        *,
        tier: str,
        has_hardware: bool,
        has_gemini: bool = True,
        cost: int = 1,
        may_create: bool = True,
    ) -> Decision:
        limits, account = self.tiers[tier], self._account(install_id)
        if install_id not in self.rows and not may_create:
            return self._decision(DecisionStatus.UNKNOWN_INSTALL, account, limits)
        can = [name for name, there in (("gemini", has_gemini), ("hardware", has_hardware)) if there]
        wait_ms = account.rate_wait_ms(limits, self.now_ms)
        backend, reason = self._plan(account, limits, cost, can=can, in_flight=None)
        if backend:
            account.use_rate(limits, self.now_ms)
            wanted = Held(backend, tier, limits.counter, cost, self.now_ms)
            account.debit(wanted, backend=backend, cost=cost, now=self.now, tiers=self.tiers)
        self.rows[install_id] = account
        return self._decision(
            DecisionStatus.COMMITTED if backend else DecisionStatus.DENIED,
            account,
            limits,
            backend=backend,
            reason=reason,
        )._replace(rate_wait_ms=wait_ms)

    def balance(self, install_id: str, *, tier: str) -> Balance:
        return self._balance(self._account(install_id), self.tiers[tier])

    def put_row(self, row: Row, *, mode: PutMode) -> PutStatus:
        new, old = Account.of(row), self.rows.get(row.install_id)
        if old is None:
            self.rows[row.install_id] = new
            return PutStatus.CREATED
        if mode == "merge":
            self._merge(old, new)
        new.holds, new.streams, new.left = old.holds, old.streams, old.left
        new.rate_until_ms, new.left_until_ms = old.rate_until_ms, old.left_until_ms
        if new == old:
            return PutStatus.SAME
        if mode == "create":
            return PutStatus.EXISTS
        self.rows[row.install_id] = new
        return PutStatus.MERGED if mode == "merge" else PutStatus.REPLACED

    @staticmethod
    def _merge(old: Account, new: Account) -> None:
        for counts, others in ((new.consumed, old.consumed), (new.on_gemini, old.on_gemini)):
            counts["lifetime"] = max(counts["lifetime"], others["lifetime"])
            if new.began == old.began:
                counts["monthly"] = max(counts["monthly"], others["monthly"])
            elif new.began < old.began:
                counts["monthly"] = others["monthly"]
        if old.began >= new.began:
            new.began, new.anniversary_day = old.began, old.anniversary_day
        if old.last_active > new.last_active:
            new.tier_snapshot, new.last_active = old.tier_snapshot, old.last_active
        new.extra = new.extra or old.extra

    def _account(self, install_id: str) -> Account:
        account = self.rows.get(install_id) or Account(self.now, self.now.day, self.now)
        return account.rolled_over(self.now)

    def _plan(  # noqa: PLR0911  one for each answer
        self, account: Account, tier: Tier, cost: int, *, can: list[str], in_flight: int | None
    ) -> tuple[Backend | None, Reason | None]:
        def left(limit: int | None, used: int) -> float:
            return math.inf if limit is None else limit - used

        live = account.live(self.now_ms)
        mine = [held for held in live if held.counter == tier.counter]
        in_total = left(tier.quota, account.consumed[tier.counter])
        on_gemini = left(tier.gemini_cap, account.on_gemini[tier.counter])
        if in_total < cost:
            return None, Reason.OUT_OF_CREDITS
        if on_gemini < cost and can == ["gemini"]:
            return None, Reason.GEMINI_CAP
        if account.rate_wait_ms(tier, self.now_ms) > 0:
            return None, Reason.RATE_LIMITED
        if in_flight is not None and account.in_flight(self.now_ms) >= in_flight:
            return None, Reason.TOO_MANY_IN_FLIGHT
        if in_total - sum(held.cost for held in mine) < cost:
            return None, Reason.CREDITS_IN_FLIGHT
        if "gemini" in can and on_gemini - sum(held.cost for held in mine if held.backend == "gemini") >= cost:
            return "gemini", None
        return ("hardware", None) if "hardware" in can else (None, Reason.CREDITS_IN_FLIGHT)

    def _decision(
        self,
        status: DecisionStatus,
        account: Account,
        tier: Tier,
        hold_id: str = "",
        *,
        backend: Backend | None = None,
        reason: Reason | None = None,
    ) -> Decision:
        return Decision(status, reason, backend, hold_id, self._balance(account, tier))

    def _balance(self, account: Account, tier: Tier) -> Balance:
        def left(limit: int | None, used: int) -> int | None:
            return None if limit is None else max(0, limit - used)

        monthly = tier.counter == "monthly"
        return Balance(
            tier=tier.name,
            capped=tier.counter,
            quota=tier.quota,
            remaining=left(tier.quota, account.consumed[tier.counter]),
            gemini_cap=tier.gemini_cap,
            gemini_remaining=left(tier.gemini_cap, account.on_gemini[tier.counter]),
            held=sum(held.cost for held in account.live(self.now_ms) if held.counter == tier.counter),
            began_at=iso(account.began) if monthly else None,
            renews_ms=epoch_ms(next_renewal(account.began, account.anniversary_day)) if monthly else None,
            now_ms=self.now_ms,
        )
