"""Passes a backend's answer to the client, as a stream or complete, and commits the hold that pays for it."""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import NamedTuple, Protocol

import orjson
from aiohttp import hdrs, web
from multidict import CIMultiDict

from limiter.credits.models import Balance
from limiter.relay.http.problems import REQUEST_ID
from limiter.relay.http.ratelimit_headers import spendable
from limiter.relay.metering.answer_recorder import AnswerRecorder
from limiter.relay.metering.settlement import OpenHold
from limiter.relay.upstream.response import BackendFailed, BackendResponse

CREDITS_EVENT = "X-Credits-Event"
# An answer up to this size is read completely first, so that a broken one can still become an error.
_WHOLE_BODY = 1 << 20


class Billing(Protocol):
    """The payment for one request, and the recorder of its answer."""

    @property
    def recorder(self) -> AnswerRecorder: ...  # noqa: D102  documented by the class
    def commit(self, upstream: BackendResponse) -> None: ...  # noqa: D102
    def summary(self, upstream: BackendResponse) -> Mapping[str, object]: ...  # noqa: D102  charge and balance, for X-Credits-Event


class Metered(NamedTuple):
    """A request that is paid for by its hold. balance: the install's when the request was reserved."""

    hold: OpenHold
    cost: int
    balance: Balance
    recorder: AnswerRecorder

    def commit(self, upstream: BackendResponse) -> None:
        """Debit the request, so that no repeat of it is debited again."""
        self.hold.commit(upstream.backend)
        self.recorder.debited()

    def summary(self, upstream: BackendResponse) -> Mapping[str, object]:
        """Return the cost, and the credits that no live hold covers; None where there is no limit."""
        left, gemini_left = spendable(self.balance)
        return {
            "charged": self.cost,
            "backend": upstream.backend,
            "remaining": left,
            "gemini_remaining": gemini_left,
        }


class Unmetered(NamedTuple):
    """A request that is served without payment while Redis is unavailable."""

    recorder: AnswerRecorder

    def commit(self, upstream: BackendResponse) -> None:
        """Debit nothing."""

    def summary(self, upstream: BackendResponse) -> Mapping[str, object]:
        """Return a charge of 0; the balance is not known."""
        return {"charged": 0, "backend": upstream.backend, "unmetered": True}


async def pass_answer(
    request: web.Request, upstream: BackendResponse, headers: CIMultiDict[str], billing: Billing
) -> web.StreamResponse:
    """Pass an answer to the client. Raises BackendFailed as long as the client has seen none of it.

    Args:
        request: the client's.
        upstream: the backend's answer.
        headers: those of the response.
        billing: pays for the request, and records the answer.
    """
    if upstream.succeeded and upstream.streams:
        billing.commit(upstream)
        return await _pass_stream(request, upstream, headers, billing)
    return await _pass_body(request, upstream, headers, billing)


async def _pass_stream(
    request: web.Request, upstream: BackendResponse, headers: CIMultiDict[str], billing: Billing
) -> web.StreamResponse:
    response = billing.recorder.stream(status=upstream.status, headers=headers)
    packed = headers.get(hdrs.CONTENT_ENCODING, "identity").lower() != "identity"
    last = upstream.first
    with suppress(ConnectionError):  # the client left: the caller's `with` block stops the backend
        await response.prepare(request)
        await response.write(upstream.first)
        try:
            while chunk := await upstream.read():
                await response.write(chunk)
                last = chunk
        except BackendFailed as failure:
            if packed:
                return abort(request, response)  # plain text within compressed bytes would be taken for damage
            error = orjson.dumps(failure.problem.as_dict(request[REQUEST_ID]))
            last = b"\n\ndata: " + error + b"\n\n"
            await response.write(last)
        if request.headers.get(CREDITS_EVENT) == "1" and not packed:
            await response.write((b"" if last.endswith((b"\n", b"\r")) else b"\n\n") + _comment(upstream, billing))
        await response.write_eof()
    return response


def _comment(upstream: BackendResponse, billing: Billing) -> bytes:
    """Return the comment line with the charge; by the specification of SSE, clients ignore comments."""
    return b": credits " + orjson.dumps(billing.summary(upstream)) + b"\n\n"


async def _pass_body(
    request: web.Request, upstream: BackendResponse, headers: CIMultiDict[str], billing: Billing
) -> web.StreamResponse:
    """Pass an answer that is not a stream: at once if it is small, else piece by piece.

    Either way it is debited when it is complete. A client that leaves before the end of a large one pays for it, too:
    otherwise all but its last byte would be free.
    """
    read, complete = await _read_up_to(upstream, _WHOLE_BODY)
    if complete:
        if upstream.succeeded:
            billing.commit(upstream)
        return billing.recorder.whole(status=upstream.status, headers=headers, body=read)
    response = billing.recorder.stream(status=upstream.status, headers=headers)
    try:
        with suppress(ConnectionError):
            await response.prepare(request)
            await response.write(read)
            while chunk := await upstream.read():
                await response.write(chunk)
            await response.write_eof()
    except BackendFailed:
        return abort(request, response)
    except asyncio.CancelledError:
        billing.commit(upstream)
        raise
    billing.commit(upstream)
    return response


def abort(request: web.Request, response: web.StreamResponse) -> web.StreamResponse:
    """Abort the connection: nothing else shows the client that its answer is incomplete."""
    if request.transport is not None:
        request.transport.abort()
    return response


async def _read_up_to(upstream: BackendResponse, limit: int) -> tuple[bytes, bool]:
    parts, size = [upstream.first], len(upstream.first)
    while size <= limit:
        chunk = await upstream.read()
        if not chunk:
            return b"".join(parts), True
        parts.append(chunk)
        size += len(chunk)
    return b"".join(parts), False
