"""The client of a backend: a URL that speaks OpenAI's API, a key, timeouts and model names.

Credentials never pass, neither a client's to the backend nor the backend's to a client: only listed headers do.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from math import inf

import aiohttp
from aiohttp import hdrs
from multidict import CIMultiDict
from yarl import URL

from limiter.credits.models import Backend as BackendName
from limiter.errors import SettingsError
from limiter.log_events import event
from limiter.relay.http.problems import Problem, ProblemRaised, retry_seconds
from limiter.relay.upstream.circuit_breaker import Attempt, CircuitBreaker, CircuitOpen
from limiter.relay.upstream.http_protocol import Exchange
from limiter.relay.upstream.response import (
    FAILURES,
    MAX_WHOLE_BYTES,
    SUCCESS,
    BackendFailed,
    BackendResponse,
    Outcome,
    backend_problem,
    failed,
    is_event_stream,
    packing_of,
    unpacked,
)
from limiter.relay.upstream.transport import HttpTransport

_LOG = logging.getLogger("limiter.relay")
_REQUEST_HEADERS = (hdrs.ACCEPT, hdrs.CONTENT_TYPE, "OpenAI-Beta")
_TRACE_HEADERS = ("traceparent", "tracestate")  # only for the operator's own server
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
_UNREADABLE = (
    b'{"error": {"message": "The backend refused this request (%d), in a packing that was not asked for.", '
    b'"type": "invalid_request_error", "code": null, "param": null}}'
)


@dataclass(frozen=True, slots=True)
class Streamed:
    """A body that is sent in pieces.

    Attributes:
        chunks: its pieces.
        length: in bytes, or None if it is not known.
        fault: returns why the client broke it off, which is then not a failure of the backend.
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
        raise SettingsError(f"backends.{name}.url is not an http:// or https:// URL")
    return base


def _basic(name: BackendName, base: URL) -> str:
    """Return the Authorization header for the user and password of a URL; empty if it has none."""
    if base.user is None and base.password is None:
        return ""
    try:
        return aiohttp.encode_basic_auth(base.user or "", base.password or "", encoding="latin-1")
    except ValueError:
        raise SettingsError(f"backends.{name}.url has a user or a password that a header cannot contain") from None


def _may_pass(value: str) -> bool:
    """Return whether a header value can be forwarded: one that is not ASCII could not be written."""
    return value.isascii() and value.isprintable()


class BackendClient:
    """One backend. Create it inside the running event loop and close it with `aclose`.

    Args:
        name: gemini or hardware.
        url: the base URL of its API. Raises SettingsError if it is not valid.
        timeout_s: until the first byte of the answer, from the last byte of the request, in seconds.
        connect_s: until there is a connection.
        idle_s: between two pieces of the answer; timeout_s by default.
        total_s: for the complete call.
        label: its name in logs and in /readyz; by default the URL.
        api_key: sent as a Bearer token.
        models: the backend's names for models, by the client's names.
        routes: the paths that it has; by default every one.
        lacks: the client's names of models that another backend has alone.
        breaker: by default one that never opens.
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
        routes: Collection[str] | None = None,
        lacks: Collection[str] = (),
        breaker: CircuitBreaker | None = None,
        ca_file: str | None = None,
        first_event_s: float = 15,
    ) -> None:
        self.name = name
        base = _base(name, url)
        if api_key and base.user is not None:
            raise SettingsError(f"backends.{name} has an api_key and a user in its url: set one of them only")
        if not _may_pass(api_key):
            raise SettingsError(f"backends.{name}.api_key has a character that no header can carry, as a line's end")
        self.label = label or str(base.with_user(None).with_query(None)).rstrip("/")
        self.models: Mapping[str, str] = models or {}
        self._routes = None if routes is None else frozenset(routes)
        self._lacks = frozenset(lacks)
        self.breaker = breaker or CircuitBreaker(failures=0, reset_s=0)
        self._api_key = api_key
        self._authorization = f"Bearer {api_key}" if api_key else _basic(name, base)
        self._pass_on_s = first_event_s
        self._first_s, self._idle_s, self._total_s = timeout_s, idle_s or timeout_s, total_s
        self._passed = _REQUEST_HEADERS + (_TRACE_HEADERS if name == "hardware" else ())
        self._called: Callable[[Outcome], None] = _ignore
        self._transport = HttpTransport(
            base.with_user(None),
            connect_s=connect_s,
            shortest_s=min(self._first_s, self._idle_s, total_s),
            ca_file=ca_file,
        )

    def watch(self, called: Callable[[Outcome], None]) -> None:
        """Call a function with the outcome of each call, including those that the breaker prevented."""
        self._called = called

    def has_route(self, path: str) -> bool:
        """Return whether this backend has a path, which is the relay's."""
        return self._routes is None or path in self._routes

    def has_model(self, name: str) -> bool:
        """Return whether this backend may have a model: that another one has it alone is not said of it."""
        return name not in self._lacks

    def model(self, name: str) -> str:
        """Return this backend's name for a model."""
        return self.models.get(name, name)

    async def send(
        self,
        path: str,
        headers: Mapping[str, str],
        body: bytes | Streamed,
        *,
        method: str = hdrs.METH_POST,
        stream: bool = False,
    ) -> BackendResponse:
        """Send a request to a path below /v1/, and wait for the beginning of the answer. Use it as `with …:`.

        The beginning is a whole answer, if it is small, or a stream up to its first event that carries something.

        Args:
            path: below /v1/, without a slash at its beginning.
            headers: the client's; those that may pass do.
            body: whole, or as it arrives.
            method: in capitals.
            stream: whether the client asked for a stream, which then is one whatever its Content-Type.

        Raises BackendFailed, at once when the breaker is open; ProblemRaised when a streamed body broke off.
        """
        try:
            try:
                attempt = self.breaker.enter()
            except CircuitOpen as circuit:
                problem = self._problem("has failed repeatedly and is not called for now", circuit.retry_after_s)
                raise BackendFailed(problem, outcome="breaker_open") from None
            judged = partial(self._judged, attempt)
            try:
                return await self._begun(method, path, headers, body, judged, stream=stream)
            except BaseException as error:
                if isinstance(error, BackendFailed):
                    judged(error)
                attempt.end()
                raise
        except BaseException as error:
            self._called(error.outcome if isinstance(error, BackendFailed) else "cancelled")
            raise

    async def aclose(self) -> None:
        """Close the connections."""
        await self._transport.aclose()

    def _judged(self, attempt: Attempt, failure: BackendFailed | None) -> None:
        """Count a call for the breaker; an answer that breaks off after it had served counts as a failure, too."""
        if failure is None or failure.alive:
            if attempt.succeed():
                _LOG.warning(
                    "Circuit breaker closed: the backend %r works again",
                    self.name,
                    extra=event("circuit_breaker_closed", backend=self.name),
                )
        elif attempt.fail():
            _LOG.error(
                "Circuit breaker opened: the backend %r keeps failing and is not called for now: %s",
                self.name,
                failure,
                extra=event("circuit_breaker_opened", backend=self.name),
            )

    async def _begun(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: bytes | Streamed,
        judged: Callable[[BackendFailed | None], None],
        *,
        stream: bool,
    ) -> BackendResponse:
        """Send a request and read the beginning of its answer."""
        now_s = asyncio.get_running_loop().time
        began_s = now_s()
        exchange: Exchange | None = None
        try:
            exchange = await self._transport.request(
                method,
                path,
                self._outgoing(headers, body, stream=stream),
                body if isinstance(body, bytes) else body.chunks,
                within_s=min(self._first_s, self._total_s),
            )
            self._refuse(exchange)
            exchange.ends_s = min(exchange.deadline_s, now_s() + self._first_s)
            exchange.idle_s = inf
            incoming = self._incoming(exchange.headers)
            streams = exchange.status in SUCCESS and (stream or is_event_stream(incoming))
            answer = BackendResponse(self.name, exchange, incoming, streams=streams, judged=judged, over=self._called)
            then = {"idle_s": self._idle_s, "ends_s": began_s + self._total_s}
            if streams:
                await answer.begin_stream(pass_on_s=began_s + self._pass_on_s, **then)
            else:
                await answer.begin_whole(**then)
            if not answer.succeeded:
                await self._clean(answer)
        except BaseException as error:
            if exchange is not None:
                exchange.close()
            if not isinstance(error, FAILURES):
                raise
            if isinstance(body, Streamed) and (fault := body.fault()) is not None:
                raise fault from None
            raise failed(self.name, error) from error
        if not streams or answer.delivered:
            judged(None)
        return answer

    def _outgoing(self, headers: Mapping[str, str], body: bytes | Streamed, *, stream: bool) -> dict[str, str]:
        """Return the headers for the backend: the client's that may pass, and the relay's own."""
        outgoing = {}
        for name in self._passed:
            value = headers.get(name)
            if value is not None and _may_pass(value):
                outgoing[name] = value
        outgoing.setdefault(hdrs.ACCEPT, "*/*")
        packs = not stream and "gzip" in headers.get(hdrs.ACCEPT_ENCODING, "").lower()
        outgoing[hdrs.ACCEPT_ENCODING] = "gzip" if packs else "identity"  # of packings, what can be read here
        if body:
            outgoing.setdefault(hdrs.CONTENT_TYPE, "application/octet-stream")
        if self._authorization:
            outgoing[hdrs.AUTHORIZATION] = self._authorization
        if isinstance(body, Streamed) and body.length is not None:
            outgoing[hdrs.CONTENT_LENGTH] = str(body.length)
        return outgoing

    def _incoming(self, headers: Mapping[str, str]) -> CIMultiDict[str]:
        """Return the headers for the client."""
        passed = CIMultiDict[str]()
        for name in _RESPONSE_HEADERS:
            value = headers.get(name)
            if value is not None and _may_pass(value) and not (self._api_key and self._api_key in value):
                passed[name] = value
        return passed

    async def _clean(self, answer: BackendResponse) -> None:
        """Read and unpack what a backend says against the request: it may quote the operator's key, a secret."""
        if not answer.complete:
            problem = self._problem(f"answered {answer.status} with a body that is too long")
            raise BackendFailed(problem, alive=True)
        plain = unpacked(answer.begun, packing_of(answer.headers), MAX_WHOLE_BYTES)
        answer.headers.pop(hdrs.CONTENT_ENCODING, None)
        if plain is None:  # it stays a refusal: served by another backend it would be debited
            plain = _UNREADABLE % answer.status
            answer.headers[hdrs.CONTENT_TYPE] = "application/json"
        answer.begun = plain.replace(self._api_key.encode(), b"***") if self._api_key else plain

    def _refuse(self, response: Exchange) -> None:
        """Raise BackendFailed for an answer that concerns the operator and not the client."""
        status = response.status
        if status in _OPERATORS_FAULT:
            # Its text is for the operator: about a key, an account or a place. The next try will end the same way.
            raise BackendFailed(self._problem(f"refuses this relay ({status})"))
        if status in _REDIRECT or status < SUCCESS.start:
            problem = self._problem(f"answered {status}, a redirect")
            raise BackendFailed(problem, alive=True)
        if status in _PASSING or status >= _SERVER_ERROR:
            retry_after_s = retry_seconds(response.headers.get(hdrs.RETRY_AFTER))
            problem = self._problem(f"answered {status}", retry_after_s)
            raise BackendFailed(problem, alive=status in _PASSING)

    def _problem(self, what: str, retry_after_s: int = 1) -> Problem:
        return backend_problem(self.name, 502, "backend_unavailable", what, retry_after_s)


def _ignore(outcome: Outcome) -> None:
    """Do nothing: the default for a client without an observer."""
