"""Identification of clients: install id and tier, from the headers; a claimed tier is never trusted."""

import time
import uuid

import pytest

from limiter.licences.keys import issue
from tests.support.licences import DAY_S, KEY, OTHER_KEY, PUBLIC_KEY, by_hand, claims, licence_for, signed
from tests.support.openai_backend import Backend
from tests.support.relay import CHAT, ONE_SERVER, Answer, RunningRelay, StartRelay, client_of, new_install

pytestmark = ONE_SERVER
BODY = b'{"model": "plain"}'


@pytest.fixture
async def licensed(start_relay: StartRelay, gemini: Backend) -> RunningRelay:
    """A relay that knows the operator's public key."""
    return await start_relay(client_of("gemini", gemini.url), public_keys=[PUBLIC_KEY])


async def tier_of(relay: RunningRelay, install_id: str) -> str:
    await relay.settled()
    row = await relay.limiter.row(install_id)
    assert row
    return row.tier_snapshot


async def test_install_when_its_case_differs_then_it_is_one_install(relay: RunningRelay) -> None:
    install_id = str(uuid.UUID(int=0xABCDEF << 90))
    for spelling in (install_id, install_id.upper(), install_id.title(), f" {install_id} "):
        assert (await relay.ask(headers={"X-Install-Id": spelling})).status == 200
    assert await relay.spent(install_id) == (4, 4)
    assert len(await relay.limiter.session.redis.keys("*")) == 1


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer "])
async def test_install_when_it_is_the_bearer_token_then_it_is_the_install(relay: RunningRelay, scheme: str) -> None:
    install_id = new_install()
    answer = await relay.send(
        "POST", CHAT, BODY, Content_Type="application/json", Authorization=f"{scheme} {install_id.upper()}"
    )
    assert answer.status == 200
    assert await relay.spent(install_id) == (1, 1)


@pytest.mark.parametrize(
    "install_id",
    [
        "readyz",
        "not-a-uuid",
        "{5f0c1c1e-8d3a-4a53-9a0e-0d8f2f6f3c11}",
        "urn:uuid:5f0c1c1e-8d3a-4a53-9a0e-0d8f2f6f3c11",
        "5f0c1c1e8d3a4a539a0e0d8f2f6f3c11",
        "5f0c1c1e-8d3a-4a53-9a0e-0d8f2f6f3c11x",
        "5f0c1c1e-8d3a-4a53-9a0e-0d8f2f6f3c1",
        "5f0c1c1e-8d3a-4a53-9a0e-0d8f2f6f3cé1",
        "\u0665f0c1c1e-8d3a-4a53-9a0e-0d8f2f6f3c11",
        "a,b",
        "x" * 4000,
    ],
)
async def test_install_when_it_is_not_a_uuid_then_400(relay: RunningRelay, gemini: Backend, install_id: str) -> None:
    answer = await relay.ask(headers={"X-Install-Id": install_id})
    assert (answer.status, answer.code) == (400, "invalid_install_id")
    assert len(answer.body) < 1000
    assert gemini.seen == []


async def test_install_when_there_are_two_different_ones_then_400(relay: RunningRelay) -> None:
    other = new_install()
    for second, status in ((other, 400), (relay.install_id.upper(), 200)):
        received = await relay.raw(
            b"GET /v1/credits HTTP/1.1\r\nHost: relay\r\nConnection: close\r\n"
            b"X-Install-Id: %s\r\nX-Install-Id: %s\r\n\r\n" % (relay.install_id.encode(), second.encode())
        )
        assert received.startswith(b"HTTP/1.1 %d " % status)
        assert (b'"code":"invalid_install_id"' in received) == (status == 400)


@pytest.mark.parametrize(
    "headers", [{}, {"X-Install-Id": ""}, {"Authorization": "Basic YTpi"}, {"Authorization": "Bearer "}]
)
async def test_install_when_there_is_none_then_400(relay: RunningRelay, headers: dict[str, str]) -> None:
    headers = {"Content-Type": "application/json", **headers}
    for method, path in (("POST", CHAT), ("GET", "/v1/credits")):
        async with relay.session.request(method, relay.url + path, data=BODY, headers=headers) as response:
            answer = Answer(response.status, response.headers, await response.read())
        assert (answer.status, answer.code) == (400, "missing_install_id")


async def test_licence_when_sent_with_an_install_id_then_its_tier_is_planned(licensed: RunningRelay) -> None:
    answer = await licensed.ask(headers={"Authorization": f"Bearer {licence_for('pro', KEY)}"})
    assert answer.status == 200
    assert answer.headers["RateLimit"].startswith('"credits";r=999')
    assert "X-Licence" not in answer.headers
    assert await tier_of(licensed, licensed.install_id) == "pro"


async def test_licence_when_sent_without_an_install_id_then_400(licensed: RunningRelay) -> None:
    answer = await licensed.send(
        "POST", CHAT, BODY, Content_Type="application/json", Authorization=f"Bearer {licence_for('pro', KEY)}"
    )
    assert (answer.status, answer.code) == (400, "missing_install_id")


async def test_licence_when_it_has_expired_then_core_and_a_header_says_so(licensed: RunningRelay) -> None:
    headers = {"Authorization": f"Bearer {licence_for('pro', KEY, valid_s=-3600)}"}
    for model in ("plain", "stream:1:0", "status:500", "bad-request"):
        answer = await licensed.ask(model, headers=headers)
        assert answer.headers["X-Licence"] == "expired", model
    assert await tier_of(licensed, licensed.install_id) == "core"
    balance = await licensed.send(
        "GET", "/v1/credits", X_Install_Id=licensed.install_id, Authorization=headers["Authorization"]
    )
    assert (balance.headers["X-Licence"], balance.document["tier"]) == ("expired", "core")


@pytest.mark.parametrize(
    "token",
    [
        pytest.param(signed(claims(), OTHER_KEY), id="bad signature"),
        pytest.param(by_hand({"alg": "none"}, claims()), id="alg none"),
        pytest.param(signed(claims(), KEY.public_key().public_bytes_raw(), "HS256"), id="HS256 with the public key"),
        pytest.param(signed(claims(), kid="0123456789abcdef"), id="wrong kid"),
        pytest.param(signed(claims(iat=int(time.time()) + 3600)), id="issued in an hour"),
        pytest.param(signed(claims(nbf=int(time.time()) + 3600)), id="not before an hour"),
        pytest.param("garbage", id="garbage"),
        pytest.param("sk-1234567890abcdef", id="a key of another service"),
        pytest.param("a b", id="two words"),
        pytest.param("x" * 5000, id="too long"),
    ],
)
async def test_licence_when_it_is_not_valid_then_401_and_no_row(
    licensed: RunningRelay, gemini: Backend, token: str
) -> None:
    answer = await licensed.ask(headers={"Authorization": f"Bearer {token}"})
    assert (answer.status, answer.code) == (401, "invalid_licence")
    assert answer.document["error"]["type"] == "authentication_error"
    assert token not in answer.body.decode()
    assert await licensed.limiter.row(licensed.install_id) is None
    assert gemini.seen == []


@pytest.mark.parametrize("token", ["garbage", "sk-1234567890abcdef", "5f0c1c1e-8d3a-4a53-9a0e-0d8f2f6f3c1"])
async def test_bearer_when_it_is_neither_a_uuid_nor_a_licence_then_401_with_that_cause(
    relay: RunningRelay, token: str
) -> None:
    answer = await relay.ask(headers={"Authorization": f"Bearer {token}"})
    assert (answer.status, answer.code) == (401, "invalid_licence")
    assert answer.document["detail"].startswith("The Bearer token is neither a UUID nor a licence. Send ")


async def test_licence_when_its_bytes_are_not_utf_8_then_401(licensed: RunningRelay) -> None:
    received = await licensed.raw(
        b"GET /v1/credits HTTP/1.1\r\nHost: relay\r\nConnection: close\r\nX-Install-Id: %s\r\n"
        b"Authorization: Bearer \xff\xfe.\xc3\x28.a\r\n\r\n" % licensed.install_id.encode()
    )
    assert received.startswith(b"HTTP/1.1 401 ")
    assert b'"code":"invalid_licence"' in received


async def test_licence_when_its_tier_is_not_offered_then_401(licensed: RunningRelay) -> None:
    answer = await licensed.ask(headers={"Authorization": f"Bearer {licence_for('gold', KEY)}"})
    assert (answer.status, answer.code) == (401, "unknown_tier")
    assert await licensed.limiter.row(licensed.install_id) is None


async def test_licence_when_no_public_key_is_set_then_none_is_accepted(relay: RunningRelay) -> None:
    answer = await relay.ask(headers={"Authorization": f"Bearer {licence_for('max', KEY)}"})
    assert (answer.status, answer.code) == (401, "invalid_licence")


@pytest.mark.parametrize("name", ["X-Tier", "X-Credits-Tier", "Tier", "X-Licence", "X-Subscription"])
async def test_tier_when_the_client_names_one_then_it_is_not_believed(relay: RunningRelay, name: str) -> None:
    answer = await relay.ask(headers={name: "max"}, tier="max", tier_snapshot="max")
    assert answer.headers["RateLimit-Policy"] == '"credits";q=50, "gemini";q=20'
    assert await tier_of(relay, relay.install_id) == "core"


async def test_bearer_when_it_is_an_install_and_so_is_the_header_then_the_header_counts(relay: RunningRelay) -> None:
    other = new_install()
    await relay.ask(headers={"Authorization": f"Bearer {other}"})
    assert await relay.spent() == (1, 1)
    assert await relay.limiter.row(other) is None


async def test_licence_when_issued_without_a_number_then_its_quota_is_there_once(licensed: RunningRelay) -> None:
    """Any number of installs would each have the whole quota: one licence, without end."""
    token = issue(KEY, tier="pro", subject="alice", valid_s=DAY_S)
    answers = [
        await licensed.ask(headers={"Authorization": f"Bearer {token}", "X-Install-Id": new_install()})
        for _ in range(5)
    ]
    assert [(answer.status, answer.code) for answer in answers[1:]] == [(403, "licence_seats_taken")] * 4
    assert answers[0].status == 200
