"""The checks of a server's INFO, where no server of the tests is like that: old ones, full ones, several at once."""

import pytest

from limiter.redis.server_checks import Finding, Info, inspect, inspect_health

GOOD = {"redis_version": "7.2.4", "redis_mode": "standalone", "role": "master", "aof_enabled": 1, "maxmemory": 1 << 30}


def found(info: Info, *, allow_eviction: bool = False) -> list[Finding]:
    return inspect(info, subject="redis", kind="single", allow_eviction=allow_eviction)


def test_server_when_it_is_well_then_only_its_version_is_reported() -> None:
    assert found(GOOD) == [Finding("ok", "redis", "is Redis 7.2.4")]
    assert found(GOOD | {"valkey_version": "9.1.0"}) == [Finding("ok", "redis", "is Valkey 9.1.0")]
    assert inspect_health(GOOD, subject="redis", kind="single", wait_replicas=0) == []


@pytest.mark.parametrize("version", ["6.2.14", "5.0.3"])
def test_server_when_it_is_too_old_then_it_is_a_problem_that_names_the_version(version: str) -> None:
    (finding,) = found(GOOD | {"redis_version": version})
    assert finding.level == "problem"
    assert str(finding) == f"redis is Redis {version}, which is too old: use Redis 7 or later, or Valkey"


def test_server_when_several_things_are_wrong_then_all_are_found_the_wrong_kind_first() -> None:
    findings = found({"redis_version": "6.0.0", "role": "slave", "maxmemory_policy": "allkeys-lru"})
    assert [finding.level for finding in findings] == ["problem", "problem", "problem", "warning"]
    assert [finding.text.partition(" (")[0] for finding in findings] == [
        "is a replica, which takes no writes",
        "is Redis 6.0.0, which is too old",
        "may evict rows",
        "runs without AOF, so that a crash loses what was debited since its last snapshot",
    ]
    assert all(finding.advice for finding in findings)


def test_eviction_when_it_is_accepted_then_it_is_a_warning_which_does_not_advise_to_accept_it() -> None:
    refused, accepted = (
        next(each for each in found(GOOD | {"maxmemory_policy": "volatile-lru"}, allow_eviction=allow) if each.advice)
        for allow in (False, True)
    )
    assert (refused.level, accepted.level) == ("problem", "warning")
    assert "allow_eviction" in refused.advice
    assert "allow_eviction" not in accepted.advice


@pytest.mark.parametrize(("kind", "texts"), [("single", []), ("sentinel", ["has no replica"])])
def test_replicas_when_there_are_none_then_that_is_reported_only_where_they_are_expected(
    kind: str, texts: list[str]
) -> None:
    findings = inspect_health(
        GOOD, subject="redis", kind="sentinel" if kind == "sentinel" else "single", wait_replicas=0
    )
    assert [finding.text.partition(":")[0] for finding in findings] == texts


def test_health_when_there_is_no_maxmemory_then_that_is_reported() -> None:
    (finding,) = inspect_health(GOOD | {"maxmemory": 0}, subject="redis", kind="single", wait_replicas=0)
    assert (finding.level, finding.text.partition(":")[0]) == ("warning", "has no maxmemory")
    assert "CONFIG SET maxmemory" in finding.advice


def test_health_when_memory_is_nearly_full_and_the_aof_fails_then_both_are_reported() -> None:
    info = GOOD | {"used_memory": 90, "maxmemory": 100, "aof_last_write_status": "err"}
    findings = inspect_health(info, subject="redis", kind="single", wait_replicas=0)
    assert [(finding.level, finding.text) for finding in findings] == [
        ("warning", "uses 90% of maxmemory; when it is full, requests are refused"),
        ("problem", "failed in its last write of the AOF"),
    ]
