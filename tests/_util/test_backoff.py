"""Backoff: each pause is twice the one before, up to a maximum, and a success starts it over."""

from limiter._util.backoff import Backoff


def test_backoff_when_attempts_fail_then_pauses_double_up_to_the_maximum() -> None:
    backoff = Backoff(first_s=0.5, max_s=3.0)
    assert [backoff.next_s() for _ in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]


def test_backoff_when_reset_then_it_begins_with_the_first_pause_again() -> None:
    backoff = Backoff(first_s=0.1, max_s=0.4)
    for _ in range(4):
        backoff.next_s()
    backoff.reset()
    assert [backoff.next_s() for _ in range(3)] == [0.1, 0.2, 0.4]


def test_backoff_when_two_are_made_then_each_counts_for_itself() -> None:
    one, other = Backoff(first_s=1.0, max_s=8.0), Backoff(first_s=1.0, max_s=8.0)
    assert (one.next_s(), one.next_s(), other.next_s()) == (1.0, 2.0, 1.0)
