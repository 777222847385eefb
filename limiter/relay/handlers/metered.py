"""The life of a metered request: identify, admit, idempotency, reserve, forward, settle, record.

A hold is committed at a complete 2xx body that is no error, or at the first event of a 2xx stream that carries
something. It is released if, before that, the backend refuses, fails or times out, or the client leaves; but of those
that a client leaves while a backend works for them, only so many are free. After it the debit stands. While Redis is
unavailable, a request is refused, or served from hardware without any of these steps.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import closing, suppress
from typing import NamedTuple

from aiohttp import web
from multidict import CIMultiDict

from limiter._util.fair_share import Holders
from limiter._util.ids import random_id
from limiter.credits.models import Backend, Decision, Reason
from limiter.errors import Execution, LimiterUnavailable, OutOfMemory
from limiter.log_events import event
from limiter.relay.handlers.context import RELAY, Relay
from limiter.relay.handlers.forwarding import Metered, Unmetered, pass_answer
from limiter.relay.http.problems import REQUEST_ID, ProblemRaised
from limiter.relay.http.ratelimit_headers import ratelimit_headers
from limiter.relay.http.request_record import request_record
from limiter.relay.metering.admission import CreditRequest
from limiter.relay.metering.answer_recorder import AnswerRecorder
from limiter.relay.metering.refusals import refuse
from limiter.relay.metering.settlement import OpenHold
from limiter.relay.requests.identity import Identity
from limiter.relay.requests.json_body import ForwardableRequest, read_json
from limiter.relay.requests.memory_budget import SMALL_B, Reservation
from limiter.relay.requests.upload import Upload
from limiter.relay.telemetry.metrics import OUT_OF_MEMORY, UNAVAILABLE, UNMETERED
from limiter.relay.upstream.client import BackendClient
from limiter.relay.upstream.response import BackendFailed, BackendResponse

_LOG = logging.getLogger("limiter.relay")
_NOT_FOUND = 404


class _Call(NamedTuple):
    """One metered request.

    Attributes:
        relay: that serves it.
        request: as it came.
        identity: its client's.
        forwardable: the request to forward.
        reservation: for the memory that it takes.
        holders: whose shares it takes.
        body: if that is in memory.
        backends: those that can serve it.
    """

    relay: Relay
    request: web.Request
    identity: Identity
    forwardable: ForwardableRequest
    reservation: Reservation
    holders: Holders
    body: bytes | None
    backends: Mapping[Backend, BackendClient]


async def serve_json(request: web.Request) -> web.StreamResponse:
    """Serve one metered request with a JSON body."""
    relay = request.app[RELAY]
    identity = relay.identify(request)
    holders = relay.holders(request, identity)
    with relay.places.take(holders), relay.memory.reservation(holders) as reservation:
        json = await read_json(
            request, reservation, relay.uploads.pace, before_large=lambda: _know(relay, request, identity)
        )
        request_record(request).model = json.model
        relay.bounds.check(request, identity.tier, json.members)
        backends = relay.served_by(request, json.model)
        call = _Call(relay, request, identity, json, reservation, holders, json.body, backends)
        return await _sent(request, await _serve(call))


async def _know(relay: Relay, request: web.Request, identity: Identity) -> None:
    """Look an install up before the rest of a large body is read, and create it if it is new and may be created.

    Credits are reserved when all is there. While Redis is unavailable, nothing is known, and the request is refused or
    served unmetered after it was read.
    """
    if relay.availability.serves_unmetered:
        return
    with suppress(LimiterUnavailable):
        relay.availability.check()
        await relay.admission.seat(identity.install_id, identity.licence)
        if await relay.limiter.knows(identity.install_id):
            return
        decision = await _reserve(relay, request, identity, relay.served_by(request, None), random_id())
        relay.settlements.release(identity.install_id, decision.hold_id, "unsent")


async def serve_upload(request: web.Request) -> web.StreamResponse:
    """Serve one metered request with a multipart body; credits are reserved before the body is read."""
    relay = request.app[RELAY]
    identity = relay.identify(request)
    backends = relay.served_by(request, None)  # which model it names is not read yet
    record = request_record(request)

    def record_model(model: str) -> None:
        record.model = model
        relay.bounds.check_model(request, model)

    holders = relay.holders(request, identity)
    with (
        relay.places.take(holders),
        relay.memory.reservation(holders) as reservation,
        closing(
            Upload(request, relay.uploads, reservation, record_model, must_name_model=relay.bounds.every_model_counts)
        ) as upload,
    ):
        call = _Call(relay, request, identity, upload, reservation, holders, None, backends)
        return await _sent(request, await _serve(call))


async def _sent(request: web.Request, response: web.StreamResponse) -> web.StreamResponse:
    """Send a large answer while its memory is reserved: a client may leave it unread."""
    if _size(response) > SMALL_B:
        with suppress(ConnectionError):
            await response.prepare(request)
            await response.write_eof()
            await request.writer.drain()
        request_record(request).first_byte_s = None  # it was no stream
    return response


async def _serve(call: _Call) -> web.StreamResponse:
    """Serve a request for credits, or unmetered while Redis is unavailable, if the operator has enabled that."""
    availability = call.relay.availability
    try:
        try:
            if not availability.serves_unmetered or "hardware" not in call.backends:
                return await _serve_metered(call)
        except LimiterUnavailable as error:  # nothing was forwarded, and what may be held is being released
            is_full = isinstance(error, OutOfMemory)  # which clients can bring about: no reason to serve for nothing
            if is_full or "hardware" not in call.backends or not await availability.serves_this_unmetered():
                request_record(call.request).status = OUT_OF_MEMORY if is_full else UNAVAILABLE
                await _note_missed(call)
                raise
        await _note_missed(call)
        return await _serve_unmetered(call)
    except BackendFailed as failure:  # before the client has seen anything
        _warn(call.request[REQUEST_ID], failure)
        raise ProblemRaised(failure.problem, call.identity.headers()) from failure


async def _serve_metered(call: _Call) -> web.StreamResponse:
    """Serve an identified request for credits: the steps of its life."""
    relay, request, identity = call.relay, call.request, call.identity
    relay.availability.check()
    await relay.admission.seat(identity.install_id, identity.licence)
    attempt = await relay.idempotency.begin(request, identity.install_id, call.body)
    if attempt.replay is not None:
        call.reservation.add(_size(attempt.replay))
        return attempt.replay
    attempt.recorder.has_room = call.reservation.try_add
    with attempt:
        decision = await _reserve(relay, request, identity, call.backends, attempt.hold_id)
        with (
            relay.settlements.open(identity.install_id, decision.hold_id, identity.tier, attempt) as hold,
            await _forward(call, decision, hold) as answer,
        ):
            call.reservation.add(len(answer.begun))
            headers = _answer_headers(answer, identity, ratelimit_headers(decision.balance))
            billing = Metered(hold, relay.cost(request), decision.balance, attempt.recorder)
            return await pass_answer(request, answer, headers, billing)


async def _serve_unmetered(call: _Call) -> web.StreamResponse:
    """Serve a request from hardware only, without the steps that need Redis: credits, seat, idempotency."""
    request, identity = call.request, call.identity
    record = request_record(request)
    record.status, record.cost, record.backend = UNMETERED, None, "hardware"
    with await _send(call.backends["hardware"], call) as answer:
        call.reservation.add(len(answer.begun))
        headers = _answer_headers(answer, identity, {"X-Credits-Unmetered": "true"})
        return await pass_answer(request, answer, headers, Unmetered(AnswerRecorder(request[REQUEST_ID])))


async def _reserve(
    relay: Relay, request: web.Request, identity: Identity, backends: Collection[Backend], hold_id: str
) -> Decision:
    """Hold the credits of a request. Raises ProblemRaised if it is refused, and LimiterUnavailable."""
    record = request_record(request)
    record.cost = relay.cost(request)
    credit = CreditRequest(
        identity.install_id,
        identity.tier,
        has_hardware="hardware" in backends,
        has_gemini="gemini" in backends,
        cost=record.cost,
        hold_id=hold_id,
    )
    try:
        decision = await relay.admission.reserve(request, identity.licence, credit)
    except (asyncio.CancelledError, LimiterUnavailable) as error:
        # The client left while Redis was deciding, or the reply was lost: whatever was decided is undone.
        if not isinstance(error, LimiterUnavailable) or error.execution is Execution.UNKNOWN:
            relay.settlements.undo(identity.install_id, hold_id)
        raise
    record.status, record.reason, record.from_memory = decision.status, decision.reason, decision.from_memory
    if decision.rate_wait_ms and decision.reason in (None, Reason.RATE_LIMITED):
        relay.over_bounds.note("rate", hold_id)
    if not decision.allowed:
        refuse(decision, relay.tiers[identity.tier], identity.headers())
    return decision


async def _forward(call: _Call, decision: Decision, hold: OpenHold) -> BackendResponse:
    """Send a request to the planned backend; if Gemini fails before it delivers, fall back to hardware.

    So it does if Gemini has not got what is asked for, as its list of models is known to nobody here.
    """
    record = request_record(call.request)
    # A hold that is there already may have been planned by a relay with other backends.
    planned = next((name for name in call.backends if name == decision.backend), next(iter(call.backends)))
    record.backend = planned
    falls_back = planned == "gemini" and "hardware" in call.backends
    try:
        answer = await _send(call.backends[planned], call, hold.called)
    except BackendFailed as failure:
        if not falls_back or not call.forwardable.replayable:
            raise
        _warn(decision.hold_id, failure, " Falling back to hardware.")
    else:
        if answer.status != _NOT_FOUND or not falls_back or not call.forwardable.replayable:
            return answer
        answer.end(None)
    record.backend, record.fell_back = "hardware", True
    return await _send(call.backends["hardware"], call, hold.called)


def _send(
    client: BackendClient, call: _Call, sent: Callable[[Backend], None] | None = None
) -> Awaitable[BackendResponse]:
    request = call.forwardable
    return client.send(
        request.path,
        request.headers,
        request.body_for(client),
        stream=request.stream,
        install_id=call.identity.install_id,
        on_sent=sent,
        holders=call.holders,
    )


def _size(response: web.StreamResponse) -> int:
    """Return how much of an answer is held whole."""
    return len(response.body) if isinstance(response, web.Response) and isinstance(response.body, bytes) else 0


async def _note_missed(call: _Call) -> None:
    await call.relay.idempotency.missed(call.request, call.identity.install_id, call.body)


def _warn(request_id: str, failure: BackendFailed, then: str = "") -> None:
    if not failure.is_logged:
        _LOG.warning("%s%s", failure, then, extra=event("backend_failed", request_id=request_id))


def _answer_headers(answer: BackendResponse, identity: Identity, metering: Mapping[str, str]) -> CIMultiDict[str]:
    """Return the headers of the backend's answer and those of the relay."""
    headers = answer.headers
    headers.update(metering)
    headers.update(identity.headers())
    headers["X-Credits-Backend"] = answer.backend
    return headers
