"""The binding lines at the head of each script are its contract: they are compared with what Python really sends.

And the form that all scripts share, so that each can be read on its own.
"""

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass

import pytest
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from limiter import CreditLimiter, DecisionStatus, PutStatus, Row, SettlementStatus, Tiers, connect
from limiter.backup.lease import Lease, LeaseStatus
from limiter.backup.prune import NoteStatus, PruneNotes, Pruner, PruneStatus
from limiter.credits.keys import Keys
from limiter.credits.models import Leave, StreamStatus
from limiter.licences.revocations import Revocations, RevocationStatus
from limiter.licences.seats import Seats, SeatStatus
from limiter.redis.lua_source import compose, script_names
from limiter.relay.metering.claims import Claims, ClaimStatus
from limiter.relay.metering.install_rate_limit import InstallRateLimit, MintStatus
from tests.support.credits import Clock
from tests.support.paths import LUA
from tests.support.redis_proxy import Proxy, proxy_of

ALL_NAMES = sorted(path.stem for path in LUA.glob("*.lua"))
NAMES = [name for name in ALL_NAMES if name != "create_rows"]  # it alone takes a list of keys, and binds whole tables
OF_SEVERAL_KEYS = {"install_mint"}  # all with one hash tag
INCLUDES = sorted(path.stem for path in (LUA / "include").glob("*.lua"))
BINDING = re.compile(
    r"^local (?P<name>\w+) += (?:ARGV\[(?P<optional>\d+)\] ~= \"\" and )?(?P<call>tonumber\()?"
    r"(?P<table>KEYS|ARGV)\[(?P<index>\d+)\](?(call)\))(?P<sum> \+ 0)?(?: == \"1\")? +-- (?P<comment>.+)$"
)
# Of put_row, whose last arguments are listed in a table: the values of a row's fields, in its order.
FIELD = re.compile(r'^  \{ "(?P<name>\w+)", "(?P<kind>\w+)".* \}, +-- (?P<comment>.+)$')
LUA_WORDS = frozenset(
    re.findall(
        r"\w+",
        "and do else elseif end false for function if in local nil not or return then true while "
        "ipairs math redis string table tonumber unpack",
    )
)
STATUSES = (
    DecisionStatus,
    SettlementStatus,
    StreamStatus,
    PutStatus,
    ClaimStatus,
    SeatStatus,
    RevocationStatus,
    PruneStatus,
    NoteStatus,
    MintStatus,
    LeaseStatus,
)
WORDS = ["KNOWN", *(status for statuses in STATUSES for status in statuses)]  # the first is balance's; Python drops it
STATUS = r"\b(?:" + "|".join(WORDS) + r")\b"


@dataclass(frozen=True)
class Binding:
    name: str
    table: str
    index: int
    is_number: bool
    is_of_one_argument: bool
    comment: str


def bindings(name: str) -> Iterator[Binding]:
    count = 0
    for line in (LUA / f"{name}.lua").read_text().splitlines():
        if found := FIELD.match(line):
            count += 1
            yield Binding(
                found["name"],
                "ARGV",
                count,
                found["kind"] in {"count", "day"},
                True,
                found["comment"],
            )
        if found := BINDING.match(line):
            count = int(found["index"])
            yield Binding(
                found["name"],
                found["table"],
                int(found["index"]),
                bool(found["call"] or found["sum"]),
                found["optional"] in {None, found["index"]},
                found["comment"],
            )


TIERS = Tiers.from_mapping(
    {
        "core": {"lifetime": 9},
        "pro": {
            "monthly": 701,
            "gemini_cap": 702,
            "max_in_flight": 703,
            "rate_per_min": 84,  # 715 ms each
            "burst": 2,
            "free_leaves": 7,
        },
    }
)
ROW = Row("a", "pro", 11, 12, "2026-05-01T08:00:00.000Z", 14, 15, 16, "2026-05-10T09:30:00.000Z", extra='{"x":1}')
PRO = {"tier_name": "pro", "counter": "monthly", "quota": "701", "gemini_cap": "702"}
RATE = {"rate_ms": "715", "burst_ms": "1430", "enforces_rate": "1"}
NOW = {"now_arg": "1778540577123"}
CALLS: dict[str, tuple[Callable[[CreditLimiter], Awaitable[object]], dict[str, str]]] = {
    "reserve": (
        lambda limiter: limiter.reserve(
            "a", tier="pro", has_hardware=True, has_gemini=False, cost=704, hold_id="h-1", may_create=False
        ),
        PRO
        | RATE
        | NOW
        | {
            "hold_id": "h-1",
            "max_in_flight": "703",
            "has_hardware": "1",
            "has_gemini": "0",
            "cost_arg": "704",
            "hold_ms": "705000",
            "may_create": "0",
        },
    ),
    "debit": (
        lambda limiter: limiter.debit("a", tier="pro", has_hardware=False, cost=704, may_create=True),
        PRO
        | RATE
        | NOW
        | {"has_hardware": "0", "has_gemini": "1", "cost": "704", "lifetime_tiers": "core", "may_create": "1"},
    ),
    "commit": (
        lambda limiter: limiter.commit("a", "h-1", backend="hardware", cost=704, stream_ms=716),
        {"hold_id": "h-1", "used_backend": "hardware", "used_cost": "704", "lifetime_tiers": "core", "mark_ms": "716"}
        | NOW,
    ),
    "release": (
        lambda limiter: limiter.leave("a", "h-1", tier="pro", leave=Leave("hardware", "r-1", is_retry=True)),
        NOW
        | {
            "hold_id": "h-1",
            "is_leave": "1",
            "free_leaves": "7",
            "request": "r-1",
            "is_retry": "1",
            "enforces": "1",
            "used_backend": "hardware",
            "lifetime_tiers": "core",
        },
    ),
    "stream": (
        lambda limiter: limiter.renew_stream("a", "h-1", stream_ms=716),
        {"hold_id": "h-1", "lease_ms": "716"} | NOW,
    ),
    "balance": (
        lambda limiter: limiter.balance("a", tier="pro"),
        {"counter": "monthly", "quota": "701", "gemini_cap": "702"} | NOW,
    ),
    "put_row": (
        lambda limiter: limiter.put_row(ROW, mode="merge"),
        {
            "mode": "merge",
            "dry_run": "0",
            "tier_snapshot": "pro",
            "lifetime_consumed": "11",
            "lifetime_gemini_consumed": "12",
            "last_renewal_at": "2026-05-01T08:00:00.000Z",
            "anniversary_day": "14",
            "monthly_consumed": "15",
            "monthly_gemini_consumed": "16",
            "last_active_at": "2026-05-10T09:30:00.000Z",
            "extra": '{"x":1}',
        },
    ),
    "idempotency_claim": (
        lambda limiter: Claims(limiter.session).claim(
            "credits:claim:a:k", "o", "f", claim_ms=706, attempt=2, missed_ms=705
        ),
        NOW | {"owner": "o", "fingerprint": "f", "claim_ms": "706", "attempt": "2", "missed_ms": "705"},
    ),
    "idempotency_record": (
        lambda limiter: Claims(limiter.session).record("credits:claim:a:k", "o", "f", keep_ms=707, busy_ms=706),
        NOW | {"owner": "o", "fingerprint": "f", "busy_ms": "706", "keep_ms": "707"},
    ),
    "idempotency_keep": (
        lambda limiter: Claims(limiter.session).keep("credits:claim:a:k", "o", "f", keep_ms=707, answer=b"x\x80"),
        NOW | {"owner": "o", "fingerprint": "f", "answer": "x\udc80", "keep_ms": "707"},
    ),
    "idempotency_budget": (
        lambda limiter: Claims(limiter.session).count_kept("credits:kept:a", 706, budget_b=708, keep_ms=707),
        NOW | {"bytes": "706", "budget": "708", "keep_ms": "707"},
    ),
    "idempotency_drop": (lambda limiter: Claims(limiter.session).drop("credits:claim:a:k", "o"), {"owner": "o"}),
    "licence_seat": (
        lambda limiter: Seats(limiter.session).take("b", "a", seats=3, expires_s=2_000_000_000),
        NOW | {"install_id": "a", "seats": "3", "expires_ms": "2002592000000"},
    ),
    "licence_revoke": (
        lambda limiter: Revocations(limiter.session).change("alice", 2_002_592_000_000, version="v-1"),
        NOW | {"name": "alice", "expires_ms": "2002592000000", "version": "v-1", "limit": "10000"},
    ),
    "prune_row": (
        lambda limiter: Pruner(limiter.session).prune("credits:install:a", unused_ms=709, dry_run=True),
        NOW | {"unused_ms": "709", "dry_run": "1"},
    ),
    "prune_note": (
        lambda limiter: PruneNotes(limiter.session).note("part", 710, keep_ms=711),
        NOW | {"part": "part", "rows": "710", "keep_ms": "711"},
    ),
    "lease": (
        lambda limiter: Lease(limiter.session, lease_s=0.71, owner="o").take(
            least_epoch=711, checksum="sha256:x", good_at=ROW.last_active_at
        ),
        NOW
        | {
            "owner": "o",
            "least_epoch": "711",
            "lease_ms": "710",
            "checksum": "sha256:x",
            "good_at": "2026-05-10T09:30:00.000Z",
        },
    ),
    "install_mint": (
        lambda limiter: InstallRateLimit(limiter.session).mint({"203.0.113.9": 708}, period_ms=709),
        NOW | {"limits_arg": "708", "period_ms": "709", "share": "0"},
    ),
}
# Of whom the first key is not that of a row.
KEYS = {
    **dict.fromkeys((each for each in CALLS if each.startswith("idempotency_")), "credits:claim:a:k"),
    "idempotency_budget": "credits:kept:a",
    "licence_seat": Keys().seats("b"),
    "licence_revoke": "credits:revoked",
    "prune_note": "credits:pruned",
    "lease": "credits:persister",
    "install_mint": "credits:{mint}:203.0.113.9",
}


@pytest.fixture
async def proxy(redis: Redis, redis_url: str) -> AsyncIterator[Proxy]:
    await redis.ping()
    async with proxy_of(redis_url) as proxy:
        yield proxy


@pytest.mark.parametrize("name", NAMES)
async def test_call_when_it_leaves_python_then_each_argument_is_at_the_place_that_its_binding_names(
    proxy: Proxy, clock: Clock, name: str
) -> None:
    client = await connect(proxy.url)
    call, wanted = CALLS[name]
    await call(CreditLimiter(client, TIERS, clock=clock, hold_ms=705_000))
    await client.aclose()
    sent = [command for command in proxy.commands if command[:2] == (b"EVALSHA", compose(name).sha.encode())]
    _, _, key_count, key, *arguments = sent[-1]
    assert (key_count, key.decode()) == (b"1", KEYS.get(name, "credits:install:a"))
    bound = [binding for binding in bindings(name) if binding.table == "ARGV"]
    assert [binding.index for binding in bound] == list(range(1, len(arguments) + 1))
    texts = [argument.decode(errors="surrogateescape") for argument in arguments]
    assert {binding.name: text for binding, text in zip(bound, texts, strict=True)} == wanted


@pytest.mark.parametrize("name", ["reserve", "debit", "commit"])
async def test_decision_when_it_goes_by_the_servers_clock_then_no_argument_is_sent_for_the_time(
    proxy: Proxy, name: str
) -> None:
    client = await connect(proxy.url)
    await CALLS[name][0](CreditLimiter(client, TIERS, hold_ms=705_000))
    await client.aclose()
    sent = [command for command in proxy.commands if command[:2] == (b"EVALSHA", compose(name).sha.encode())]
    wanted = [text for argument, text in CALLS[name][1].items() if argument != "now_arg"]
    assert sorted(argument.decode() for argument in sent[-1][4:]) == sorted(wanted)


def test_calls_when_listed_then_every_script_is_among_them() -> None:
    assert sorted([*CALLS, "create_rows"]) == ALL_NAMES == script_names()


@pytest.mark.parametrize("name", NAMES)
def test_binding_when_its_comment_says_int_then_it_is_converted_and_no_other_is(name: str) -> None:
    for binding in bindings(name):
        assert binding.is_of_one_argument, binding
        is_text = binding.name.endswith(
            "_arg"
        )  # unconverted: the script needs the text too, or distinguishes "" from a number
        assert binding.is_number == (binding.comment.startswith("int ") and not is_text), binding
        if binding.is_number:
            assert re.match(r"int (>=? 0|1\.\.31)(, \w|; |$)", binding.comment), f"{binding} has no bound"
        if CALLS[name][1].get(binding.name, "").isdigit() and '"1"' not in binding.comment:
            assert binding.is_number or is_text or binding.comment.startswith("1 | 0"), binding


@pytest.mark.parametrize("name", NAMES)
def test_script_when_its_bindings_are_over_then_it_names_no_argument_any_more(name: str) -> None:
    lines = (LUA / f"{name}.lua").read_text().splitlines()
    bound = [number for number, line in enumerate(lines) if BINDING.match(line)]
    assert bound == list(range(bound[0], bound[0] + len(bound))), "the bindings stand together"
    keys = [binding.index for binding in bindings(name) if binding.table == "KEYS"]
    assert keys == ([] if name in OF_SEVERAL_KEYS else [1]), "one key, one slot"
    for line in lines[bound[-1] + 1 :] + [line for include in INCLUDES for line in _include(include).splitlines()]:
        assert "KEYS[" not in line
        assert "ARGV[" not in line


@pytest.mark.parametrize("name", ALL_NAMES)
def test_script_when_opened_then_its_head_says_what_it_does_and_what_it_returns(name: str) -> None:
    first, *lines = (LUA / f"{name}.lua").read_text().splitlines()
    assert re.fullmatch(r"#!lua( flags=[a-z-]+)?", first)
    head = lines[: next(number for number, line in enumerate(lines) if not line.startswith("--"))]
    assert any(line.startswith("-- Reply: {status") for line in head)
    stated = set(re.findall(STATUS, "\n".join(head)))
    answered = set(re.findall(f'"({STATUS})"', "\n".join(lines)))
    assert stated == answered, "its head and its answers differ"
    assert stated, "it answers no status"


@pytest.mark.parametrize("name", INCLUDES)
def test_include_when_given_what_it_takes_then_it_needs_nothing_else_and_gives_what_it_says(name: str) -> None:
    """It is pasted, not called: its head is its signature."""
    takes, gives = map(set, (takes_of(name), names_in(gives_of(name))))
    text, code = _include(name), code_of(_include(name))
    assert "--@include" not in text
    words = set(re.findall(r"(?<![.\w])[a-z_]\w*", code)) - LUA_WORDS
    assert words - locals_of(text) <= takes | gives, "it uses names of the script and does not say so"
    assert takes | gives <= words, "it names what it does not use"
    assigned = {
        word.strip() for names in re.findall(r"^ *([a-z][\w, ]*) = ", code, re.MULTILINE) for word in names.split(",")
    }
    assert {word for word in assigned if " " not in word} - locals_of(text) <= gives, "it changes what it does not give"


@pytest.mark.parametrize("name", ALL_NAMES)
def test_includes_when_pasted_then_what_each_takes_is_above_it_and_what_it_gives_stands_beside_it(name: str) -> None:
    known: set[str] = set()
    for line in re.sub(r",\n-- +", ", ", (LUA / f"{name}.lua").read_text()).splitlines():
        if line.startswith("--@include"):
            included = re.fullmatch(r"--@include (\w+) -> (.+)", line)
            assert included, f"{line!r} does not say what it gives"
            assert included[1] in INCLUDES
            takes = set(takes_of(included[1]))
            assert takes <= known, f"{included[1]} lacks {takes - known}"
            assert included[2] == gives_of(included[1]), f"{included[1]} gives other names, or in another order"
            known |= set(names_in(included[2]))
        known |= locals_of(line)
    assert "--@include" not in compose(name).text


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        *[("reserve", "cost_arg", value) for value in ("0", "-1", "1.5")],
        *[("reserve", "hold_id", ""), ("reserve", "hold_ms", "0")],
        *[("debit", "cost", value) for value in ("0", "-1", "1.5")],
        *[("commit", "used_cost", value) for value in ("0", "-1", "1.5")],
        *[
            ("commit", "hold_id", ""),
            ("release", "hold_id", ""),
            ("release", "free_leaves", "-1"),
            ("stream", "hold_id", ""),
            ("stream", "lease_ms", "-1"),
            ("balance", "counter", "weekly"),
        ],
        *[("put_row", "mode", value) for value in ("", "erase", "create?", "create??")],
        *[
            ("idempotency_claim", "owner", ""),
            ("idempotency_claim", "fingerprint", ""),
            ("idempotency_claim", "claim_ms", "0"),
        ],
        *[
            ("idempotency_record", "owner", ""),
            ("idempotency_record", "fingerprint", ""),
            ("idempotency_record", "busy_ms", "-1"),
            ("idempotency_record", "keep_ms", "0"),
        ],
        *[
            ("idempotency_drop", "owner", ""),
            ("licence_seat", "install_id", ""),
            ("licence_seat", "seats", "0"),
            ("licence_seat", "expires_ms", "0"),
            ("prune_row", "unused_ms", "0"),
            ("prune_note", "part", ""),
            ("prune_note", "rows", "-1"),
            ("prune_note", "keep_ms", "0"),
            ("licence_revoke", "name", ""),
            ("licence_revoke", "version", ""),
            ("licence_revoke", "expires_ms", "-1"),
            ("licence_revoke", "limit", "0"),
        ],
        *[("lease", "owner", ""), ("lease", "least_epoch", "-1"), ("lease", "lease_ms", "-1")],
        *[("install_mint", "limits_arg", value) for value in ("", "0", "708,708", "x")],
        *[("install_mint", "period_ms", "0"), ("install_mint", "share", "-1"), ("install_mint", "share", "1")],
    ],
)
async def test_script_when_an_argument_breaks_its_bound_then_it_is_refused_and_nothing_is_written(
    redis: Redis, name: str, argument: str, value: str
) -> None:
    """A caller other than limiter.credits.scripts, which never sends these."""
    right = CALLS[name][1]
    assert argument in right
    bound = [binding.name for binding in bindings(name) if binding.table == "ARGV"]
    arguments = [(right | {argument: value})[word].encode(errors="surrogateescape") for word in bound]
    with pytest.raises(ResponseError, match=f"BADARG {name} wants "):
        await redis.eval(compose(name).text, 1, KEYS.get(name, "credits:install:a"), *arguments)
    assert await redis.dbsize() == 0


@pytest.mark.parametrize(
    "name", ["calendar", "counters", "flow", "flow_text", "held_credits", "held_text", "now_iso", "plan", "rate"]
)
def test_include_when_it_is_to_be_pure_then_it_calls_no_redis(name: str) -> None:
    assert "redis." not in _include(name)


@pytest.mark.parametrize("name", ALL_NAMES)
async def test_script_when_loaded_then_the_server_accepts_it_under_our_sha(redis: Redis, name: str) -> None:
    script = compose(name)
    assert await redis.script_load(script.text) == script.sha


def takes_of(include: str) -> list[str]:
    """Return the names that an include's head says it takes."""
    return names_in(re.sub(r"\([^)]*\)", "", _signature(include)[1]))


def gives_of(include: str) -> str:
    """Return what an include's head says it gives, without the remarks in parentheses: as its use sites repeat it."""
    return ", ".join(re.split(r"\s*,\s*", re.sub(r"\([^)]*\)", "", _signature(include)[2]).strip()))


def names_in(text: str) -> list[str]:
    """Return the names that a head or a use site lists."""
    return [] if text.strip() == "nothing" else re.split(r"\s*,\s*", text.strip())


def _signature(include: str) -> re.Match[str]:
    head = re.match(r"(?:--.*\n)+", _include(include))
    assert head, f"{include} has no head"
    parts = re.search(r"Takes: (.+?) Gives: (.+)", re.sub(r"\n-- *", " ", head[0]).strip(), re.DOTALL)
    assert parts, f"the head of {include} does not say what it takes and gives"
    return parts


def code_of(text: str) -> str:
    """Return Lua without its comments and texts."""
    return re.sub(r"\"[^\"\n]*\"|--[^\n]*", '""', text)


def locals_of(text: str) -> set[str]:
    """Return the names that Lua declares: variables, functions, parameters."""
    code = code_of(text)
    lists = re.findall(r"\blocal (?!function)([\w, ]+)", code) + re.findall(r"\bfor ([\w, ]+?) (?:=|in\b)", code)
    lists += [word for found in re.findall(r"\bfunction (\w+)\(([\w, ]*)\)", code) for word in found]
    return {word.strip() for words in lists for word in words.split(",")}


def _include(name: str) -> str:
    return (LUA / "include" / f"{name}.lua").read_text()
