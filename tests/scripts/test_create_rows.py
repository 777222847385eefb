from dataclasses import replace
from itertools import count

import pytest
from redis.asyncio import Redis

from limiter import CreditLimiter, PutStatus, Row, ScriptContractError
from limiter.credits.keys import Keys
from limiter.credits.scripts import Scripts, stored_text
from limiter.redis.slot_map import slot_of
from tests.support.credits import fields_of


def beside(install_id: str) -> str:
    """Return another install whose row is in the same slot: in a cluster a call has only such rows."""
    keys = Keys()
    names = (f"a{number}" for number in count())
    return next(name for name in names if slot_of(keys.install(name)) == slot_of(keys.install(install_id)))


A = beside("b")
ROW = Row(A, "pro", 11, 12, "2026-05-01T08:00:00.000Z", 14, 15, 16, "2026-05-10T09:30:00.000Z")
OTHER = Row("b", "core", 1, 0, "2026-05-02T08:00:00.000Z", 2, 0, 0, "2026-05-02T08:00:00.000Z", extra='{"x":1}')


async def create(limiter: CreditLimiter, *rows: Row) -> list[PutStatus]:
    keys = [limiter.session.keys.install(row.install_id) for row in rows]
    return await Scripts(limiter.session.channel, timeout_ms=1000).create_rows(keys, [stored_text(row) for row in rows])


async def test_create_rows_when_they_are_new_then_each_is_what_put_row_makes_of_it(
    redis: Redis, limiter: CreditLimiter
) -> None:
    assert await create(limiter, ROW, OTHER) == [PutStatus.CREATED, PutStatus.CREATED]
    made = [await fields_of(redis, A), await fields_of(redis, "b")]
    await redis.flushdb()
    for row in (ROW, OTHER):
        await limiter.put_row(row, mode="create")
    assert made == [await fields_of(redis, A), await fields_of(redis, "b")]


async def test_create_rows_when_one_is_there_then_it_is_left_alone_and_the_others_are_stored(
    redis: Redis, limiter: CreditLimiter
) -> None:
    await limiter.debit(A, tier="core", has_hardware=True)
    before = await redis.dump(f"credits:install:{A}")
    assert await create(limiter, OTHER, ROW) == [PutStatus.CREATED, PutStatus.EXISTS]
    assert await redis.dump(f"credits:install:{A}") == before
    assert await limiter.row("b") == OTHER


async def test_create_rows_when_the_key_is_not_a_row_then_it_is_left_alone(
    redis: Redis, limiter: CreditLimiter
) -> None:
    await redis.set(f"credits:install:{A}", "x", ex=60)
    assert await create(limiter, ROW) == [PutStatus.EXISTS]
    assert await redis.get(f"credits:install:{A}") == b"x"


@pytest.mark.parametrize(
    "texts",
    [[], [stored_text(ROW)], [stored_text(ROW), ""], [stored_text(ROW), stored_text(OTHER).replace("\n", " ", 1)]],
    ids=["none", "one for two rows", "an empty one", "one of eight lines"],
)
async def test_create_rows_when_texts_are_not_whole_then_it_is_refused_and_nothing_stored(
    redis: Redis, limiter: CreditLimiter, texts: list[str]
) -> None:
    keys = [limiter.session.keys.install(row.install_id) for row in (ROW, OTHER)]
    with pytest.raises(ScriptContractError, match="BADARG create_rows"):
        await Scripts(limiter.session.channel, timeout_ms=1000).create_rows(keys, texts)
    assert await redis.dbsize() == 0


async def test_create_rows_when_some_are_there_then_an_extra_with_line_ends_is_stored_as_it_is(
    limiter: CreditLimiter,
) -> None:
    spaced = replace(OTHER, extra='{\n"x": 1\n}\n')
    await create(limiter, ROW)
    assert await create(limiter, ROW, spaced) == [PutStatus.EXISTS, PutStatus.CREATED]
    assert await limiter.row("b") == spaced
