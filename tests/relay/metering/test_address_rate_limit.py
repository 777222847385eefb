"""The rate limit for requests of one address: over real connections, and its bound of memory."""

import re
from ipaddress import IPv4Address

import pytest

from limiter.relay.metering import address_rate_limit
from limiter.relay.metering.address_rate_limit import AddressRateLimit
from limiter.relay.telemetry.metrics import METRICS
from tests.support.openai_backend import Backend
from tests.support.relay import ONE_SERVER, RunningRelay, StartRelay, client_of


@pytest.fixture
async def limited(start_relay: StartRelay, gemini: Backend) -> RunningRelay:
    """A relay that takes three requests a minute from each address, behind a trusted proxy."""
    return await start_relay(
        client_of("gemini", gemini.url),
        rate_per_min_per_address=3,
        exempt_networks=["10.9.0.0/16"],
        trusted_proxies=["127.0.0.1"],
    )


async def statuses(relay: RunningRelay, *clients: str) -> list[int]:
    return [(await relay.send("GET", "/healthz", X_Forwarded_For=client)).status for client in clients]


@ONE_SERVER
async def test_requests_when_one_address_makes_too_many_then_its_next_one_is_a_429_and_others_are_served(
    limited: RunningRelay,
) -> None:
    assert await statuses(limited, *["203.0.113.5"] * 3) == [200] * 3
    refused = await limited.ask(headers={"X-Forwarded-For": "203.0.113.5"})
    assert (refused.status, refused.code) == (429, "rate_limited")
    assert 1 <= int(refused.headers["Retry-After"]) <= 20
    assert await statuses(limited, "203.0.113.6") == [200]
    assert (await limited.ask(headers={"X-Forwarded-For": "203.0.113.7"})).status == 200
    assert "limiter_address_rate_limited_total 1.0" in limited.app[METRICS].render().decode()


@ONE_SERVER
async def test_requests_when_they_come_from_one_site_by_ipv6_then_they_are_counted_together(
    limited: RunningRelay,
) -> None:
    assert await statuses(limited, *(f"2001:db8:1:{number:x}::1" for number in range(4))) == [200, 200, 200, 429]
    assert await statuses(limited, "2001:db8:1:100::1") == [200]


@ONE_SERVER
async def test_requests_when_their_network_is_exempt_then_they_are_not_counted(limited: RunningRelay) -> None:
    assert await statuses(limited, *["10.9.1.1"] * 9) == [200] * 9


@ONE_SERVER
async def test_requests_when_they_are_refused_or_malformed_then_they_count(
    start_relay: StartRelay, gemini: Backend
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url), rate_per_min_per_address=3, exempt_networks=[])
    sent = [b"no http at all\r\n\r\n", b"GET /nowhere HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"]
    received = [await relay.raw(each) for each in (*sent, *sent)]
    assert [int(re.findall(rb"^HTTP/1\.\d (\d{3})", each)[0]) for each in received] == [400, 404, 400, 429]


@ONE_SERVER
async def test_requests_when_they_come_from_this_machine_then_there_is_no_limit_by_default(
    start_relay: StartRelay, gemini: Backend
) -> None:
    relay = await start_relay(client_of("gemini", gemini.url), rate_per_min_per_address=1)
    assert [(await relay.send("GET", "/healthz")).status for _ in range(3)] == [200] * 3


def test_rate_when_an_address_pauses_then_it_may_go_on_at_the_rate() -> None:
    limit = AddressRateLimit(60)
    assert [limit._wait_s("a", 0.0) > 0 for _ in range(61)] == [False] * 60 + [True]
    assert limit._wait_s("a", 0.5) == pytest.approx(0.5)
    assert [limit._wait_s("a", 1.0) > 0 for _ in range(2)] == [False, True]
    assert [limit._wait_s("a", 100.0) > 0 for _ in range(61)] == [False] * 60 + [True]


def test_addresses_when_there_are_very_many_then_the_longest_unused_are_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(address_rate_limit, "_MAX_NETWORKS", 100)
    limit = AddressRateLimit(1)
    assert limit._wait_s("attacker", 0.0) == 0
    for number in range(1000):
        assert limit._wait_s(str(IPv4Address(number)), 0.0) == 0
    assert len(limit._busy_until_s) == 100
