"""One typed method per Lua script: the arguments it sends, the reply it decodes, the errors it maps.

A method here makes one attempt. What may be repeated is decided in `CreditLimiter`.
"""

from collections.abc import Awaitable, Callable, Sequence
from functools import lru_cache
from operator import attrgetter
from typing import Any, Literal, TypeVar

from redis.exceptions import NoScriptError, RedisError

from limiter.credits.models import (
    FIELDS,
    STORED_FIELDS,
    Backend,
    Balance,
    Decision,
    DecisionStatus,
    Leave,
    PutStatus,
    Reason,
    Row,
    Settlement,
    SettlementStatus,
    StreamStatus,
    Tier,
)
from limiter.redis.errors import translate_error
from limiter.redis.lua_source import compose, load_scripts
from limiter.redis.multiplexed import CommandChannel
from limiter.redis.resp import Argument, Template, encode

T = TypeVar("T")
PutMode = Literal["create", "replace", "merge"]
_DECIDED = {status.value.encode(): status for status in DecisionStatus}
_SETTLED = {status.value.encode(): status for status in SettlementStatus}
_STREAM = {status.value.encode(): status for status in StreamStatus}
_PUT = {status.value.encode(): status for status in PutStatus}
_REASON = {reason.value.encode(): reason for reason in Reason}
_VALUES = attrgetter(*STORED_FIELDS)
_DEFAULTS = tuple(each.default for each in FIELDS)
_BACKEND: dict[bytes, Backend | None] = {b"": None, b"gemini": "gemini", b"hardware": "hardware"}
load_scripts()


class Scripts:
    """The scripts on one Redis. Keys come from `Keys`; times are epoch milliseconds, None for the server's own."""

    __slots__ = ("_channel", "_timeout_s")

    def __init__(self, channel: CommandChannel, *, timeout_ms: int) -> None:
        self._channel = channel
        self._timeout_s = timeout_ms / 1000

    def reserve(
        self,
        row_key: str,
        *,
        hold_id: str,
        tier: Tier,
        has_hardware: bool,
        has_gemini: bool,
        cost: int,
        hold_ms: int,
        may_create: bool,
        enforces_rate: bool,
        now_ms: int | None,
    ) -> Awaitable[Decision]:
        """Run reserve.lua."""
        template = _template(
            "reserve",
            tier.name,
            tier.counter,
            tier.quota,
            tier.gemini_cap,
            tier.max_in_flight,
            int(has_hardware),
            int(has_gemini),
            cost,
            hold_ms,
            int(may_create),
            tier.rate_ms,
            tier.burst_ms,
            int(enforces_rate),
            now_ms,
        )
        return self._run("reserve", row_key, template.fill(row_key, hold_id), _decision, tier, hold_id)

    def debit(
        self,
        row_key: str,
        *,
        tier: Tier,
        has_hardware: bool,
        has_gemini: bool,
        cost: int,
        lifetime_tiers: str,
        may_create: bool,
        enforces_rate: bool,
        now_ms: int | None,
    ) -> Awaitable[Decision]:
        """Run debit.lua."""
        template = _template(
            "debit",
            tier.name,
            tier.counter,
            tier.quota,
            tier.gemini_cap,
            int(has_hardware),
            int(has_gemini),
            cost,
            lifetime_tiers,
            int(may_create),
            tier.rate_ms,
            tier.burst_ms,
            int(enforces_rate),
            now_ms,
        )
        return self._run("debit", row_key, template.fill(row_key), _decision, tier, "")

    async def balance(self, row_key: str, *, tier: Tier, now_ms: int | None) -> Balance:
        """Run balance.lua."""
        _, _, _, *left, _ = await self.call("balance", row_key, tier.counter, tier.quota, tier.gemini_cap, now_ms)
        return _balance(tier, *left)

    def commit(
        self,
        row_key: str,
        *,
        hold_id: str,
        backend: Backend | None,
        cost: int | None,
        lifetime_tiers: str,
        mark_ms: int | None,
        now_ms: int | None,
    ) -> Awaitable[Settlement]:
        """Run commit.lua."""
        template = _template("commit", backend, cost, lifetime_tiers, mark_ms, now_ms)
        return self._run("commit", row_key, template.fill(row_key, hold_id), _settlement)

    async def release(self, row_key: str, *, hold_id: str, now_ms: int | None) -> SettlementStatus:
        """Run release.lua."""
        status, *_ = await self.call("release", row_key, hold_id, 0, None, None, 0, 0, None, None, now_ms)
        return _SETTLED[status]

    async def leave(
        self,
        row_key: str,
        *,
        hold_id: str,
        leave: Leave,
        tier: Tier,
        enforces: bool,
        lifetime_tiers: str,
        now_ms: int | None,
    ) -> Settlement:
        """Run release.lua for a leave."""
        *settled, is_beyond = await self.call(
            "release",
            row_key,
            hold_id,
            1,
            tier.free_leaves,
            leave.request,
            int(leave.is_retry),
            int(enforces),
            leave.backend,
            lifetime_tiers,
            now_ms,
        )
        return _settlement(settled)._replace(is_beyond=is_beyond == 1)

    async def stream(self, row_key: str, *, hold_id: str, lease_ms: int, now_ms: int | None) -> StreamStatus:
        """Run stream.lua. lease_ms: 0 ends the mark."""
        status, *_ = await self.call("stream", row_key, hold_id, lease_ms, now_ms)
        return _STREAM[status]

    async def put_row(self, row_key: str, row: Row, *, mode: PutMode, dry_run: bool = False) -> PutStatus:
        """Run put_row.lua. dry_run: only return what it would do."""
        status, *_ = await self.call("put_row", row_key, mode, int(dry_run), *stored_values(row))
        return _PUT[status]

    def create_rows(self, row_keys: Sequence[str], texts: Sequence[str]) -> Awaitable[list[PutStatus]]:
        """Run create_rows.lua. texts: the `stored_text` of each row."""
        evalsha = encode("EVALSHA", compose("create_rows").sha, len(row_keys), *row_keys, *texts)
        return self._run("create_rows", row_keys[0], evalsha, _statuses)

    async def call(self, name: str, keys: str | Sequence[str], *arguments: Argument) -> Any:
        """Run one script on one key, or on several of one slot.

        It is loaded if the server does not have it (restart, SCRIPT FLUSH, failover).

        Raises LimiterUnavailable, BrokenRow, ScriptContractError.
        """
        keys = [keys] if isinstance(keys, str) else keys
        evalsha = encode("EVALSHA", compose(name).sha, len(keys), *keys, *arguments)
        return await self._run(name, keys[0], evalsha, _as_it_is)

    async def _run(self, name: str, row_key: str, evalsha: bytes, read: Callable[..., T], *more: Tier | str) -> T:
        """Send a call, and read its reply; more: further arguments of `read`."""
        try:
            try:
                reply = await self._channel.send(row_key, evalsha, self._timeout_s)
            except NoScriptError:
                await self._channel.load_script(row_key, compose(name).text, self._timeout_s)
                reply = await self._channel.send(row_key, evalsha, self._timeout_s)
        except RedisError as error:
            raise translate_error(error, row_key) from error
        return read(reply, *more)


@lru_cache(maxsize=1024)
def _template(name: str, *usual: Argument) -> Template:
    """Return a template of a script's call on one key, without the key and the first arguments.

    usual: the last arguments, which are the same in many calls: the limits of a tier, the cost, the flags. A time that
    is None comes last, and is left out.
    """
    if usual and usual[-1] is None:
        usual = usual[:-1]
    return Template(("EVALSHA", compose(name).sha, 1), usual)


def stored_values(row: Row) -> tuple[str | int, ...]:
    """Return the values that put_row.lua stores of a row, in its order: "" for a field that is not stored."""
    values: tuple[str | int, ...] = _VALUES(row)
    return tuple("" if value == default else value for value, default in zip(values, _DEFAULTS, strict=True))


def stored_text(row: Row) -> str:
    """Return the values that create_rows.lua stores of a row: the same ones, one a line."""
    return "\n".join(map(str, stored_values(row)))


def _as_it_is(reply: Any) -> Any:
    return reply


def _statuses(reply: list[bytes]) -> list[PutStatus]:
    return [_PUT[word] for word in reply]


def _settlement(reply: list[Any]) -> Settlement:
    status, tier, backend, cost = reply
    return Settlement(_SETTLED[status], tier.decode() or None, _BACKEND[backend], cost)


def _decision(reply: list[Any], tier: Tier, hold_id: str) -> Decision:
    status, reason, backend, remaining, gemini_remaining, held, renews_ms, began_at, now_ms, rate_wait_ms = reply
    balance = _balance(tier, remaining, gemini_remaining, held, renews_ms, began_at, now_ms)
    return Decision(
        _DECIDED[status], _REASON.get(reason), _BACKEND[backend], hold_id, balance, rate_wait_ms=rate_wait_ms
    )


def _balance(  # noqa: PLR0917  all that a reply says of it, in its order
    tier: Tier,
    remaining: int | None,
    gemini_remaining: int | None,
    held: int,
    renews_ms: int,
    began_at: bytes,
    now_ms: int,
) -> Balance:
    monthly = tier.counter == "monthly"
    return Balance(
        tier.name,
        tier.counter,
        tier.quota,
        remaining,
        tier.gemini_cap,
        gemini_remaining,
        held,
        began_at.decode() if monthly else None,
        renews_ms if monthly else None,
        now_ms,
    )
