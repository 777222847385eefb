"""Passes a backend's answer to the client, as a stream or complete, and commits the hold that pays for it."""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import NamedTuple, Protocol

import orjson
from aiohttp import web
from multidict import CIMultiDict

from limiter.credits.models import Balance
from limiter.relay.handlers.held_line import HeldLine
from limiter.relay.http.connection import RelayConnection
from limiter.relay.http.problems import REQUEST_ID
from limiter.relay.http.ratelimit_headers import spendable
from limiter.relay.metering.answer_recorder import AnswerRecorder
from limiter.relay.metering.settlement import OpenHold
from limiter.relay.upstream.response import BackendFailed, BackendResponse

CREDITS_EVENT = "X-Credits-Event"


class Billing(Protocol):
    """The payment for one request, and the recorder of its answer."""

    @property
    def recorder(self) -> AnswerRecorder: ...  # noqa: D102  documented by the class
    def commit(self, upstream: BackendResponse) -> None: ...  # noqa: D102
    def left(self) -> None: ...  # noqa: D102
    def failed(self) -> None: ...  # noqa: D102
    def summary(self, upstream: BackendResponse) -> Mapping[str, object]: ...  # noqa: D102  charge and balance, for X-Credits-Event


class Metered(NamedTuple):
    """A request that is paid for by its hold. balance: the install's when the request was reserved."""

    hold: OpenHold
    cost: int
    balance: Balance
    recorder: AnswerRecorder

    def commit(self, upstream: BackendResponse) -> None:
        """Debit the request, so that no repeat of it is debited again."""
        self.hold.commit(upstream.backend, streams=upstream.streams)
        self.recorder.debited()

    def left(self) -> None:
        """Note that the client left; a request that was debited stays so."""
        self.hold.leave()

    def failed(self) -> None:
        """Note that the backend failed; a request that was debited stays so."""
        self.hold.release("failed")

    def summary(self, upstream: BackendResponse) -> Mapping[str, object]:
        """Return the cost, and the credits that no live hold covers; None where there is no limit.

        A stream that delivered nothing costs nothing.
        """
        left, gemini_left = spendable(self.balance)
        released = 0 if upstream.delivered else self.cost
        return {
            "charged": self.cost - released,
            "backend": upstream.backend,
            "remaining": None if left is None else left + released,
            "gemini_remaining": None if gemini_left is None else gemini_left + released,
        }


class Unmetered(NamedTuple):
    """A request that is served without payment while Redis is unavailable."""

    recorder: AnswerRecorder

    def commit(self, upstream: BackendResponse) -> None:
        """Debit nothing."""

    def left(self) -> None:
        """Debit nothing."""

    def failed(self) -> None:
        """Debit nothing."""

    def summary(self, upstream: BackendResponse) -> Mapping[str, object]:
        """Return a charge of 0; the balance is not known."""
        return {"charged": 0, "backend": upstream.backend, "unmetered": True}


async def pass_answer(
    request: web.Request, upstream: BackendResponse, headers: CIMultiDict[str], billing: Billing
) -> web.StreamResponse:
    """Pass an answer on, and debit it once something is delivered. It has begun well, or it is a refusal."""
    if upstream.streams:
        return await _pass_stream(request, upstream, headers, billing)
    return await _pass_body(request, upstream, headers, billing)


async def _pass_stream(
    request: web.Request, upstream: BackendResponse, headers: CIMultiDict[str], billing: Billing
) -> web.StreamResponse:
    """Pass a stream on as it arrives. It is debited when it carries something, which may be after it has begun."""
    headers["X-Accel-Buffering"] = "no"  # a proxy in front would keep events back
    response = billing.recorder.stream(status=upstream.status, headers=headers)
    lines = HeldLine() if upstream.is_sse else None
    if upstream.delivered:
        billing.commit(upstream)
    try:
        await response.prepare(request)
        try:
            await response.write(lines.feed(upstream.begun) if lines else upstream.begun)
            await _splice(request, upstream, lines, billing)
        except BackendFailed as failure:
            billing.failed()
            if lines is None:
                billing.recorder.discard()
                return broken_off(request, response)  # whatever is said among such bytes would be taken for damage
            error = orjson.dumps(failure.problem.as_dict(request[REQUEST_ID]))
            await response.write(lines.break_off() + b"data: " + error + b"\n\n")
        if upstream.has_failed:
            billing.recorder.discard()  # half an answer is not the answer to a repeat
        if lines is not None and (end := _end(request, upstream, lines, billing)):
            await response.write(end)
        await response.write_eof()
    except ConnectionError:
        billing.left()  # and leaving the caller's block stops the backend
    return response


async def _splice(request: web.Request, upstream: BackendResponse, lines: HeldLine | None, billing: Billing) -> None:
    """Pass the rest of a stream from the backend's callback to the client's transport, past aiohttp's writer.

    The head has left by now, and what was written with it; the framing of chunks and the count of bytes are kept here.
    """
    connection, transport, writer, recorder = request.protocol, request.transport, request.writer, billing.recorder
    if transport is None or not isinstance(connection, RelayConnection):
        raise ConnectionResetError("the client has left")
    is_chunked = getattr(writer, "chunked", False)  # as aiohttp decided: not for HTTP/1.0
    is_debited = upstream.delivered

    def sink(data: bytes) -> None:
        nonlocal is_debited
        if not is_debited and upstream.delivered:
            is_debited = True
            billing.commit(upstream)
        out = lines.feed(data) if lines is not None else data
        if out and not transport.is_closing():
            recorder.passed(out)
            writer.output_size += len(out)
            transport.write(b"%x\r\n%b\r\n" % (len(out), out) if is_chunked else out)

    with connection.fed_by(upstream):
        await upstream.pipe(sink)


def _end(request: web.Request, upstream: BackendResponse, lines: HeldLine, billing: Billing) -> bytes:
    """Return the last bytes of a stream: what is held back of it, and what it cost, if the client asked for that."""
    rest = lines.rest()
    if request.headers.get(CREDITS_EVENT) != "1":
        return rest
    return rest + lines.comment(b"credits " + orjson.dumps(billing.summary(upstream)))


async def _pass_body(
    request: web.Request, upstream: BackendResponse, headers: CIMultiDict[str], billing: Billing
) -> web.StreamResponse:
    """Pass an answer that is no stream: whole if it is small, else as it comes.

    Either way it counts when it is complete. A client that leaves a big one before its end pays for it all the same,
    or all but its last byte would be free.
    """
    if upstream.complete:
        if upstream.succeeded:
            billing.commit(upstream)
        return billing.recorder.whole(status=upstream.status, headers=headers, body=upstream.begun)
    response = billing.recorder.stream(status=upstream.status, headers=headers)
    try:
        with suppress(ConnectionError):
            await response.prepare(request)
            await response.write(upstream.begun)
            while chunk := await upstream.read():
                await response.write(chunk)
            await response.write_eof()
    except BackendFailed:
        return broken_off(request, response)
    except asyncio.CancelledError:
        billing.commit(upstream)
        raise
    billing.commit(upstream)
    return response


def broken_off(request: web.Request, response: web.StreamResponse) -> web.StreamResponse:
    """Break the connection off: the one way to say that half an answer is not the answer."""
    if request.transport is not None:
        request.transport.abort()
    return response
