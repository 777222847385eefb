"""A state machine over a few installs: whatever is done in whatever order, scripts and reference agree.

After each step the replies are equal, every whole row is equal, and three things hold that need no reference: credits
are conserved, an allowed request never promises more than the quota, and no counter is negative.
"""

import asyncio
import os
from collections import defaultdict
from collections.abc import Awaitable, Mapping
from typing import TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from redis.asyncio import Redis

from limiter import CreditLimiter, DecisionStatus, Row, SettlementStatus, Tiers, connect
from limiter.credits.models import Backend, Leave
from limiter.credits.scripts import PutMode
from tests.support.credits import PATIENCE_MS, Clock, fields_of
from tests.support.reference_model import ReferenceLimiter, iso, moment

T = TypeVar("T")
HOUR_MS = 60 * 60 * 1000
DAY_MS = 24 * HOUR_MS
HOLD_MS = 10 * 60 * 1000
EXAMPLES = int(os.environ.get("LIMITER_TEST_EXAMPLES", "60"))  # more of them for a longer look

INSTALLS = ("a", "b")
HOLD_IDS = ("h1", "h2", "h3", "h4", "h5", "h6")  # few, so that they are met again
installs = st.sampled_from(INSTALLS)
hold_ids = st.sampled_from(HOLD_IDS)
tier_names = st.sampled_from(["core", "trial", "pro", "max"])
backends: "st.SearchStrategy[Backend]" = st.sampled_from(["gemini", "hardware"])
served_by = st.sampled_from(
    [
        {"has_hardware": True, "has_gemini": True},
        {"has_hardware": False, "has_gemini": True},
        {"has_hardware": True, "has_gemini": False},
    ]
)
costs = st.sampled_from([1, 1, 1, 1, 2, 3])
small = st.integers(0, 12)
quotas = st.sampled_from([0, 1, 3, 6, 9, 12, 20])
caps = st.sampled_from([None, 0, 1, 2, 3, 5, 8])
in_flight = st.one_of(st.none(), st.integers(1, 4))
rates = st.sampled_from([None, None, 1, 7, 600])  # a minute
bursts = st.sampled_from([None, 1, 2, 5])
free_leaves = st.sampled_from([None, 0, 1, 2])
leases = st.sampled_from([None, None, 90_000, HOLD_MS])
leaves = st.builds(Leave, st.one_of(st.none(), backends), st.sampled_from([None, "r1", "r2"]), st.booleans())
starts = st.sampled_from(
    [
        1_706_702_399_123,  # 2024-01-31T11:59:59.123Z: a 31st before a leap February
        1_767_225_599_999,  # 2025-12-31T23:59:59.999Z: the last millisecond of a year
        1_772_236_800_000,  # 2026-02-28T00:00:00.000Z: the first of a clamped day
        1_778_540_577_123,  # 2026-05-11T23:02:57.123Z: a day like any other
    ]
)
jumps = st.one_of(
    st.integers(0, 5),
    st.integers(0, HOLD_MS // 2),
    st.integers(0, HOLD_MS // 2),
    st.sampled_from([HOLD_MS - 1, HOLD_MS, HOLD_MS + 1, HOUR_MS, HOUR_MS + HOLD_MS - 1, HOUR_MS + HOLD_MS]),
    st.integers(1, 48).map(HOUR_MS.__mul__),
    st.integers(26, 64).map(DAY_MS.__mul__),
    st.integers(1, 2000).map(DAY_MS.__mul__),
)


@st.composite
def limits(draw: st.DrawFn) -> Tiers:
    return Tiers.from_mapping(
        {
            "core": {"lifetime": draw(quotas), "gemini_cap": draw(caps), "free_leaves": draw(free_leaves)},
            "trial": {"lifetime": draw(quotas), "gemini_cap": draw(caps), "max_in_flight": draw(in_flight)},
            "pro": {"monthly": draw(quotas), "gemini_cap": draw(caps), "max_in_flight": draw(in_flight)},
            "max": {"gemini_cap": draw(caps), "rate_per_min": draw(rates), "burst": draw(bursts), "max_in_flight": 3},
        }
    )


class Credits(RuleBasedStateMachine):
    def __init__(self, runner: asyncio.Runner, redis: Redis) -> None:
        super().__init__()
        self.runner, self.redis = runner, redis
        self.clock = Clock(0)
        self.spent: dict[tuple[str, str], int] = defaultdict(int)  # by install and counter, in the running period
        self.debited: dict[tuple[str, str], int] = defaultdict(int)  # the same, in this step
        self.period: dict[str, str] = {}
        self.run(redis.flushdb())

    def run(self, awaitable: Awaitable[T]) -> T:
        async def wait() -> T:
            return await awaitable

        return self.runner.run(wait())

    def limiter_of(self, tiers: Tiers) -> CreditLimiter:
        return CreditLimiter(
            self.redis, tiers, clock=self.clock, hold_ms=HOLD_MS, timeout_ms=PATIENCE_MS, deadline_ms=PATIENCE_MS
        )

    @initialize(start_ms=starts, tiers=limits())
    def begin(self, start_ms: int, tiers: Tiers) -> None:
        self.clock.now_ms = start_ms
        self.limiter = self.limiter_of(tiers)
        self.reference = ReferenceLimiter(tiers, now_ms=start_ms, hold_ms=HOLD_MS)

    @rule(jump_ms=jumps, tiers=st.one_of(st.none(), st.none(), limits()))
    def time_passes_and_quotas_may_be_edited(self, jump_ms: int, tiers: Tiers | None) -> None:
        self.clock.now_ms = self.reference.now_ms = self.clock.now_ms + jump_ms
        if tiers is not None:
            self.limiter = self.limiter_of(tiers)
            self.reference.tiers = tiers

    @rule(install=installs, tier=tier_names, can=served_by, cost=costs)
    def reserve_once_more(self, install: str, tier: str, *, can: Mapping[str, bool], cost: int) -> None:
        """As `reserve`, with a hold id that the row does not have."""
        account = self.reference.rows.get(install)
        free = [hold_id for hold_id in HOLD_IDS if not account or hold_id not in account.holds]
        hold_id = free[0] if free else HOLD_IDS[0]
        self.reserve(install, tier, can=can, cost=cost, hold_id=hold_id, may_create=True)

    @rule(
        install=installs,
        tier=tier_names,
        can=served_by,
        cost=costs,
        hold_id=hold_ids,
        may_create=st.sampled_from([True, True, True, False]),
    )
    def reserve(
        self, install: str, tier: str, *, can: Mapping[str, bool], cost: int, hold_id: str, may_create: bool
    ) -> None:
        before = self.stored(install)
        answer = self.run(
            self.limiter.reserve(install, tier=tier, **can, cost=cost, hold_id=hold_id, may_create=may_create)
        )
        expected = self.reference.reserve(install, tier=tier, **can, cost=cost, hold_id=hold_id, may_create=may_create)
        assert answer == expected
        after = self.stored(install)
        if answer.status is DecisionStatus.ALLOWED:
            self.assert_within_quota(install, tier)
            assert int(after["held"].split()[-1]) > self.clock.now_ms, "the sums would be counted again each time"
        elif answer.status is DecisionStatus.DENIED:
            assert _without_period(after) == _without_period(before) or not before
        else:
            assert after == before

    @rule(
        install=installs,
        hold_id=hold_ids,
        backend=st.one_of(st.none(), backends),
        cost=st.one_of(st.none(), st.none(), costs),
        stream_ms=leases,
    )
    def commit(
        self, *, install: str, hold_id: str, backend: Backend | None, cost: int | None, stream_ms: int | None
    ) -> None:
        before = self.stored(install)
        settled = {"backend": backend, "cost": cost, "stream_ms": stream_ms}
        answer = self.run(self.limiter.commit(install, hold_id, **settled))  # type: ignore[arg-type]  # each of its kind
        assert answer == self.reference.commit(install, hold_id, **settled)  # type: ignore[arg-type]  # likewise
        if answer.status is SettlementStatus.GONE:
            assert self.stored(install) == before
        else:
            self.debited[install, before[f"hold:{hold_id}"].split()[2]] = answer.cost

    @rule(install=installs, number=st.integers(0, 5), backend=st.one_of(st.none(), backends), stream_ms=leases)
    def commit_one_that_is_there(
        self, install: str, number: int, backend: Backend | None, stream_ms: int | None
    ) -> None:
        hold_id = self.one_that_is_there(install, number)
        self.commit(install=install, hold_id=hold_id, backend=backend, cost=None, stream_ms=stream_ms)

    def one_that_is_there(self, install: str, number: int) -> str:
        account = self.reference.rows.get(install)
        there = sorted(account.holds) if account else []
        return there[number % len(there)] if there else HOLD_IDS[0]

    @rule(install=installs, number=st.integers(0, 5), tier=tier_names, leave=leaves)
    def leave(self, install: str, number: int, tier: str, leave: Leave) -> None:
        hold_id = self.one_that_is_there(install, number)
        before = self.stored(install)
        answer = self.run(self.limiter.leave(install, hold_id, tier=tier, leave=leave))
        assert answer == self.reference.leave(install, hold_id, tier=tier, leave=leave)
        if answer.status is SettlementStatus.GONE:
            assert self.stored(install) == before
        elif answer.status is not SettlementStatus.RELEASED:
            self.debited[install, before[f"hold:{hold_id}"].split()[2]] = answer.cost

    @rule(install=installs, hold_id=hold_ids, stream_ms=st.sampled_from([90_000, HOLD_MS]))
    def renew_stream(self, install: str, hold_id: str, stream_ms: int) -> None:
        answer = self.run(self.limiter.renew_stream(install, hold_id, stream_ms=stream_ms))
        assert answer == self.reference.renew_stream(install, hold_id, stream_ms=stream_ms)

    @rule(install=installs, hold_id=hold_ids)
    def end_stream(self, install: str, hold_id: str) -> None:
        answer = self.run(self.limiter.end_stream(install, hold_id))
        assert answer == self.reference.end_stream(install, hold_id)

    @rule(install=installs, hold_id=hold_ids)
    def release(self, install: str, hold_id: str) -> None:
        before = self.stored(install)
        answer = self.run(self.limiter.release(install, hold_id))
        assert answer == self.reference.release(install, hold_id)
        after = self.stored(install)
        if answer is SettlementStatus.GONE:
            assert after == before
        else:
            assert _without_holds(after) == _without_holds(before)

    @rule(
        install=installs,
        tier=tier_names,
        can=served_by,
        cost=costs,
        may_create=st.sampled_from([True, True, False]),
    )
    def debit(self, install: str, tier: str, *, can: Mapping[str, bool], cost: int, may_create: bool) -> None:
        before = self.stored(install)
        answer = self.run(self.limiter.debit(install, tier=tier, **can, cost=cost, may_create=may_create))
        assert answer == self.reference.debit(install, tier=tier, **can, cost=cost, may_create=may_create)
        if answer.allowed:
            self.debited[install, self.limiter.tiers[tier].counter] = cost
            self.assert_within_quota(install, tier)
        elif before:
            assert _without_period(self.stored(install)) == _without_period(before)

    @rule(install=installs, tier=tier_names)
    def balance(self, install: str, tier: str) -> None:
        before = self.stored(install)
        assert self.run(self.limiter.balance(install, tier=tier)) == self.reference.balance(install, tier=tier)
        assert self.stored(install) == before

    @rule(
        install=installs,
        mode=st.sampled_from(["create", "replace", "merge"]),
        snapshot=st.one_of(tier_names, st.just("retired")),
        counts=st.tuples(small, small, small, small),
        age_ms=st.integers(-2 * DAY_MS, 70 * DAY_MS),
        day=st.integers(1, 31),
        extra=st.sampled_from(["", '{"note":"vip"}']),
    )
    def put_row(
        self,
        *,
        install: str,
        mode: PutMode,
        snapshot: str,
        counts: tuple[int, int, int, int],
        age_ms: int,
        day: int,
        extra: str,
    ) -> None:
        when = iso(moment(self.clock.now_ms - age_ms))
        lifetime, lifetime_gemini, monthly, monthly_gemini = counts
        row = Row(install, snapshot, lifetime, lifetime_gemini, when, day, monthly, monthly_gemini, when, extra=extra)
        answer = self.run(self.limiter.put_row(row, mode=mode))
        assert answer == self.reference.put_row(row, mode=mode)
        stored = self.stored(install)
        self.period[install] = stored["last_renewal_at"]
        for counter in ("lifetime", "monthly"):
            self.spent[install, counter] = int(stored[f"{counter}_consumed"])

    @invariant()
    def rows_are_those_of_the_reference(self) -> None:
        if not hasattr(self, "reference"):
            return
        for install in INSTALLS:
            fields = self.stored(install)
            held, flow = fields.pop("held", None), fields.pop("flow", None)
            account = self.reference.rows.get(install)
            assert fields == (account.fields() if account else {})
            if account:
                self.assert_held_sums_up(install, held)
                self.assert_flow_sums_up(install, flow)
                self.assert_conserved(install, fields)

    def assert_held_sums_up(self, install: str, text: str | None) -> None:
        account, now_ms = self.reference.rows[install], self.clock.now_ms
        assert (text is None) == (not account.holds), "a row with holds sums them up, one without has no sums"
        if text is None:
            return
        *sums, count_anew_ms = map(int, text.split())
        if count_anew_ms > now_ms:  # else the next script counts them
            live = account.live(now_ms)
            assert sums == [
                len(live),
                len(account.holds) - len(live),
                sum(held.cost for held in live if held.counter == "lifetime"),
                sum(held.cost for held in live if held.counter == "lifetime" and held.backend == "gemini"),
                sum(held.cost for held in live if held.counter == "monthly"),
                sum(held.cost for held in live if held.counter == "monthly" and held.backend == "gemini"),
            ]

    def assert_flow_sums_up(self, install: str, text: str | None) -> None:
        account, now_ms = self.reference.rows[install], self.clock.now_ms
        rate_until_ms, left_until_ms, marks, recount_ms = map(int, [*(text or "0").split(), "0", "0", "0"][:4])
        assert rate_until_ms == account.rate_until_ms
        assert max(left_until_ms, now_ms) == max(account.left_until_ms, now_ms)
        if recount_ms == 0 or recount_ms > now_ms:  # else the next reserve counts them
            assert marks == sum(now_ms < until_ms for until_ms in account.streams.values())
        if account.streams or account.left:
            assert recount_ms > 0

    def assert_conserved(self, install: str, fields: dict[str, str]) -> None:
        """What a row has consumed is what was debited: ever, and in this billing period."""
        for name in ("lifetime_consumed", "lifetime_gemini_consumed", "monthly_consumed", "monthly_gemini_consumed"):
            assert int(fields[name]) >= 0
        if self.period.get(install) != fields["last_renewal_at"]:
            self.period[install], self.spent[install, "monthly"] = fields["last_renewal_at"], 0
        for counter in ("lifetime", "monthly"):
            self.spent[install, counter] += self.debited.pop((install, counter), 0)
            assert int(fields[f"{counter}_consumed"]) == self.spent[install, counter]

    def assert_within_quota(self, install: str, tier_name: str) -> None:
        tier, fields = self.limiter.tiers[tier_name], self.stored(install)
        live = [text.split() for name, text in fields.items() if name.startswith("hold:")]
        promised = sum(
            int(cost)
            for _, _, counter, cost, expires_ms in live
            if counter == tier.counter and int(expires_ms) > self.clock.now_ms
        )
        assert tier.quota is None or int(fields[f"{tier.counter}_consumed"]) + promised <= tier.quota

    def stored(self, install: str) -> dict[str, str]:
        return self.run(fields_of(self.redis, install))


def _without_holds(fields: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in fields.items() if name != "held" and not name.startswith("hold:")}


def _without_period(fields: dict[str, str]) -> dict[str, str]:
    moved = {"last_renewal_at", "anniversary_day", "monthly_consumed", "monthly_gemini_consumed"}
    return {name: value for name, value in fields.items() if name not in moved}


def test_any_sequence_of_operations_when_replayed_then_scripts_and_reference_agree(redis_url: str) -> None:
    with asyncio.Runner() as runner:
        redis = runner.run(connect(redis_url, timeout_ms=PATIENCE_MS))

        class Here(Credits):
            def __init__(self) -> None:
                super().__init__(runner, redis)

        try:
            run_state_machine_as_test(
                Here,
                settings=settings(
                    max_examples=EXAMPLES,
                    stateful_step_count=40,
                    deadline=None,
                    derandomize="LIMITER_TEST_EXAMPLES" not in os.environ,
                    suppress_health_check=list(HealthCheck),
                ),
            )
        finally:
            runner.run(redis.aclose())
