"""Shares: none takes what another one needs, and whoever waits has a turn."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limiter._util.fair_share import FairShare, FairSlots


def test_share_when_one_takes_all_it_may_then_half_is_left_for_others() -> None:
    share = FairShare(100)
    assert share.try_take(["a"], 50)
    assert not share.try_take(["a"], 1)
    assert share.try_take(["b"], 25)
    assert not share.try_take(["b"], 1)
    share.give_back(["a"], 50)
    assert share.try_take(["b"], 12)
    assert share.taken == 37


def test_share_when_one_of_several_holders_has_used_its_own_up_then_nothing_is_taken() -> None:
    share = FairShare(10)
    for install in range(5):
        assert share.try_take([f"install {install}", "address"])
    assert not share.try_take(["another install", "address"])
    assert share.try_take(["another install", "another address"])
    assert share.taken == 6


@given(steps=st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 40), st.booleans()), max_size=60))
def test_share_when_any_is_taken_and_given_back_then_the_sums_stay_and_a_newcomer_finds_room(
    steps: list[tuple[str, int, bool]],
) -> None:
    share = FairShare(100)
    held: list[tuple[str, int]] = []
    for holder, amount, gives in steps:
        if gives and held:
            who, how_many = held.pop(0)
            share.give_back([who], how_many)
        elif share.try_take([holder], amount):
            held.append((holder, amount))
        assert share.taken == sum(amount for _, amount in held)
        largest = max((sum(amount for who, amount in held if who == name) for name in "abc"), default=0)
        assert largest <= 100
        newcomer = (100 - share.taken) // 2
        assert newcomer == 0 or share.try_take(["new"], newcomer)
        if newcomer:
            share.give_back(["new"], newcomer)
    for who, how_many in held:
        share.give_back([who], how_many)
    assert share.taken == 0
    assert share._held == {}


async def test_slots_when_several_wait_then_each_client_has_its_turn_before_another_one_has_two() -> None:
    slots = FairSlots(1)
    loop = asyncio.get_running_loop()
    order: list[str] = []

    async def work(name: str) -> None:
        await slots.take((name,), loop.time() + 5)
        order.append(name)
        await asyncio.sleep(0)
        slots.give_back((name,))

    await slots.take(("first",), loop.time() + 5)
    tasks = [asyncio.create_task(work(name)) for name in ["greedy"] * 5 + ["a", "b"]]
    await asyncio.sleep(0)
    slots.give_back(("first",))
    await asyncio.gather(*tasks)
    assert order == ["greedy", "a", "b", "greedy", "greedy", "greedy", "greedy"]
    assert slots.taken == 0
    assert slots._waiting == {}


async def test_slots_when_who_waits_leaves_or_has_its_time_over_then_no_slot_is_lost() -> None:
    slots = FairSlots(2)
    loop = asyncio.get_running_loop()
    await slots.take(("a",), loop.time() + 5)
    with pytest.raises(TimeoutError):
        await slots.take(("a",), loop.time() + 0.01)
    leaving = asyncio.create_task(slots.take(("a",), loop.time() + 5))
    await asyncio.sleep(0)
    slots.give_back(("a",))  # it is the turn of who leaves in the same moment
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert slots.taken == 0
    await slots.take(("b",), loop.time() + 0.01)
    slots.give_back(("b",))
    assert slots._waiting == {}
