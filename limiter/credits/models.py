"""The values that pass between modules: tiers, rows, balances, decisions. No I/O here.

The values that every decision creates are named tuples, which are created four times as fast as frozen dataclasses.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from enum import Enum, StrEnum
from typing import Annotated, Literal, NamedTuple, get_args, get_origin, get_type_hints

from limiter._util.timestamps import iso_from_ms, ms_from_iso
from limiter.errors import SettingsError, UnknownTier

Backend = Literal["gemini", "hardware"]
Counter = Literal["lifetime", "monthly"]

MAX_COUNT = 2**53 - 1  # the largest integer that Lua counts to
MAX_COST = 1_000_000  # keeps a hold's text within a listpack's 64 bytes
CORE = "core"  # the tier of installs without a licence, and of every new row
TIER_NAME = re.compile(r"[A-Za-z0-9_-]{1,20}", re.ASCII)
MAX_RATE_PER_MIN = 60_000  # a rate counts in whole milliseconds
MAX_BURST = 1_000_000
MAX_FREE_LEAVES = 100_000
_TIER_KEYS = frozenset({"lifetime", "monthly", "gemini_cap", "max_in_flight", "rate_per_min", "burst", "free_leaves"})


class DecisionStatus(StrEnum):
    """The result of reserve or debit. As with the other statuses, the words are the same in Lua, JSON and metrics."""

    ALLOWED = "ALLOWED"
    REPLAY = "REPLAY"
    COMMITTED = "COMMITTED"
    DENIED = "DENIED"
    UNKNOWN_INSTALL = "UNKNOWN_INSTALL"


class SettlementStatus(StrEnum):
    """The result of commit or release."""

    COMMITTED = "COMMITTED"
    LATE = "LATE"
    RELEASED = "RELEASED"
    GONE = "GONE"


class StreamStatus(StrEnum):
    """The result of renewing or ending the mark of a stream."""

    RENEWED = "RENEWED"
    ENDED = "ENDED"
    GONE = "GONE"


class PutStatus(StrEnum):
    """The result of put_row or create_rows for a row."""

    CREATED = "CREATED"
    SAME = "SAME"
    REPLACED = "REPLACED"
    MERGED = "MERGED"
    EXISTS = "EXISTS"


class Reason(StrEnum):
    """Why a request is DENIED. The first two reasons last; the others pass with time, or when a hold is settled."""

    OUT_OF_CREDITS = "out_of_credits"
    GEMINI_CAP = "gemini_cap_exceeded_no_hardware"
    CREDITS_IN_FLIGHT = "credits_in_flight"
    TOO_MANY_IN_FLIGHT = "too_many_in_flight"
    RATE_LIMITED = "rate_limited"


@dataclass(frozen=True, slots=True)
class Tier:
    """One tier's limits; None means no limit.

    Args:
        name: the tier's.
        counter: what the quota counts.
        quota: credits.
        gemini_cap: those of them that may be spent on Gemini.
        max_in_flight: requests under way at once: live holds, and streams that still run.
        rate_per_min: requests a minute.
        burst: how many of them may come at once; as many as in a minute by default.
        free_leaves: requests that a client may leave while a backend works for them, before leaves are debited; one
            more is free each hour.
    """

    name: str
    counter: Counter
    quota: int | None
    gemini_cap: int | None
    max_in_flight: int | None
    rate_per_min: int | None = None
    burst: int | None = None
    free_leaves: int | None = None

    @property
    def rate_ms(self) -> int | None:
        """What a request takes of the rate, in milliseconds, rounded up; None without a rate."""
        return -(-60_000 // self.rate_per_min) if self.rate_per_min else None

    @property
    def burst_ms(self) -> int | None:
        """What a burst takes of the rate, in milliseconds; None without a rate."""
        return None if self.rate_ms is None else self.rate_ms * (self.burst or self.rate_per_min or 1)


class Tiers(Mapping[str, Tier]):
    """The configured tiers by name. `core` is always among them."""

    __slots__ = ("_tiers", "lifetime_names")

    def __init__(self, tiers: Mapping[str, Tier]) -> None:
        if CORE not in tiers:
            raise SettingsError("the tiers must hold 'core', the tier of installs without a licence")
        self._tiers = dict(tiers)
        self.lifetime_names = ",".join(tier.name for tier in tiers.values() if tier.counter == "lifetime")

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Mapping[str, object]]) -> "Tiers":
        """Read `{"core": {"lifetime": 50, "gemini_cap": 20}, "pro": {"monthly": 1000}}`.

        A tier with `lifetime` has a lifetime quota, any other a monthly one; without `monthly` it is unlimited.
        Raises SettingsError.
        """
        return cls({name: _tier(name, limits) for name, limits in mapping.items()})

    def __getitem__(self, name: str) -> Tier:
        """Return a tier. Raises UnknownTier, which is not a KeyError: a typo must not read as "no such limit"."""
        try:
            return self._tiers[name]
        except KeyError:
            raise UnknownTier(f"unknown tier {name!r}: configured are {', '.join(self._tiers)}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._tiers

    def __iter__(self) -> Iterator[str]:
        return iter(self._tiers)

    def __len__(self) -> int:
        return len(self._tiers)


def _tier(name: str, limits: Mapping[str, object]) -> Tier:
    if not TIER_NAME.fullmatch(name):
        raise SettingsError(f"tier name {name!r} is not usable: give 1 to 20 characters of A-Z a-z 0-9 _ -")
    unknown = limits.keys() - _TIER_KEYS
    if unknown:
        raise SettingsError(f"tier {name!r} has no setting {min(unknown)!r}: use {', '.join(sorted(_TIER_KEYS))}")
    lifetime = _limit(name, limits, "lifetime")
    monthly = _limit(name, limits, "monthly")
    if lifetime is not None and monthly is not None:
        raise SettingsError(f"tier {name!r} has both lifetime and monthly: give one")
    return Tier(
        name=name,
        counter="monthly" if lifetime is None else "lifetime",
        quota=monthly if lifetime is None else lifetime,
        gemini_cap=_limit(name, limits, "gemini_cap"),
        max_in_flight=_limit(name, limits, "max_in_flight", least=1),
        rate_per_min=_limit(name, limits, "rate_per_min", most=MAX_RATE_PER_MIN) or None,
        burst=_limit(name, limits, "burst", most=MAX_BURST) or None,
        free_leaves=_limit(name, limits, "free_leaves", most=MAX_FREE_LEAVES),
    )


def _limit(name: str, limits: Mapping[str, object], key: str, *, least: int = 0, most: int = MAX_COUNT) -> int | None:
    value = limits.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        want = f"of {least} or more" if most == MAX_COUNT else f"from {least} to {most:,}"
        raise SettingsError(f"tier {name!r}: {key} is {value!r}, want an integer {want}")
    return value


class Balance(NamedTuple):
    """The credits of one tier on one row, at the server's time.

    Args:
        tier: the tier.
        capped: the counter that the quota limits.
        quota: credits in the period; None without a limit.
        remaining: credits not yet committed; None without a quota. `remaining - held` can still be spent.
        gemini_cap: credits that may be spent on Gemini; None without a cap.
        gemini_remaining: credits of the cap not yet committed; None without a cap.
        held: credits that live holds cover.
        began_at: when the billing period began, as ISO text; None for a lifetime quota.
        renews_ms: when it renews, in epoch milliseconds; None for a lifetime quota.
        now_ms: the server's time, in epoch milliseconds.
    """

    tier: str
    capped: Counter
    quota: int | None
    remaining: int | None
    gemini_cap: int | None
    gemini_remaining: int | None
    held: int
    began_at: str | None
    renews_ms: int | None
    now_ms: int

    @property
    def renews_at(self) -> str | None:
        """When the billing period renews, as ISO text; None for a lifetime quota."""
        return None if self.renews_ms is None else iso_from_ms(self.renews_ms)

    @property
    def renews_in_s(self) -> int | None:
        """Whole seconds until then, never below 0."""
        return None if self.renews_ms is None else max(0, -((self.now_ms - self.renews_ms) // 1000))

    @property
    def period_s(self) -> int | None:
        """The length of the billing period in seconds, rounded up; None for a lifetime quota."""
        if self.renews_ms is None or self.began_at is None:
            return None
        return -((ms_from_iso(self.began_at) - self.renews_ms) // 1000)


class Decision(NamedTuple):
    """The answer to reserve or debit. `backend` is set if allowed, `reason` if denied.

    from_memory: decided by the denial cache, without a call to Redis. rate_wait_ms: how long until the tier's rate has
    room for this request; above 0 if it was refused for that, or would have been if the rate was enforced.
    """

    status: DecisionStatus
    reason: Reason | None
    backend: Backend | None
    hold_id: str
    balance: Balance
    from_memory: bool = False
    rate_wait_ms: int = 0

    @property
    def allowed(self) -> bool:
        """Whether the request may be served."""
        return self.status in _ALLOWING


_ALLOWING = frozenset({DecisionStatus.ALLOWED, DecisionStatus.REPLAY, DecisionStatus.COMMITTED})


class Settlement(NamedTuple):
    """The result of commit or leave: its status, and what was debited (`cost` is 0 if nothing was).

    is_beyond: it is a leave that is not free, whether or not it was debited.
    """

    status: SettlementStatus
    tier: str | None = None
    backend: Backend | None = None
    cost: int = 0
    is_beyond: bool = False


class Leave(NamedTuple):
    """What is known of a request whose client left while a backend worked for it.

    Args:
        backend: the one that did.
        request: what the retries of the request have in common, of 1 to 40 characters; None if they are not recognised.
        is_retry: whether it may itself be such a retry.
    """

    backend: Backend | None = None
    request: str | None = None
    is_retry: bool = False


@dataclass(frozen=True, slots=True)
class Flow:
    """What bounds an install beside its credits, as the row sums it up. Times are epoch milliseconds.

    Args:
        rate_until_ms: until when its rate is used up.
        left_until_ms: until when its free leaves are used up.
        marks: streams that run.
        recount_ms: when these are counted again; 0: there is nothing to count.
    """

    rate_until_ms: int
    left_until_ms: int = 0
    marks: int = 0
    recount_ms: int = 0


@dataclass(frozen=True, slots=True)
class Mark:
    """A committed stream that still runs, or a request that its client left, until `until_ms` (epoch milliseconds).

    retries: how many retries of a left request were left, too.
    """

    name: str
    until_ms: int
    retries: int = 0


@dataclass(frozen=True, slots=True)
class HeldCredits:
    """A hold as the row has it. It is live until `expires_ms` (epoch milliseconds)."""

    hold_id: str
    backend: str
    tier: str
    counter: str
    cost: int
    expires_ms: int


class FieldKind(Enum):
    """The kind of a row's field. Each reader and writer of rows has one rule for each kind."""

    TIER = "1 to 20 characters of A-Z a-z 0-9 _ -"
    COUNT = "an integer from 0 to 2^53 - 1"
    DAY = "an integer from 1 to 31"
    TIME = "a time like 2026-05-11T23:02:57.123Z"
    OTHERS = "a JSON object"


TierName = Annotated[str, FieldKind.TIER]
Count = Annotated[int, FieldKind.COUNT]
Day = Annotated[int, FieldKind.DAY]
IsoTime = Annotated[str, FieldKind.TIME]
JsonObject = Annotated[str, FieldKind.OTHERS]


@dataclass(frozen=True, slots=True)
class Row:
    """One install's row, as stored. `extra` is the JSON object of members that are not ours, or "".

    It is also the table of a row's fields (`FIELDS`), in the order that the scripts and credits.json have them in. A
    field with a default is optional: the default is neither stored nor written to a file.
    """

    install_id: str
    tier_snapshot: TierName
    lifetime_consumed: Count
    lifetime_gemini_consumed: Count
    last_renewal_at: IsoTime
    anniversary_day: Day
    monthly_consumed: Count
    monthly_gemini_consumed: Count
    last_active_at: IsoTime
    extra: JsonObject = field(default="", kw_only=True)  # the last one: it alone may have line ends
    holds: tuple[HeldCredits, ...] = field(default=(), compare=False, kw_only=True)
    flow: Flow | None = field(default=None, compare=False, kw_only=True)
    streams: tuple[Mark, ...] = field(default=(), compare=False, kw_only=True)
    left: tuple[Mark, ...] = field(default=(), compare=False, kw_only=True)

    def as_dict(self) -> dict[str, object]:
        """Return the row as credits.json has it, in the old ledger's order of members; other members come last."""
        own: dict[str, object] = {"install_id": self.install_id}
        own |= {each.name: value for each in MEMBERS if (value := getattr(self, each.name)) != each.default}
        return own | json.loads(self.extra) if self.extra else own


class RowField(NamedTuple):
    """A stored field of a row. default: of an optional one, else None."""

    name: str
    kind: FieldKind
    default: str | int | None


def _row_fields() -> Iterator[RowField]:
    hints = get_type_hints(Row, include_extras=True)
    for each in fields(Row):
        if get_origin(hints[each.name]) is Annotated:
            _, kind = get_args(hints[each.name])
            yield RowField(each.name, kind, None if each.default is MISSING else each.default)


FIELDS = tuple(_row_fields())
STORED_FIELDS = tuple(each.name for each in FIELDS)
MEMBERS = tuple(each for each in FIELDS if each.kind is not FieldKind.OTHERS)  # each is a member in credits.json, too
ROW_MEMBERS = ("install_id", *(each.name for each in MEMBERS))
