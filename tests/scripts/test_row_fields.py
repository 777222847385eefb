"""The fields of a row are listed once in Python, and once in each of the two scripts that store whole rows."""

import re
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from redis.asyncio import Redis

from limiter import CreditLimiter, Row, connect
from limiter.credits.models import FIELDS, STORED_FIELDS, FieldKind
from limiter.credits.scripts import Scripts, stored_text, stored_values
from limiter.ledger.row_fast_path import REGULAR_ROW, line_from_values, row_from_groups, stored_text_from_groups
from limiter.redis.lua_source import compose
from tests.support.credits import TIERS, fields_of
from tests.support.paths import LUA
from tests.support.redis_proxy import Proxy, proxy_of

REQUIRED = [each.name for each in FIELDS if each.default is None]
OPTIONAL = [each.name for each in FIELDS if each.default is not None]
REGULAR = Row("a", "pro", 11, 12, "2026-05-01T08:00:00.000Z", 14, 15, 16, "2026-05-10T09:30:00.000Z")
VALUES = {FieldKind.COUNT: 17, FieldKind.OTHERS: '{"x":1}'}
ROW = replace(REGULAR, **{each.name: VALUES[each.kind] for each in FIELDS if each.default is not None})  # type: ignore[arg-type]  # each of its kind


@pytest.fixture
async def proxy(redis: Redis, redis_url: str) -> AsyncIterator[Proxy]:
    await redis.ping()
    async with proxy_of(redis_url) as proxy:
        yield proxy


def lua(name: str) -> str:
    return (LUA / f"{name}.lua").read_text()


def test_put_row_when_its_table_is_read_then_it_has_each_field_with_its_kind_and_in_its_place() -> None:
    listed = re.findall(r'^  \{ "(\w+)", "(\w+)"(.*) \}', lua("put_row"), re.MULTILINE)
    assert [(name, kind, "optional = true" in rest) for name, kind, rest in listed] == [
        (each.name, each.kind.name.lower(), each.default is not None) for each in FIELDS
    ]


def test_create_rows_when_it_is_read_then_it_has_each_field_in_its_place() -> None:
    written = re.findall(r'^ +"(\w+)", row\[(\d+)\],$', lua("create_rows"), re.MULTILINE)
    assert written == [(name, str(place)) for place, name in enumerate(REQUIRED, 1)]
    optional = re.search(r"^local optional = \{\n(.+?)^\}", lua("create_rows"), re.MULTILINE | re.DOTALL)
    assert optional
    assert re.findall(r'^  "(\w+)",', optional[1], re.MULTILINE) == OPTIONAL
    counts = re.findall(r"(\d+) \+ #optional|row\[(\d+) \+ at\]", lua("create_rows"))
    assert [int(one or other) for one, other in counts] == [len(REQUIRED) - 1, len(REQUIRED), len(REQUIRED)]


def test_fields_when_listed_then_each_optional_one_follows_the_others_and_extra_is_the_last() -> None:
    assert (*REQUIRED, *OPTIONAL) == STORED_FIELDS
    assert FIELDS[-1].kind is FieldKind.OTHERS


async def test_create_rows_when_it_leaves_python_then_each_row_has_its_key_and_a_line_for_each_field(
    proxy: Proxy, redis: Redis
) -> None:
    client = await connect(proxy.url)
    session = CreditLimiter(client, TIERS).session
    await Scripts(session.channel, timeout_ms=1000).create_rows([session.keys.install("a")], [stored_text(ROW)])
    await client.aclose()
    sent = [command for command in proxy.commands if command[:2] == (b"EVALSHA", compose("create_rows").sha.encode())]
    *_, key_count, key, text = sent[-1]
    assert (key_count, key) == (b"1", b"credits:install:a")
    lines = dict(zip(STORED_FIELDS, text.decode().split("\n"), strict=True))
    assert lines == {name: str(getattr(ROW, name)) for name in STORED_FIELDS} == await fields_of(redis, "a")


async def test_optional_field_when_it_has_its_default_then_neither_script_stores_it(
    redis: Redis, limiter: CreditLimiter
) -> None:
    assert stored_values(REGULAR)[len(REQUIRED) :] == ("",) * len(OPTIONAL)
    for _ in range(2):  # the second time over a row that has them all
        await limiter.put_row(REGULAR, mode="replace")
        assert [*await fields_of(redis, "a")] == REQUIRED
        await limiter.put_row(ROW, mode="replace")
    await redis.flushdb()
    await limiter.session.scripts(timeout_ms=1000).create_rows(
        [limiter.session.keys.install("a")], [stored_text(REGULAR)]
    )
    assert [*await fields_of(redis, "a")] == REQUIRED


def test_fast_path_when_a_row_has_the_regular_form_then_its_patterns_agree_with_the_table() -> None:
    values = [str(value).encode() or None for value in stored_values(REGULAR)]
    line = line_from_values(b"a", values)
    assert line
    found = REGULAR_ROW.fullmatch(line.decode() + ",\n")
    assert found
    assert row_from_groups(found.groups()) == REGULAR
    assert stored_text_from_groups(found.groups()) == stored_text(REGULAR)
