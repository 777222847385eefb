"""Admission: the seats of licences, and the rate limit for new installs by client address."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from redis.asyncio import Redis

from limiter import CreditLimiter, Tiers, connect
from limiter.credits.keys import Keys
from limiter.errors import SettingsError
from limiter.licences.seats import Seats
from limiter.licences.tokens import Licence
from limiter.relay.http.client_address import client_address, parse_networks
from limiter.relay.metering.admission import Admission, CreditRequest
from limiter.relay.metering.install_rate_limit import InstallRateLimit
from tests.relay.metering.test_idempotency import Answer, add_request_id, error_middleware
from tests.support.cli import limiter
from tests.support.credits import text_of
from tests.support.redis_servers import Server
from tests.support.relay import ONE_SERVER

pytestmark = [ONE_SERVER, pytest.mark.usefixtures("redis_url")]  # also where a test has a server of its own, or none
TIERS = Tiers.from_mapping({"core": {"lifetime": 50}})
PROXIES = ["127.0.0.0/8", "10.0.0.0/8", "fd00::/8", "192.0.2.1"]
SUBJECT = "alice@example.org"


@dataclass
class Node:
    """One relay node in small: it seats, reserves and releases."""

    limiter: CreditLimiter
    admission: Admission
    session: aiohttp.ClientSession
    url: str = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        install_id = request.headers["X-Install-Id"]
        licence = None
        if "X-Seats" in request.headers:
            expires_s = int(time.time()) + 86_400
            seats = int(request.headers["X-Seats"]) or None
            licence = Licence("core", SUBJECT, expires_s, seats, "", expired="X-Expired" in request.headers, id="")
        await self.admission.seat(install_id, licence)
        credit = CreditRequest(
            install_id, tier="core", has_hardware=False, has_gemini=True, cost=1, hold_id=uuid.uuid4().hex
        )
        decision = await self.admission.reserve(request, licence, credit)
        await self.limiter.commit(install_id, decision.hold_id)
        return web.json_response({"status": decision.status})

    async def ask(self, install_id: str | None = None, forwarded: str | None = None, **headers: str) -> Answer:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        named |= {"X-Install-Id": install_id or str(uuid.uuid4())}
        named |= {"X-Forwarded-For": forwarded} if forwarded else {}
        async with self.session.get(self.url, headers=named) as response:
            return Answer(response.status, response.headers, await response.read())


StartNode = Callable[..., Awaitable[Node]]


@pytest.fixture
async def start(redis: Redis, redis_url: str) -> AsyncIterator[StartNode]:
    await redis.ping()
    async with AsyncExitStack() as stack:

        async def start(
            url: str = redis_url,
            *,
            trusted: list[str] | None = None,
            timeout_ms: int = 5000,
            mint_per_ip: int = 20,
            mint_overall: int = 50,
            **wider: int,
        ) -> Node:
            client = await connect(url, timeout_ms=timeout_ms)
            stack.push_async_callback(client.aclose)
            limiter = CreditLimiter(client, TIERS, timeout_ms=timeout_ms, deadline_ms=2 * timeout_ms)
            admission = Admission(
                limiter,
                Seats(limiter.session),
                InstallRateLimit(
                    limiter.session,
                    per_ip=mint_per_ip,
                    overall=mint_overall,
                    limit_loopback=True,
                    **{"per_ipv4_24": 0, "per_ipv6_48": 0, "per_ipv6_32": 0, **wider},
                ),
                trusted_proxies=parse_networks("relay.trusted_proxies", PROXIES if trusted is None else trusted),
            )
            session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
            stack.push_async_callback(session.close)
            node = Node(limiter, admission, session)
            app = web.Application(middlewares=[error_middleware])
            app.router.add_get("/", node.handle)
            app.on_response_prepare.append(add_request_id)
            runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=5)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            node.url = f"http://127.0.0.1:{runner.addresses[0][1]}/"
            return node

        yield start


async def rows(redis: Redis) -> int:
    return len(await redis.keys("*:install:*"))


async def test_install_when_new_ones_are_limited_then_429_and_nothing_is_created(
    start: StartNode, redis: Redis
) -> None:
    node = await start(mint_per_ip=3)
    assert [(await node.ask()).status for _ in range(3)] == [200] * 3
    refused = await node.ask()
    assert (refused.status, refused.code) == (429, "install_mint_limited")
    assert 1100 < int(refused.headers["Retry-After"]) <= 1200
    assert await rows(redis) == 3


async def test_install_when_it_is_known_then_the_limit_never_hurts_it(start: StartNode, redis: Redis) -> None:
    node, known = await start(mint_per_ip=1, mint_overall=1), str(uuid.uuid4())
    await node.ask(known)
    assert (await node.ask()).status == 429
    before = await redis.get(Keys().mint("127.0.0.1"))
    assert [(await node.ask(known)).status for _ in range(5)] == [200] * 5
    assert await redis.get(Keys().mint("127.0.0.1")) == before


async def test_installs_when_limited_overall_then_the_address_gets_its_own_back(start: StartNode, redis: Redis) -> None:
    node = await start(mint_per_ip=10, mint_overall=2)
    for number in range(2):
        assert (await node.ask(forwarded=f"203.0.113.{number}")).status == 200
    for _ in range(3):
        assert (await node.ask(forwarded="203.0.113.9")).code == "install_mint_limited"
    assert not await redis.exists(Keys().mint("203.0.113.9"))
    assert await rows(redis) == 2


async def test_installs_when_limits_are_off_then_all_are_admitted_and_none_is_counted(
    start: StartNode, redis: Redis
) -> None:
    node = await start(mint_per_ip=0, mint_overall=0)
    assert [(await node.ask()).status for _ in range(30)] == [200] * 30
    assert await redis.keys("*:mint:*") == []


async def test_installs_when_two_nodes_race_then_exactly_the_limit_is_created(start: StartNode, redis: Redis) -> None:
    nodes = [await start(mint_per_ip=5), await start(mint_per_ip=5)]
    answers = await asyncio.gather(*(nodes[number % 2].ask() for number in range(40)))
    assert sorted(answer.status for answer in answers) == [200] * 5 + [429] * 35
    assert await rows(redis) == 5


async def test_install_when_its_first_requests_come_together_then_it_is_counted_once(
    start: StartNode, redis: Redis
) -> None:
    node, install_id = await start(mint_per_ip=1), str(uuid.uuid4())
    answers = await asyncio.gather(*(node.ask(install_id) for _ in range(20)))
    assert [answer.status for answer in answers] == [200] * 20
    assert await rows(redis) == 1


async def test_addresses_when_of_one_56_then_they_are_one_and_ipv4_ones_are_each_their_own(start: StartNode) -> None:
    node = await start(mint_per_ip=1)
    assert (await node.ask(forwarded="2001:db8:0:1::1")).status == 200
    assert (await node.ask(forwarded="2001:db8:0:ff:1:2:3:4")).status == 429
    assert (await node.ask(forwarded="2001:db8:0:100::1")).status == 200
    assert (await node.ask(forwarded="203.0.113.1")).status == 200
    assert (await node.ask(forwarded="203.0.113.2")).status == 200
    assert (await node.ask(forwarded="::ffff:203.0.113.2")).status == 429
    assert (await node.ask(forwarded="203.0.113.2:4711")).status == 429


async def test_networks_when_of_one_48_or_24_or_32_then_they_share_its_limit(start: StartNode) -> None:
    node = await start(mint_per_ip=1, mint_overall=0, per_ipv4_24=2, per_ipv6_48=2, per_ipv6_32=3)

    async def statuses(*addresses: str) -> list[int]:
        return [(await node.ask(forwarded=address)).status for address in addresses]

    assert await statuses("203.0.113.1", "203.0.113.2", "203.0.113.3", "203.0.114.1") == [200, 200, 429, 200]
    of_one_48 = [f"2001:db8:0:{number}00::1" for number in (1, 2, 3)]
    assert await statuses(*of_one_48) == [200, 200, 429]
    assert await statuses("2001:db8:1::1", "2001:db8:2::1", "2001:db9::1") == [200, 429, 200]


async def test_installs_when_two_48_flood_then_a_client_from_elsewhere_is_still_admitted(
    start: StartNode, redis: Redis
) -> None:
    node = await start(mint_per_ip=5, mint_overall=40, per_ipv6_48=30, per_ipv6_32=30)
    flood = [f"2001:db8:{site}:{block:x}00::1" for site in (1, 2) for block in range(16) for _ in range(5)]
    answers = await asyncio.gather(*(node.ask(forwarded=address) for address in flood))
    assert sorted({answer.status for answer in answers}) == [200, 429]
    assert await rows(redis) <= 20 + 2  # half of all, and what has come back meanwhile
    for address in ("2001:db9::1", "198.51.100.7", "192.0.3.1"):
        assert (await node.ask(forwarded=address)).status == 200


async def test_address_when_the_peer_is_not_trusted_then_its_headers_are_worth_nothing(start: StartNode) -> None:
    node = await start(mint_per_ip=1, trusted=["10.0.0.0/8"])
    assert (await node.ask(forwarded="203.0.113.1")).status == 200
    assert (await node.ask(forwarded="203.0.113.2")).status == 429


@pytest.mark.parametrize(
    ("lines", "address"),
    [
        ([], "127.0.0.1"),
        (["203.0.113.7"], "203.0.113.7"),
        (["198.51.100.1, 203.0.113.7"], "203.0.113.7"),
        (["198.51.100.1, 203.0.113.7, 10.1.2.3, 192.0.2.1"], "203.0.113.7"),
        (["198.51.100.1", "203.0.113.7", "10.0.0.1"], "203.0.113.7"),
        (["10.0.0.9, 10.0.0.8"], "10.0.0.9"),
        (["203.0.113.7, unknown"], "127.0.0.1"),
        (["203.0.113.7, , 10.0.0.1"], "10.0.0.1"),
        (["127.0.0.1\u00a0, 203.0.113.7:80"], "203.0.113.7"),
        (["[2001:db8::1]:443, fd00::1"], "2001:db8::1"),
        (["2001:DB8::1"], "2001:db8::1"),
        (["::ffff:203.0.113.7"], "203.0.113.7"),
        (["::ffff:10.0.0.1, ::ffff:10.0.0.2"], "10.0.0.1"),
        (["fe80::1%eth0"], "fe80::1%eth0"),
        (["1.2.3.4.5"], "127.0.0.1"),
        (["0x7f.1"], "127.0.0.1"),
        (["203.0.113.7," * 500 + "x"], "127.0.0.1"),
    ],
)
async def test_client_address_when_proxies_are_trusted_then_the_last_address_that_is_not_one_of_them(
    lines: list[str], address: str, closing: AsyncExitStack
) -> None:
    """In front of the peer, 127.0.0.1, which is trusted."""
    proxies = parse_networks("relay.trusted_proxies", PROXIES)

    async def tell(request: web.Request) -> web.Response:
        return web.Response(text=str(client_address(request, proxies)))

    app = web.Application()
    app.router.add_get("/", tell)
    runner = web.AppRunner(app)
    await runner.setup()
    closing.push_async_callback(runner.cleanup)
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    session = await closing.enter_async_context(aiohttp.ClientSession())
    headers = [("X-Forwarded-For", line) for line in lines]
    async with session.get(f"http://127.0.0.1:{runner.addresses[0][1]}/", headers=headers) as response:
        assert await response.text() == str(ip_address(address))


@pytest.mark.parametrize("text", ["", "10.0.0.0/33", "localhost", "10.0.0.1/8"])
def test_networks_when_one_is_not_valid_then_settings_error(text: str) -> None:
    with pytest.raises(SettingsError, match="trusted_proxies"):
        parse_networks("relay.trusted_proxies", ["127.0.0.1", text])


async def test_licence_when_fifty_installs_of_two_nodes_race_for_three_seats_then_exactly_three(
    start: StartNode, redis: Redis
) -> None:
    nodes = [await start(mint_per_ip=0), await start(mint_per_ip=0)]
    installs = [str(uuid.uuid4()) for _ in range(50)]
    answers = await asyncio.gather(*(nodes[number % 2].ask(installs[number], X_Seats="3") for number in range(50)))
    refused = [answer for answer in answers if answer.status != 200]
    assert len(refused) == 47
    assert {(answer.status, answer.code) for answer in refused} == {(403, "licence_seats_taken")}
    assert refused[0].headers["x-should-retry"] == "false"
    assert await rows(redis) == 3
    # And those three go on, on either node.
    lucky = [install for install, answer in zip(installs, answers, strict=True) if answer.status == 200]
    for node in nodes:
        assert [(await node.ask(install, X_Seats="3")).status for install in lucky] == [200] * 3


async def test_seat_when_its_install_is_refused_as_a_new_one_then_it_is_free_again(
    start: StartNode, redis: Redis
) -> None:
    node, known = await start(mint_per_ip=1), str(uuid.uuid4())
    assert (await node.ask(known, X_Seats="2")).status == 200
    assert [(await node.ask(X_Seats="2")).code for _ in range(5)] == ["install_mint_limited"] * 5
    assert [text_of(name) for name in await redis.hkeys(Keys().seats(SUBJECT))] == [known]
    assert (await node.ask(known, X_Seats="2")).status == 200


async def test_installs_when_they_flood_then_redis_holds_no_more_than_the_limits_let_through(
    start: StartNode, redis: Redis
) -> None:
    node = await start(mint_per_ip=2, mint_overall=3)
    await asyncio.gather(*(node.ask(X_Seats="9", forwarded=f"203.0.113.{number}") for number in range(200)))
    assert await rows(redis) == 3
    assert await redis.hlen(Keys().seats(SUBJECT)) == 3
    assert await redis.dbsize() == 3 + 1 + 3 + 1  # rows, the hash of seats, counts of three addresses and of all


async def test_seat_when_used_repeatedly_then_redis_is_not_called_each_time(start: StartNode, redis: Redis) -> None:
    node, install_id = await start(), str(uuid.uuid4())
    await node.ask(install_id, X_Seats="1")
    await redis.delete(Keys().seats(SUBJECT))
    assert (await node.ask(install_id, X_Seats="1")).status == 200
    assert not await redis.exists(Keys().seats(SUBJECT))
    assert (await node.ask(install_id, X_Seats="2")).status == 200  # another licence
    assert await redis.exists(Keys().seats(SUBJECT))


async def test_seats_when_refused_then_that_is_not_remembered(start: StartNode) -> None:
    node, first, second = await start(), str(uuid.uuid4()), str(uuid.uuid4())
    await node.ask(first, X_Seats="1")
    assert [(await node.ask(second, X_Seats="1")).status for _ in range(3)] == [403] * 3
    await Seats(node.limiter.session).free(SUBJECT, first)
    assert (await node.ask(second, X_Seats="1")).status == 200


@pytest.mark.parametrize("headers", [{}, {"X_Seats": "0"}, {"X_Seats": "1", "X_Expired": "1"}])
async def test_seat_when_none_is_needed_then_none_is_taken(
    start: StartNode, redis: Redis, headers: dict[str, str]
) -> None:
    node = await start()
    for _ in range(2):
        assert (await node.ask(**headers)).status == 200
    assert await redis.keys("*:seats:*") == []


async def test_redis_when_unavailable_then_503_for_seats_too(
    start: StartNode, own_server: Callable[..., Server]
) -> None:
    server = own_server()
    node = await start(server.url, timeout_ms=400)
    server.kill()
    for headers in ({}, {"X_Seats": "1"}):
        answer = await node.ask(**headers)
        assert (answer.status, answer.code) == (503, "limiter_unavailable")


@pytest.mark.slow
async def test_command_when_it_lists_and_frees_seats_then_they_are_those_in_redis(
    start: StartNode, redis: Redis, redis_url: str, tmp_path: Path
) -> None:
    node, first, second = await start(), str(uuid.uuid4()), str(uuid.uuid4())
    for install_id in (first, second):
        await node.ask(install_id, X_Seats="2")

    def command(*arguments: str) -> tuple[int, str, str]:
        words = ("licence", "seats", SUBJECT, "--redis", redis_url, *arguments)
        answer = limiter(*words, cwd=tmp_path, settings={"COLUMNS": "80"})
        return answer.returncode, answer.stdout, answer.stderr

    _, table, _ = await asyncio.to_thread(command)
    assert first in table
    assert second in table
    code, text, _ = await asyncio.to_thread(command, "--free", first.upper(), "--json")
    document = json.loads(text)
    assert (code, document["sub"]) == (0, SUBJECT)
    assert [seat["install_id"] for seat in document["seats"]] == [second]
    assert [text_of(name) for name in await redis.hkeys(Keys().seats(SUBJECT))] == [second]
    code, _, error = await asyncio.to_thread(command, "--free", first)
    assert code == 1
    assert error == f"limiter: {first} has no seat of {SUBJECT}\n"
