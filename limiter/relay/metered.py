"""The order of a metered request: identify, read, reserve, forward, then commit or release. Nothing else does.

Commit: a complete 2xx body, or the first body byte of a 2xx stream. Release: the backend refused, failed or timed out
before that, or the client left before that. After the first byte of a stream the debit stands.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass

import orjson
from aiohttp import hdrs, web
from aiohttp.http_exceptions import HttpProcessingError
from multidict import CIMultiDict

from limiter.credit_limiter import CreditLimiter
from limiter.errors import LimiterUnavailable
from limiter.licence import Licences
from limiter.model import Backend, Decision
from limiter.relay.answers import REQUEST_ID, ProblemRaised, fail, ratelimit_headers, refuse
from limiter.relay.backends import BackendClient, BackendFailed, Upstream
from limiter.relay.identity import Identity, identify
from limiter.relay.settlement import OpenHold, Settlements

_LOG = logging.getLogger("limiter.relay")
_UPLOAD_S = 300  # a body that dribbles in, or stops for good, ends too
_WHOLE_BODY = 1 << 20  # an answer up to this size is read whole, so that a broken one can still become an error


@dataclass(frozen=True, slots=True)
class Relay:
    """What a metered request needs. `backends` holds those that are set, or the echo as both."""

    limiter: CreditLimiter
    licences: Licences
    backends: Mapping[Backend, BackendClient]
    settlements: Settlements
    costs: Mapping[str, int]

    @property
    def has_hardware(self) -> bool:
        """Whether requests can be served without Gemini."""
        return "hardware" in self.backends

    def identify(self, request: web.Request) -> Identity:
        """Tell who asks. Raises ProblemRaised."""
        return identify(request, self.licences, self.limiter.tiers)


RELAY = web.AppKey("relay", Relay)


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to be forwarded: the path below /v1/, the client's headers, and a JSON body with its bytes."""

    path: str
    headers: Mapping[str, str]
    body: bytes
    document: Mapping[str, object]

    def body_for(self, client: BackendClient) -> bytes:
        """Give the body with the backend's own name of the model; its own bytes where the name is the same."""
        name = str(self.document["model"])
        model = client.model(name)
        if model == name:
            return self.body
        try:
            return orjson.dumps({**self.document, "model": model})
        except orjson.JSONEncodeError:  # orjson reads 1024 levels, and writes 254
            fail(400, "invalid_json", "Invalid JSON", "The body is nested too deeply.")


async def serve_metered(request: web.Request) -> web.StreamResponse:
    """Serve one request for credits."""
    relay = request.app[RELAY]
    identity = relay.identify(request)
    asked = await _read_json(request)
    decision = await _reserve(relay, request, identity)
    hold = relay.settlements.open(identity.install_id, decision.hold_id)
    try:
        async with AsyncExitStack() as stack:
            upstream = await _forward(relay, asked, decision, stack)
            headers = _answer_headers(upstream, identity, decision)
            if upstream.succeeded and upstream.streams:
                hold.commit(upstream.backend)
                return await _pass_stream(request, upstream, headers)
            return await _pass_body(request, upstream, headers, hold)
    except BackendFailed as failure:
        raise ProblemRaised(failure.problem, identity.headers()) from failure
    finally:
        hold.release()


async def _read_json(request: web.Request) -> Asked:
    if request.content_type != "application/json":
        fail(415, "unsupported_media_type", "Unsupported media type", "Send the body as application/json.")
    try:
        async with asyncio.timeout(_UPLOAD_S):
            body = await request.read()
    except TimeoutError:
        fail(408, "request_timeout", "Request timeout", f"The body did not come within {_UPLOAD_S} s.")
    except (web.RequestPayloadError, HttpProcessingError):
        fail(400, "invalid_body", "Invalid body", "The body cannot be read: its encoding is damaged.")
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        fail(400, "invalid_json", "Invalid JSON", f"The body is not JSON: {error}.")
    if not isinstance(document, dict):
        fail(400, "invalid_json", "Invalid JSON", "The body must be a JSON object.")
    if not isinstance(document.get("model"), str):
        fail(400, "missing_model", "Missing model", "The body must name a model.", param="model")
    return Asked(request.path.removeprefix("/v1/"), request.headers, body, document)


async def _reserve(relay: Relay, request: web.Request, identity: Identity) -> Decision:
    reserving = asyncio.ensure_future(
        relay.limiter.reserve(
            identity.install_id,
            tier=identity.tier,
            has_hardware=relay.has_hardware,
            cost=relay.costs.get(request.path, relay.costs["default"]),
            hold_id=request[REQUEST_ID],
        )
    )
    try:
        decision = await asyncio.shield(reserving)
    except (asyncio.CancelledError, LimiterUnavailable):
        # The client left while Redis was deciding, or its answer was lost: whatever it decided is given back.
        relay.settlements.undo(identity.install_id, request[REQUEST_ID], reserving)
        raise
    if not decision.allowed:
        refuse(decision, identity.headers())
    return decision


async def _forward(relay: Relay, asked: Asked, decision: Decision, stack: AsyncExitStack) -> Upstream:
    """Send to the planned backend; a Gemini that fails before its first byte falls back to hardware."""
    # Where Gemini is not set at all, what is planned for it is served, and debited, by hardware.
    planned: Backend = "gemini" if decision.backend == "gemini" and "gemini" in relay.backends else "hardware"
    try:
        return await _send(relay.backends[planned], asked, stack)
    except BackendFailed as failure:
        if planned == "hardware" or not relay.has_hardware or not failure.passing:
            raise
        _LOG.warning("%s: %s Falling back to hardware.", decision.hold_id, failure)
    return await _send(relay.backends["hardware"], asked, stack)


async def _send(client: BackendClient, asked: Asked, stack: AsyncExitStack) -> Upstream:
    return await stack.enter_async_context(client.send(asked.path, asked.headers, asked.body_for(client)))


def _answer_headers(upstream: Upstream, identity: Identity, decision: Decision) -> CIMultiDict[str]:
    headers = CIMultiDict(upstream.headers)
    headers.update(ratelimit_headers(decision.balance))
    headers.update(identity.headers())
    headers["X-Credits-Backend"] = upstream.backend
    return headers


async def _pass_stream(request: web.Request, upstream: Upstream, headers: CIMultiDict[str]) -> web.StreamResponse:
    response = web.StreamResponse(status=upstream.status, headers=headers)
    with suppress(ConnectionError):  # the client left: leaving the caller's block stops the backend
        await response.prepare(request)
        await response.write(upstream.first)
        try:
            async for chunk in upstream.rest:
                await response.write(chunk)
        except BackendFailed as failure:
            if hdrs.CONTENT_ENCODING in headers:
                return _broken(request, response)  # plain text among packed bytes would be taken for damage
            error = orjson.dumps(failure.problem.as_dict(request[REQUEST_ID]))
            await response.write(b"\n\ndata: " + error + b"\n\n")
        await response.write_eof()
    return response


async def _pass_body(
    request: web.Request, upstream: Upstream, headers: CIMultiDict[str], hold: OpenHold
) -> web.StreamResponse:
    """Pass an answer that is no stream: whole if it is small, else as it comes.

    Either way it counts when it is complete. A client that leaves a big one before its end pays for it all the same,
    or all but its last byte would be free.
    """
    read, complete = await _read_up_to(upstream, _WHOLE_BODY)
    if complete:
        if upstream.succeeded:
            hold.commit(upstream.backend)
        return web.Response(status=upstream.status, headers=headers, body=read)
    response = web.StreamResponse(status=upstream.status, headers=headers)
    try:
        with suppress(ConnectionError):
            await response.prepare(request)
            await response.write(read)
            async for chunk in upstream.rest:
                await response.write(chunk)
            await response.write_eof()
    except BackendFailed:
        hold.release()
        return _broken(request, response)
    finally:
        hold.commit(upstream.backend)
    return response


def _broken(request: web.Request, response: web.StreamResponse) -> web.StreamResponse:
    """Break the connection off: the one way to say that half an answer is not the answer."""
    if request.transport is not None:
        request.transport.abort()
    return response


async def _read_up_to(upstream: Upstream, limit: int) -> tuple[bytes, bool]:
    parts, size = [upstream.first], len(upstream.first)
    rest: AsyncIterator[bytes] = upstream.rest
    while size <= limit:
        chunk = await anext(rest, b"")
        if not chunk:
            return b"".join(parts), True
        parts.append(chunk)
        size += len(chunk)
    return b"".join(parts), False


async def show_credits(request: web.Request) -> web.Response:
    """Tell the caller's own balance."""
    relay = request.app[RELAY]
    identity = relay.identify(request)
    balance = await relay.limiter.balance(identity.install_id, tier=identity.tier)
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
