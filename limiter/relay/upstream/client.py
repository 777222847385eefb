"""The two backends, as the relay sees them: a URL that speaks OpenAI's API, a key, timeouts and model names.

A backend's credentials stay in here, and so do a client's out there: headers pass by a list of names, both ways.
"""

import asyncio
import logging
import zlib
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import aiohttp
from aiohttp import hdrs
from multidict import CIMultiDict
from yarl import URL

from limiter.credits.models import Backend as BackendName
from limiter.errors import SettingsError
from limiter.log_events import event
from limiter.relay.http.problems import Problem, ProblemRaised, retry_seconds
from limiter.relay.upstream.circuit_breaker import Attempt, CircuitBreaker, CircuitOpen
from limiter.relay.upstream.response import (
    FAILURES,
    SUCCESS,
    BackendFailed,
    BackendResponse,
    Outcome,
    backend_problem,
    failed,
    next_piece,
)
from limiter.relay.upstream.transport import Answer, HttpTransport

_LOG = logging.getLogger("limiter.relay")
_REQUEST_HEADERS = (hdrs.ACCEPT, hdrs.ACCEPT_ENCODING, hdrs.CONTENT_TYPE, "OpenAI-Beta")
_TRACE_HEADERS = ("traceparent", "tracestate")  # for the operator's own server; a third party has no use for them
_RESPONSE_HEADERS = (
    hdrs.CACHE_CONTROL,
    hdrs.CONTENT_ENCODING,
    hdrs.CONTENT_TYPE,
    "OpenAI-Model",
    "OpenAI-Processing-Ms",
    "OpenAI-Version",
)
_OPERATORS_FAULT = frozenset({401, 402, 403, 407})
_PASSING = frozenset({408, 429})
_REDIRECT = range(300, 400)
_SERVER_ERROR = 500
_MAX_REFUSAL_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Streamed:
    """A body that comes bit by bit. length: in bytes, None when nobody knows.

    fault: why it ended before its end, when that is the client's doing; it is then no failure of the backend.
    """

    chunks: AsyncIterator[bytes]
    length: int | None
    fault: Callable[[], ProblemRaised | None]


def _base(name: BackendName, url: str) -> URL:
    try:
        base = URL(url.rstrip("/") + "/")
    except ValueError:
        base = URL()
    if base.scheme not in ("http", "https") or not base.host:
        raise SettingsError(f"backends.{name}.url is no http:// or https:// URL")
    return base


def _basic(name: BackendName, base: URL) -> str:
    """Give the Authorization of a URL's user and password; empty when it has none."""
    if base.user is None and base.password is None:
        return ""
    try:
        return aiohttp.encode_basic_auth(base.user or "", base.password or "", encoding="latin-1")
    except ValueError:
        raise SettingsError(f"backends.{name}.url has a user or a password that no header can carry") from None


def _may_pass(value: str) -> bool:
    """Tell whether a header's value can be sent on: what is no ASCII would fail when it is written."""
    return value.isascii() and value.isprintable()


def _unpacked(text: bytes, packing: str) -> bytes | None:
    """Unpack a short text; None when it is damaged, too long, or packed in a way that the standard library lacks."""
    if packing == "identity":
        return text
    if packing not in ("gzip", "deflate"):
        return None
    unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # either of the two, by its head
    try:
        plain = unpacker.decompress(text, _MAX_REFUSAL_BYTES)
    except zlib.error:
        return None
    return plain if unpacker.eof else None


class BackendClient:
    """One backend. Make it inside the running event loop and close it with `aclose`.

    connect_s: until there is a connection. timeout_s: until the first byte of the answer, counted from the last byte
    of the request. idle_s: between two pieces of the answer. total_s: for all of it. Without a breaker, each request
    is tried.
    """

    def __init__(
        self,
        name: BackendName,
        url: str,
        *,
        timeout_s: float,
        connect_s: float = 10,
        idle_s: float | None = None,
        total_s: float = 3600,
        label: str = "",
        api_key: str = "",
        models: Mapping[str, str] | None = None,
        breaker: CircuitBreaker | None = None,
    ) -> None:
        self.name = name
        base = _base(name, url)
        if api_key and base.user is not None:
            raise SettingsError(f"backends.{name} has an api_key and a user in its url: give one of them")
        if not _may_pass(api_key):
            raise SettingsError(f"backends.{name}.api_key has a character that no header can carry, as a line's end")
        self.label = label or str(base.with_user(None).with_query(None)).rstrip("/")
        self.models: Mapping[str, str] = models or {}
        self.breaker = breaker or CircuitBreaker(failures=0, reset_s=0)
        self._api_key = api_key
        self._authorization = f"Bearer {api_key}" if api_key else _basic(name, base)
        self._first_s, self._idle_s, self._total_s = timeout_s, idle_s or timeout_s, total_s
        self._passed = _REQUEST_HEADERS + (_TRACE_HEADERS if name == "hardware" else ())
        self._called: Callable[[Outcome], None] = _tell_nobody
        self._origin = HttpTransport(base.with_user(None), connect_s=connect_s)

    def watch(self, called: Callable[[Outcome], None]) -> None:
        """Have a function told how each call ended, one that the breaker kept back included."""
        self._called = called

    def model(self, name: str) -> str:
        """Give what this backend calls a model."""
        return self.models.get(name, name)

    async def send(
        self, path: str, headers: Mapping[str, str], body: bytes | Streamed, *, method: str = hdrs.METH_POST
    ) -> BackendResponse:
        """Make a request to a path below /v1/, and wait for the first bytes of the answer. Use it as `with …:`.

        Raises BackendFailed, at once when the breaker is open; ProblemRaised when a streamed body broke off.
        """
        try:
            upstream = await self._tried(method, path, headers, body)
        except BaseException as error:
            self._called(error.outcome if isinstance(error, BackendFailed) else "cancelled")
            raise
        if not upstream.succeeded:
            try:
                await self._clean(upstream)
            except BaseException as error:
                upstream.end(error)
                raise
        return upstream

    async def aclose(self) -> None:
        """Close the connections."""
        await self._origin.aclose()

    async def _tried(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | Streamed
    ) -> BackendResponse:
        """Make a request, if the breaker lets it, and tell the breaker what came of it."""
        try:
            attempt = self.breaker.enter()
        except CircuitOpen as circuit:
            problem = self._problem("has failed lately and rests", circuit.retry_after_s)
            raise BackendFailed(problem, outcome="breaker_open") from None
        try:
            upstream = await self._asked(method, path, headers, body)
        except BackendFailed as failure:
            if failure.alive:
                self._works(attempt)
            elif attempt.fail():
                _LOG.error(
                    "No calls to the backend %r for now, it keeps failing: %s",
                    self.name,
                    failure,
                    extra=event("circuit_breaker_opened", backend=self.name),
                )
            raise
        else:
            self._works(attempt)
            return upstream
        finally:
            attempt.end()

    def _works(self, attempt: Attempt) -> None:
        if attempt.succeed():
            _LOG.warning(
                "The backend %r answers again", self.name, extra=event("circuit_breaker_closed", backend=self.name)
            )

    async def _asked(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | Streamed
    ) -> BackendResponse:
        outgoing = self._outgoing(headers, body)
        began_s = asyncio.get_running_loop().time()
        response: Answer | None = None
        try:
            # The timeouts are ours: aiohttp's sock_read ends, and tells nobody, at a chunk that its C parser
            # refuses (3.14), and a head that dribbles in must end, too.
            async with asyncio.timeout_at(began_s + min(self._first_s, self._total_s)) as patience:
                sent = body if isinstance(body, bytes) else self._paced(body, patience)
                response = await self._origin.ask(method, path, outgoing, sent)
                self._refuse(response)
                first = await self._first(response)
        except BaseException as error:
            if response is not None:
                response.close()
            if not isinstance(error, FAILURES):
                raise
            if isinstance(body, Streamed) and (fault := body.fault()) is not None:
                raise fault from None
            raise failed(self.name, error) from error
        return BackendResponse(
            self.name,
            response,
            first,
            self._incoming(response.headers),
            idle_s=self._idle_s,
            ends_s=began_s + self._total_s,
            may_stay=isinstance(body, bytes),
            over=self._called,
        )

    async def _first(self, response: Answer) -> bytes:
        first = await next_piece(response.content)
        if not first and response.status in SUCCESS:
            raise BackendFailed(self._problem("answered with nothing"))
        return first

    def _outgoing(self, headers: Mapping[str, str], body: bytes | Streamed) -> dict[str, str]:
        """Give the headers that pass to the backend, and our own."""
        outgoing = {}
        for name in self._passed:
            value = headers.get(name)
            if value is not None and _may_pass(value):
                outgoing[name] = value
        outgoing.setdefault(hdrs.ACCEPT, "*/*")
        outgoing.setdefault(hdrs.ACCEPT_ENCODING, "identity")
        if body:
            outgoing.setdefault(hdrs.CONTENT_TYPE, "application/octet-stream")
        if self._authorization:
            outgoing[hdrs.AUTHORIZATION] = self._authorization
        if isinstance(body, Streamed) and body.length is not None:
            outgoing[hdrs.CONTENT_LENGTH] = str(body.length)
        return outgoing

    def _incoming(self, headers: Mapping[str, str]) -> CIMultiDict[str]:
        """Give the headers that pass to the client."""
        passed = CIMultiDict[str]()
        for name in _RESPONSE_HEADERS:
            value = headers.get(name)
            if value is not None and _may_pass(value) and not (self._api_key and self._api_key in value):
                passed[name] = value
        return passed

    def _paced(self, body: Streamed, patience: asyncio.Timeout) -> AsyncIterator[bytes]:
        """Give the body as it comes; while the client's bytes are awaited, no time of the backend's runs."""
        loop = asyncio.get_running_loop()

        def grant(more_s: float | None) -> None:
            with suppress(RuntimeError, AssertionError):  # it has answered before the end of the body
                patience.reschedule(None if more_s is None else loop.time() + more_s)

        async def paced() -> AsyncIterator[bytes]:
            while True:
                grant(None)
                chunk = await anext(body.chunks, b"")
                grant(self._first_s)
                if not chunk:
                    return
                yield chunk

        return paced()

    async def _clean(self, upstream: BackendResponse) -> None:
        """Read and unpack what a backend says against the request: it may quote the operator's key, a secret."""
        packing = upstream.headers.pop(hdrs.CONTENT_ENCODING, "identity").lower()
        text = bytearray(upstream.first)
        while chunk := await upstream.read():
            text += chunk
            if len(text) > _MAX_REFUSAL_BYTES:
                problem = self._problem(f"answered {upstream.status} at too great a length")
                raise BackendFailed(problem, alive=True)
        plain = _unpacked(bytes(text), packing)
        if plain is None:
            problem = self._problem(f"answered {upstream.status} in a way that cannot be read")
            raise BackendFailed(problem, alive=True)
        upstream.first = plain.replace(self._api_key.encode(), b"***") if self._api_key else plain

    def _refuse(self, response: Answer) -> None:
        """Keep to ourselves what is between the backend and its operator; the rest is the client's to read."""
        status = response.status
        if status in _OPERATORS_FAULT:
            # Its text is for the operator: about a key, an account or a place. The next try will end the same way.
            raise BackendFailed(self._problem(f"refuses this relay ({status})"))
        if status in _REDIRECT or status < SUCCESS.start:
            problem = self._problem(f"answered {status}, which leads elsewhere")
            raise BackendFailed(problem, alive=True)
        if status in _PASSING or status >= _SERVER_ERROR:
            retry_after_s = retry_seconds(response.headers.get(hdrs.RETRY_AFTER))
            problem = self._problem(f"answered {status}", retry_after_s)
            raise BackendFailed(problem, alive=status in _PASSING)

    def _problem(self, what: str, retry_after_s: int = 1) -> Problem:
        return backend_problem(self.name, 502, "backend_unavailable", what, retry_after_s)


def _tell_nobody(outcome: Outcome) -> None:
    """Stand for who does not watch."""
