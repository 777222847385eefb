"""One request, one debit, one answer: by `Idempotency-Key`, over two nodes that share nothing but Redis."""

import asyncio
import io
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn

import aiohttp
import pytest
from aiohttp import web
from multidict import CIMultiDictProxy
from redis.asyncio import Redis

from limiter import CreditLimiter, Tiers, connect
from limiter.credits.keys import Keys
from limiter.errors import LimiterError, LimiterUnavailable
from limiter.relay.http.problems import REQUEST_ID, Problem, ProblemRaised, problem_from, problem_response
from limiter.relay.metering.answer_recorder import AnswerRecorder
from limiter.relay.metering.availability import RedisAvailability, RedisUnavailable
from limiter.relay.metering.background_retries import BackgroundRetries
from limiter.relay.metering.claims import Claimed, Claims, ClaimStatus
from limiter.relay.metering.idempotency import Idempotency
from limiter.relay.metering.refusals import refuse
from limiter.relay.metering.settlement import Settlements
from limiter.relay.telemetry.metrics import Metrics
from limiter.relay.telemetry.over_bounds import OverBounds
from tests.support.credits import text_of
from tests.support.redis_servers import Server
from tests.support.relay import ONE_SERVER
from tests.support.wait import eventually

pytestmark = [ONE_SERVER, pytest.mark.usefixtures("redis_url")]  # also where a test has a server of its own, or none
CHAT = "/v1/chat/completions"
TIERS = Tiers.from_mapping({"core": {"lifetime": 1000}})
KEPT = {
    "Content-Type": "text/event-stream",
    "X-Odd": "caf\udce9",
    "RateLimit": '"credits";r=1',
    "X-Credits-Backend": "gemini",
}
CHUNKS = [b": a comment\n\n", b'data: {"w": 1}\n\n', b"data: [DONE]\n\n"]
KEEP_BYTES = 4096


@dataclass
class Answer:
    status: int
    headers: CIMultiDictProxy[str]
    body: bytes

    @property
    def code(self) -> str:
        return str(json.loads(self.body)["error"]["code"])

    @property
    def replayed(self) -> bool:
        return self.headers.get("Idempotency-Replayed") == "true"


HOLD_MS = 600_000


@dataclass
class Backend:
    """The backend of all nodes: it counts, and waits on request."""

    calls: int = 0
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass
class Node:
    """One relay node in small, on its own port and its own connection to Redis."""

    backend: Backend
    limiter: CreditLimiter
    idempotency: Idempotency
    retries: BackgroundRetries
    settlements: Settlements
    session: aiohttp.ClientSession
    url: str = ""
    install_id: str = ""
    last: AnswerRecorder | None = None

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        install_id = request.headers["X-Install-Id"]
        known = None if "X-Upload" in request.headers else body

        attempt = await self.idempotency.begin(request, install_id, known)
        if attempt.replay is not None:
            return attempt.replay
        with attempt:
            recording = self.last = attempt.recorder
            try:
                decision = await self.limiter.reserve(
                    install_id, tier="core", has_hardware=False, hold_id=recording.hold_id
                )
            except (asyncio.CancelledError, LimiterUnavailable):
                self.settlements.undo(install_id, recording.hold_id)
                raise
            if not decision.allowed:
                refuse(decision, self.limiter.tiers["core"], {})
            hold = self.settlements.open(install_id, recording.hold_id, "core", attempt)

            def commit() -> None:
                hold.commit("gemini")
                recording.debited()

            with hold:
                return await self.forward(request, json.loads(body)["model"], recording, commit)

    async def forward(
        self, request: web.Request, model: str, recording: AnswerRecorder, commit: Callable[[], None]
    ) -> web.StreamResponse:
        """Call the backend, which behaves as the model's name says."""
        self.backend.calls += 1
        self.backend.arrived.set()
        if model.startswith("wait"):
            await self.backend.go_on.wait()
        if model == "fail":
            raise ProblemRaised(Problem(502, "backend_unavailable", "", "", retry_after_s=1))
        if model == "bad":
            return recording.whole(status=400, headers={}, body=b"{}")
        if "stream" not in model:
            commit()
            body = json.dumps({"call": self.backend.calls, "text": "x" * (2 * KEEP_BYTES if model == "big" else 1)})
            whole = recording.whole(status=201, headers={**KEPT, "Content-Type": "x/y"}, body=body.encode())
            if model == "cut" and self.backend.calls == 1:
                assert request.transport
                request.transport.abort()
            return whole
        commit()
        response = recording.stream(status=200, headers=KEPT)
        with suppress(ConnectionError):
            await response.prepare(request)
            for number, chunk in enumerate(CHUNKS):
                if model == "halt-stream" and number == 1:
                    await self.backend.go_on.wait()
                await response.write(chunk)
            if model == "big-stream":
                await response.write(b"x" * KEEP_BYTES)
            await response.write_eof()
        return response

    def post(
        self, model: str, key: str | None, *, path: str = CHAT, install_id: str = "", **headers: str
    ) -> "aiohttp.client._RequestContextManager":
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        named |= {"X-Install-Id": install_id or self.install_id} | ({"Idempotency-Key": key} if key else {})
        body = io.BytesIO(json.dumps({"model": model}).encode())
        return self.session.post(self.url + path, data=body, headers=named)

    async def ask(self, model: str = "plain", key: str | None = "k", **more: str) -> Answer:
        async with self.post(model, key, **more) as response:
            return Answer(response.status, response.headers, await response.read())

    async def spent(self) -> int:
        """Credits that were debited, once nothing is held."""

        async def nothing_held() -> bool:
            row = await self.limiter.row(self.install_id)
            return row is None or not row.holds

        await eventually(nothing_held, what="the settlement of every hold")
        row = await self.limiter.row(self.install_id)
        return row.lifetime_consumed if row else 0


@web.middleware
async def error_middleware(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    request[REQUEST_ID] = uuid.uuid4().hex
    try:
        return await handler(request)
    except ProblemRaised as raised:
        return problem_response(request, raised.problem, raised.headers)
    except LimiterError as error:
        return problem_response(request, problem_from(error))


async def add_request_id(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["X-Request-Id"] = request[REQUEST_ID]


@asynccontextmanager
async def node_on(
    redis_url: str,
    backend: Backend,
    *,
    install_id: str,
    tiers: Tiers = TIERS,
    hold_ms: int = HOLD_MS,
    timeout_ms: int = 5000,
    keep_s: int = 86_400,
    retry_window_s: int = 60,
) -> AsyncIterator[Node]:
    async with AsyncExitStack() as stack:
        redis = await connect(redis_url, timeout_ms=timeout_ms)
        stack.push_async_callback(redis.aclose)
        limiter = CreditLimiter(redis, tiers, hold_ms=hold_ms, timeout_ms=timeout_ms, deadline_ms=2 * timeout_ms)
        retries = BackgroundRetries(RedisAvailability(limiter), give_up_s=hold_ms / 1000)
        metrics = Metrics(tiers=TIERS, routes=[])
        settlements = Settlements(limiter, retries, metrics, OverBounds(metrics, enforces=True))
        stack.push_async_callback(retries.drain, 5)
        idempotency = Idempotency(
            Claims(limiter.session),
            retries,
            hold_ms=hold_ms,
            keep_s=keep_s,
            keep_bytes=KEEP_BYTES,
            retry_window_s=retry_window_s,
        )
        session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True))
        node = Node(backend, limiter, idempotency, retries, settlements, session, install_id=install_id)
        app = web.Application(client_max_size=8 << 20, middlewares=[error_middleware])
        app.router.add_post("/{path:.*}", node.handle)
        app.on_response_prepare.append(add_request_id)
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=5)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        stack.push_async_callback(session.close)
        node.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield node


@pytest.fixture
def backend() -> Backend:
    return Backend()


@pytest.fixture
async def nodes(redis: Redis, redis_url: str, backend: Backend) -> AsyncIterator[tuple[Node, Node]]:
    await redis.ping()
    install_id = str(uuid.uuid4())
    async with (
        node_on(redis_url, backend, install_id=install_id) as one,
        node_on(redis_url, backend, install_id=install_id) as other,
    ):
        yield one, other


Nodes = tuple[Node, Node]


async def claims_of(redis: Redis) -> list[str]:
    return [text_of(key) for word in ("claim", "retry") for key in await redis.keys(f"*:{word}:*")]


async def no_claim_left(redis: Redis) -> None:
    async def none() -> bool:
        return not await claims_of(redis)

    await eventually(none, what="the end of every claim")


@pytest.mark.parametrize("model", ["plain", "stream"])
async def test_key_when_repeated_on_another_node_then_the_same_answer_and_no_second_debit(
    nodes: Nodes, backend: Backend, model: str
) -> None:
    first = await nodes[0].ask(model)
    second = await nodes[1].ask(model)
    assert (first.replayed, second.replayed) == (False, True)
    assert (second.status, second.body) == (first.status, first.body)
    assert first.body == b"".join(CHUNKS) if model == "stream" else b"call" in first.body
    for name in (*KEPT, "X-Request-Id"):
        assert second.headers[name] == first.headers[name]
    assert backend.calls == 1
    assert await nodes[0].spent() == 1


async def test_key_when_quoted_then_it_is_the_bare_one(nodes: Nodes, backend: Backend) -> None:
    await nodes[0].ask(key="a b")
    assert (await nodes[0].ask(key='"a b"')).replayed
    await nodes[0].ask(key='"say \\"\\\\\\""')
    assert not (await nodes[0].ask(key="say")).replayed
    assert backend.calls == 3


@pytest.mark.parametrize("key", ['"', '"a', '"a"b', '"a";x=1', '"a\\b"', "x" * 256, '""', "é", "a\tb", "\u0660"])
async def test_key_when_it_is_not_valid_then_400_and_nothing_is_served(
    nodes: Nodes, backend: Backend, key: str
) -> None:
    answer = await nodes[0].ask(key=key)
    assert (answer.status, answer.code) == (400, "invalid_idempotency_key")
    assert backend.calls == 0


async def test_key_when_sent_twice_in_one_request_then_400(nodes: Nodes, backend: Backend) -> None:
    headers = [("X-Install-Id", nodes[0].install_id), ("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
    async with nodes[0].session.post(nodes[0].url + CHAT, data=b"{}", headers=headers) as response:
        assert response.status == 400
    assert backend.calls == 0


@pytest.mark.parametrize("key", ["x" * 255, "~", "a;b=1", 'a"b', "*"])
async def test_key_when_printable_then_it_is_one(nodes: Nodes, backend: Backend, key: str) -> None:
    await nodes[0].ask(key=key)
    assert (await nodes[0].ask(key=key)).replayed
    assert backend.calls == 1


async def test_key_when_used_for_another_request_then_422(nodes: Nodes, backend: Backend) -> None:
    await nodes[0].ask("plain")
    for answer in (await nodes[1].ask("stream"), await nodes[0].ask("plain", path="/v1/embeddings")):
        assert (answer.status, answer.code) == (422, "idempotency_key_reused")
        assert "Retry-After" not in answer.headers
    assert backend.calls == 1
    assert await nodes[0].spent() == 1


async def test_key_when_its_attempt_failed_and_the_claim_is_about_to_be_dropped_then_another_request_is_served(
    nodes: Nodes, backend: Backend
) -> None:
    """The drop runs behind the answer: a client may be faster than it, also on another node."""
    found = asyncio.Event()

    class Held(Claims):
        async def drop(self, claim_key: str, owner: str) -> ClaimStatus:
            await found.wait()
            return await super().drop(claim_key, owner)

    class Noted(Claims):
        async def claim(self, *args: Any, **more: Any) -> Claimed:
            claimed = await super().claim(*args, **more)
            found.set()
            return claimed

    one, other = nodes
    one.idempotency = Idempotency(Held(one.limiter.session), one.retries, hold_ms=HOLD_MS)
    other.idempotency = Idempotency(Noted(other.limiter.session), other.retries, hold_ms=HOLD_MS)
    assert (await one.ask("fail")).status == 502
    assert (await other.ask("plain")).status == 201
    assert backend.calls == 2
    assert await one.spent() == 1


async def test_key_when_its_attempt_still_runs_then_another_request_is_422(nodes: Nodes, backend: Backend) -> None:
    asking = asyncio.ensure_future(nodes[0].ask("wait"))
    await backend.arrived.wait()
    assert (await nodes[1].ask("plain")).code == "idempotency_key_reused"
    backend.go_on.set()
    assert (await asking).status == 201
    assert backend.calls == 1


async def test_key_when_another_install_has_it_too_then_it_gets_nothing_of_the_first(
    nodes: Nodes, backend: Backend
) -> None:
    first = await nodes[0].ask()
    other = await nodes[0].ask(install_id=str(uuid.uuid4()))
    assert not other.replayed
    assert other.body != first.body
    assert backend.calls == 2


@pytest.mark.parametrize("model", ["wait", "halt-stream"])
async def test_key_when_it_is_being_served_then_409_and_the_answer_when_it_is_done(
    nodes: Nodes, backend: Backend, model: str
) -> None:
    first = asyncio.ensure_future(nodes[0].ask(model))
    await backend.arrived.wait()
    busy = await nodes[1].ask(model)
    assert (busy.status, busy.code) == (409, "idempotency_in_progress")
    assert busy.headers["Retry-After"] == "1"
    backend.go_on.set()
    served = await first
    repeat = await nodes[1].ask(model)
    assert repeat.replayed
    assert repeat.body == served.body
    assert backend.calls == 1
    assert await nodes[0].spent() == 1


async def test_key_when_refused_then_nothing_is_stored(redis: Redis, redis_url: str, backend: Backend) -> None:
    tiers = Tiers.from_mapping({"core": {"lifetime": 0}})
    async with node_on(redis_url, backend, install_id=str(uuid.uuid4()), tiers=tiers) as node:
        for _ in range(2):
            answer = await node.ask()
            assert (answer.status, answer.code) == (402, "out_of_credits")
            assert not answer.replayed
            await no_claim_left(redis)
    assert backend.calls == 0


@pytest.mark.parametrize(("model", "status"), [("fail", 502), ("bad", 400)])
async def test_key_when_the_backend_fails_then_it_is_free_again(
    nodes: Nodes, redis: Redis, backend: Backend, model: str, status: int
) -> None:
    for _ in range(3):
        answer = await nodes[0].ask(model)
        assert (answer.status, answer.replayed) == (status, False)
        await no_claim_left(redis)
    assert backend.calls == 3
    assert await nodes[0].spent() == 0


@pytest.mark.parametrize("model", ["big", "big-stream"])
async def test_answer_when_too_large_to_keep_then_its_repeat_is_409_and_not_debited(
    nodes: Nodes, backend: Backend, model: str
) -> None:
    first = await nodes[0].ask(model)
    assert len(first.body) > KEEP_BYTES
    assert nodes[0].last
    assert nodes[0].last._tee is None or nodes[0].last._tee.parts is None, (
        "the body takes memory although it will not be kept"
    )

    async def has_ended() -> bool:
        repeat = await nodes[1].ask(model)
        assert repeat.status == 409
        if repeat.code == "idempotency_in_progress":
            return False
        assert repeat.code == "idempotency_answer_not_kept"
        assert repeat.headers["x-should-retry"] == "false"
        assert "Retry-After" not in repeat.headers
        return True

    await eventually(has_ended)
    assert backend.calls == 1
    assert await nodes[0].spent() == 1


async def test_client_when_it_leaves_a_stream_then_its_repeat_is_409_and_not_debited(
    nodes: Nodes, backend: Backend
) -> None:
    async with nodes[0].post("halt-stream", "k") as response:
        assert await response.content.readany()

    async def has_ended() -> bool:
        repeat = await nodes[1].ask("halt-stream")
        assert repeat.status == 409
        return repeat.code == "idempotency_answer_not_kept"

    await eventually(has_ended)
    assert backend.calls == 1
    assert await nodes[0].spent() == 1


async def test_client_when_it_leaves_before_the_first_byte_then_its_key_is_free_again(
    nodes: Nodes, redis: Redis, backend: Backend
) -> None:
    leaving = asyncio.ensure_future(nodes[0].ask("wait"))
    await backend.arrived.wait()
    leaving.cancel()
    await no_claim_left(redis)
    assert await nodes[0].spent() == 0
    backend.go_on.set()
    assert (await nodes[1].ask("wait")).status == 201
    assert backend.calls == 2
    assert await nodes[0].spent() == 1


async def test_answer_when_its_client_never_got_it_then_the_repeat_brings_it(nodes: Nodes, backend: Backend) -> None:
    with pytest.raises(aiohttp.ClientError):
        await nodes[0].ask("cut")
    assert (await nodes[1].ask("cut")).replayed
    assert backend.calls == 1
    assert await nodes[0].spent() == 1


async def test_record_when_kept_then_it_lives_as_long_as_the_settings_say_and_a_claim_as_its_hold(
    redis: Redis, redis_url: str, backend: Backend
) -> None:
    async with node_on(redis_url, backend, install_id=str(uuid.uuid4()), keep_s=500, hold_ms=100_000) as node:
        first = asyncio.ensure_future(node.ask("wait"))
        await backend.arrived.wait()
        (key,) = await claims_of(redis)
        assert key == Keys().claim(node.install_id, "k")
        assert 100_000 < await redis.pttl(key) <= 160_000
        backend.go_on.set()
        await first

        async def kept() -> bool:
            return bool(await redis.hget(key, "answer"))

        await eventually(kept)
        assert 400 < await redis.ttl(key) <= 500
        assert first.result().body in (await redis.hget(key, "answer") or "")


async def test_node_when_it_dies_then_its_claim_expires_and_the_key_is_served(nodes: Nodes, backend: Backend) -> None:
    await nodes[0].ask()  # to learn the fingerprint
    await nodes[0].retries.drain(5)
    redis, key = nodes[0].limiter.session.redis, Keys().claim(nodes[0].install_id, "k")
    fingerprint = text_of(await redis.hget(key, "fingerprint") or "")
    await redis.delete(key)
    await Claims(nodes[1].limiter.session).claim(key, "of a node that died", fingerprint, claim_ms=600)
    assert (await nodes[0].ask()).code == "idempotency_in_progress"

    async def served() -> bool:
        return (await nodes[0].ask()).status == 201

    await eventually(served)
    assert backend.calls == 2


async def test_node_when_it_dies_inside_a_stream_then_its_claim_does_not_expire_with_the_hold(
    nodes: Nodes, redis: Redis
) -> None:
    """The debit stands from the first byte on, so the note of it must be in Redis before the stream's end."""
    async with nodes[0].post("halt-stream", "k") as response:
        assert await response.content.readany()
        (key,) = await claims_of(redis)

        async def noted() -> bool:
            return await redis.ttl(key) > 80_000

        await eventually(noted)
        assert await nodes[0].spent() == 1


async def test_upload_when_its_body_is_not_known_then_its_key_works_and_its_length_counts(
    nodes: Nodes, backend: Backend
) -> None:
    assert not (await nodes[0].ask("plain", X_Upload="1")).replayed
    assert (await nodes[1].ask("plain", X_Upload="1")).replayed
    assert (await nodes[1].ask("longer", X_Upload="1")).code == "idempotency_key_reused"
    assert backend.calls == 1


async def test_body_when_big_then_its_last_byte_counts(nodes: Nodes, backend: Backend) -> None:
    model = "x" * (2 << 20)
    await nodes[0].ask(model + "a")
    assert (await nodes[0].ask(model + "a")).replayed
    assert (await nodes[0].ask(model + "b")).status == 422
    assert backend.calls == 1


async def test_redis_when_unavailable_then_503_and_the_key_is_served_after_the_recovery(
    own_server: Callable[..., Server], backend: Backend
) -> None:
    server = own_server()
    async with node_on(server.url, backend, install_id=str(uuid.uuid4()), timeout_ms=400) as node:
        server.pause()  # what was sent to it is executed when it wakes up: the claim, too
        answer = await node.ask()
        assert (answer.status, answer.code) == (503, "limiter_unavailable")
        assert "Retry-After" in answer.headers
        assert backend.calls == 0
        server.resume()

        async def served() -> bool:
            return (await node.ask()).status == 201

        await eventually(served)
        assert backend.calls == 1
        assert await node.spent() == 1


async def test_redis_when_known_to_be_unavailable_then_503_at_once_and_nothing_is_sent(
    nodes: Nodes, redis: Redis, backend: Backend
) -> None:
    async def refuse_call(_operation: Callable[[], Awaitable[object]], /) -> NoReturn:
        raise RedisUnavailable

    node = nodes[0]
    unavailable = Claims(node.limiter.session.guarded(refuse_call))
    idempotency = node.idempotency = Idempotency(unavailable, node.retries, hold_ms=HOLD_MS)
    answer = await node.ask()
    assert (answer.status, answer.code) == (503, "limiter_unavailable")
    assert await redis.keys("*") == []
    assert backend.calls == idempotency._undos == 0
