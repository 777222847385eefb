from limiter._util.fingerprint_set import FingerprintSet


def test_seen_ids_when_many_are_added_then_each_is_new_once() -> None:
    seen = FingerprintSet()
    assert all(seen.add(f"i-{number}") for number in range(10_000))
    assert not any(seen.add(f"i-{number}") for number in range(10_000))
    assert len(seen) == 10_000
