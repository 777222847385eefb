"""The order of a metered request: identify, read, reserve, forward, then commit or release. Nothing else does.

Commit: a complete 2xx body, or the first body byte of a 2xx stream. Release: the backend refused, failed or timed out
before that, or the client left before that. After the first byte of a stream the debit stands. While Redis is away a
request is refused, or served from hardware without any of it.
"""

import asyncio
import logging
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

import orjson
from aiohttp import hdrs, web
from multidict import CIMultiDict

from limiter.credits.limiter import CreditLimiter
from limiter.credits.models import Backend, Decision
from limiter.errors import LimiterUnavailable
from limiter.licences.tokens import Licences
from limiter.relay.handlers.forwarding import Metered, Unmetered, pass_answer
from limiter.relay.http.problems import REQUEST_ID, ProblemRaised, ratelimit_headers, refuse
from limiter.relay.http.request_record import RequestRecord, request_record
from limiter.relay.metering.admission import Admission
from limiter.relay.metering.answer_recorder import AnswerRecorder
from limiter.relay.metering.availability import RedisAvailability
from limiter.relay.metering.idempotency import Idempotency
from limiter.relay.metering.settlement import Settlements
from limiter.relay.requests.identity import Identity, identify
from limiter.relay.requests.json_body import ForwardableRequest, read_json
from limiter.relay.requests.memory_budget import MemoryBudget
from limiter.relay.requests.upload import Upload, UploadLimits
from limiter.relay.telemetry.metrics import UNAVAILABLE, UNMETERED
from limiter.relay.upstream.client import BackendClient
from limiter.relay.upstream.response import BackendFailed, BackendResponse

_LOG = logging.getLogger("limiter.relay")


@dataclass(frozen=True, slots=True)
class Relay:
    """What a metered request needs. `backends` holds those that are set, or the echo as both."""

    limiter: CreditLimiter
    licences: Licences
    backends: Mapping[Backend, BackendClient]
    settlements: Settlements
    costs: Mapping[str, int]
    uploads: UploadLimits
    bodies: MemoryBudget
    admission: Admission
    idempotency: Idempotency
    mode: RedisAvailability

    @property
    def has_hardware(self) -> bool:
        """Whether requests can be served without Gemini."""
        return "hardware" in self.backends

    def identify(self, request: web.Request) -> Identity:
        """Tell who asks. Raises ProblemRaised."""
        identity = identify(request, self.licences, self.limiter.tiers)
        record = request_record(request)
        record.install_id, record.tier = identity.install_id, identity.tier
        return identity

    def cost(self, request: web.Request) -> int:
        """Tell what a request costs, in credits."""
        return self.costs.get(request.path, self.costs["default"])


RELAY = web.AppKey("relay", Relay)


class _Call(NamedTuple):
    """One request for credits: whose it is, and what it asks for."""

    relay: Relay
    request: web.Request
    identity: Identity
    asked: ForwardableRequest


async def serve_metered(request: web.Request) -> web.StreamResponse:
    """Serve one request with a JSON body for credits."""
    relay = request.app[RELAY]
    identity = relay.identify(request)
    with relay.bodies.counting() as reservation:
        asked = await read_json(request, reservation, within_s=relay.uploads.total_s)
        request_record(request).model = asked.model
        return await _answer(_Call(relay, request, identity, asked), asked.body)


async def serve_upload(request: web.Request) -> web.StreamResponse:
    """Serve one request with a multipart body for credits, which are reserved before the body is read."""
    relay = request.app[RELAY]
    identity = relay.identify(request)
    record = request_record(request)

    def note(model: str) -> None:
        record.model = model

    with relay.bodies.counting() as reservation, closing(Upload(request, relay.uploads, reservation, note)) as upload:
        return await _answer(_Call(relay, request, identity, upload), None)


async def _answer(call: _Call, body: bytes | None) -> web.StreamResponse:
    """Serve for credits, or while Redis is away unmetered, where the operator wants that. body: None for an upload."""
    mode = call.relay.mode
    try:
        if not mode.serves_unmetered:
            try:
                mode.check()
                return await _serve_once(call, body)
            except LimiterUnavailable:  # nothing was forwarded, and what may be held is being given back
                if not await mode.serves_this_unmetered():
                    request_record(call.request).status = UNAVAILABLE
                    await _remember_missed(call, body)
                    raise
        await _remember_missed(call, body)
        return await _serve_unmetered(call)
    except BackendFailed as failure:
        _warn(call.request[REQUEST_ID], failure)
        raise ProblemRaised(failure.problem, call.identity.headers()) from failure


async def _remember_missed(call: _Call, body: bytes | None) -> None:
    await call.relay.idempotency.missed(call.request, call.identity.install_id, body)


async def _serve_once(call: _Call, body: bytes | None) -> web.StreamResponse:
    relay, identity = call.relay, call.identity
    await relay.admission.seat(identity.install_id, identity.licence)

    async def serve(recorder: AnswerRecorder) -> web.StreamResponse:
        return await _serve(call, recorder, await _reserve(call, recorder.hold_id))

    return await relay.idempotency.once(call.request, identity.install_id, body, serve)


async def _reserve(call: _Call, hold_id: str) -> Decision:
    relay, identity = call.relay, call.identity
    record = request_record(call.request)
    cost = record.cost = relay.cost(call.request)

    async def reserve(may_create: bool) -> Decision:
        return await relay.mode.decide(
            lambda: relay.limiter.reserve(
                identity.install_id,
                tier=identity.tier,
                has_hardware=relay.has_hardware,
                cost=cost,
                hold_id=hold_id,
                may_create=may_create,
            )
        )

    try:
        decision = await relay.admission.reserve(call.request, identity.install_id, identity.licence, reserve)
    except (asyncio.CancelledError, LimiterUnavailable) as error:
        # The client left while Redis was deciding, or its answer was lost: whatever it decided is given back.
        if not isinstance(error, LimiterUnavailable) or error.executed is not False:
            relay.settlements.undo(identity.install_id, hold_id)
        raise
    record.status, record.reason, record.from_memory = decision.status, decision.reason, decision.from_memory
    if not decision.allowed:
        refuse(decision, identity.headers())
    return decision


async def _serve(call: _Call, recorder: AnswerRecorder, decision: Decision) -> web.StreamResponse:
    """Forward a request that was allowed, pass its answer on, and settle its hold."""
    relay, request, identity = call.relay, call.request, call.identity
    hold = relay.settlements.open(identity.install_id, decision.hold_id)
    try:
        with await _forward(relay, call.asked, decision, request_record(request)) as upstream:
            headers = _answer_headers(upstream, identity, ratelimit_headers(decision.balance))
            served = Metered(hold, relay.cost(request), decision.balance, recorder)
            return await pass_answer(request, upstream, headers, served)
    finally:
        hold.release()


async def _serve_unmetered(call: _Call) -> web.StreamResponse:
    """Serve from hardware, and from nothing else, what can be asked of no Redis: no credits, no seat, no key."""
    relay, request, identity = call.relay, call.request, call.identity
    record = request_record(request)
    record.status, record.cost, record.backend = UNMETERED, None, "hardware"
    with await _send(relay.backends["hardware"], call.asked) as upstream:
        headers = _answer_headers(upstream, identity, {"X-Credits-Unmetered": "true"})
        return await pass_answer(request, upstream, headers, Unmetered(AnswerRecorder(request[REQUEST_ID])))


async def _forward(
    relay: Relay, asked: ForwardableRequest, decision: Decision, record: RequestRecord
) -> BackendResponse:
    """Send to the planned backend; a Gemini that fails before its first byte falls back to hardware."""
    # Where Gemini is not set at all, what is planned for it is served, and debited, by hardware.
    planned: Backend = "gemini" if decision.backend == "gemini" and "gemini" in relay.backends else "hardware"
    record.backend = planned
    try:
        return await _send(relay.backends[planned], asked)
    except BackendFailed as failure:
        if planned == "hardware" or not relay.has_hardware or not asked.replayable:
            raise
        _warn(decision.hold_id, failure, " Falling back to hardware.")
    record.backend, record.fell_back = "hardware", True
    return await _send(relay.backends["hardware"], asked)


def _warn(request_id: str, failure: BackendFailed, then: str = "") -> None:
    if failure.outcome != "breaker_open":  # which was logged when it opened
        _LOG.warning("%s%s", failure, then, extra={"request_id": request_id})


async def _send(client: BackendClient, asked: ForwardableRequest) -> BackendResponse:
    return await client.send(asked.path, asked.headers, asked.body_for(client))


def _answer_headers(upstream: BackendResponse, identity: Identity, metering: Mapping[str, str]) -> CIMultiDict[str]:
    """Add ours to the headers of the backend's answer."""
    headers = upstream.headers
    headers.update(metering)
    headers.update(identity.headers())
    headers["X-Credits-Backend"] = upstream.backend
    return headers


async def show_credits(request: web.Request) -> web.Response:
    """Tell the caller's own balance."""
    relay = request.app[RELAY]
    identity = relay.identify(request)
    balance = await relay.mode.call(lambda: relay.limiter.balance(identity.install_id, tier=identity.tier))
    document = {
        "object": "credits",
        "install_id": identity.install_id,
        "tier": balance.tier,
        "capped": balance.capped,
        "quota": balance.quota,
        "remaining": balance.remaining,
        "gemini_cap": balance.gemini_cap,
        "gemini_remaining": balance.gemini_remaining,
        "held": balance.held,
        "renews_at": balance.renews_at,
    }
    headers = {**ratelimit_headers(balance), **identity.headers(), hdrs.CACHE_CONTROL: "no-store"}
    return web.Response(body=orjson.dumps(document), content_type="application/json", headers=headers)
