"""The client of a backend: a URL that speaks OpenAI's API, a key, timeouts and model names.

Credentials never pass, neither a client's to the backend nor the backend's to a client: only listed headers do.
"""

import asyncio
import logging
import ssl
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address
from math import inf
from urllib.request import getproxies_environment, proxy_bypass_environment  # type: ignore[attr-defined]

import aiohttp
from aiohttp import hdrs
from multidict import CIMultiDict, istr
from yarl import URL

from limiter._util.fair_share import Holders
from limiter.credits.models import Backend as BackendName
from limiter.errors import SettingsError
from limiter.log_events import event
from limiter.relay.http.problems import Problem, ProblemRaised
from limiter.relay.upstream.circuit_breaker import Attempt, CircuitBreaker, CircuitOpen
from limiter.relay.upstream.http_protocol import Exchange
from limiter.relay.upstream.refusal import Cause, Refusal, about_operator, wait_s
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
from limiter.relay.upstream.transport import KEEPALIVE_S, HttpTransport

_LOG = logging.getLogger("limiter.relay")
# As istr, so that a lookup need not lower them.
_REQUEST_HEADERS = (hdrs.ACCEPT, hdrs.CONTENT_TYPE, istr("OpenAI-Beta"))
_TRACE_HEADERS = (istr("traceparent"), istr("tracestate"))  # only for the operator's own server
_RESPONSE_HEADERS = (
    hdrs.CACHE_CONTROL,
    hdrs.CONTENT_ENCODING,
    hdrs.CONTENT_TYPE,
    istr("OpenAI-Model"),
    istr("OpenAI-Processing-Ms"),
    istr("OpenAI-Version"),
)
_PASSING = frozenset({408, 429})
_REDIRECT = range(300, 400)
_SERVER_ERROR = 500
_NOT_FOUND = 404
_REFUSAL_S = 2.0  # how long the text of a refusal is waited for, which the client does not get
_LOG_AGAIN_S = 600.0
_CAUSES: Mapping[Cause, str] = {
    "key": "its API key is missing, wrong, expired or blocked",
    "place": "it does not serve the place of this relay",
    "billing": "billing, or the account's balance",
    "account": "its account, project or permissions",
    "model": "the account may not use this model",
}
_NO_MODEL = (
    b'{"error": {"message": "The backend does not have this model.", "type": "invalid_request_error", '
    b'"code": "model_not_found", "param": "model"}}'
)
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


def check_no_proxy(name: BackendName, url: str) -> None:
    """Raise SettingsError where the environment names a proxy for a backend: none is used, so it would be passed by."""
    base = base_url(name, url)
    host = base.raw_host or ""
    proxies = getproxies_environment()
    variable = next((each for each in (base.scheme, "all") if proxies.get(each)), "")
    if not variable or _is_loopback(host) or proxy_bypass_environment(f"{host}:{base.port}", proxies):
        return
    raise SettingsError(
        f"the environment's {variable.upper()}_PROXY names a proxy for backends.{name}.url, which is not supported: "
        f"unset it, or add {host} to NO_PROXY so that the backend is called directly"
    )


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def tls_context(name: BackendName, ca_file: str) -> ssl.SSLContext:
    """Return what a backend's certificate is verified with: the system's authorities, or those of a file.

    Raises SettingsError.
    """
    try:
        return ssl.create_default_context(cafile=ca_file or None)
    except OSError as error:  # an SSLError is one
        what = "holds no certificate" if isinstance(error, ssl.SSLError) else f"cannot be read: {error.strerror}"
        raise SettingsError(f"backends.{name}.ca_file {what}: {ca_file}") from None


def base_url(name: str, url: str) -> URL:
    """Return the URL that a backend's paths are below, with a slash at the end of its path. Raises SettingsError."""
    try:
        base = URL(url)
    except ValueError:
        base = URL()
    if base.scheme not in ("http", "https") or not base.host:
        raise SettingsError(f"backends.{name}.url is not an http:// or https:// URL")
    if "#" in url:
        raise SettingsError(f"backends.{name}.url has a fragment (#…), which is never sent: leave it out, or write %23")
    if any(character.isspace() or not character.isprintable() for character in url):
        raise SettingsError(f"backends.{name}.url has a blank, or a character that cannot be seen: take it out")
    return base.with_path(base.raw_path.rstrip("/") + "/", encoded=True, keep_query=True)


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
        timeout_s: from the last byte of the request until the first event of a stream that carries something, or the
            first byte of another answer, in seconds.
        connect_s: until there is a connection.
        idle_s: between two pieces of the answer; timeout_s by default.
        total_s: for the complete call.
        label: its name in logs and in /readyz; by default the URL.
        api_key: sent as a Bearer token.
        models: the backend's names for models, by the client's names.
        routes: the paths that it has; by default every one.
        lacks: the client's names of models that another backend has alone.
        breaker: by default one that never opens.
        first_event_s: until the pings with which a stream begins pass on, though it has carried nothing yet.
        keepalive_s: how long a connection may be idle before it is closed.
        max_connections: 0 for any number.
        ca_file: certificates of the authorities to trust, in place of the system's.
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
        first_event_s: float = 15,
        keepalive_s: float = KEEPALIVE_S,
        max_connections: int = 0,
        ca_file: str = "",
    ) -> None:
        self.name = name
        base = base_url(name, url)
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
        self._logged_s: dict[Cause, float] = {}  # until when a cause is not logged again
        self._called: Callable[[Outcome], None] = _ignore
        self._transport = HttpTransport(
            base.with_user(None),
            connect_s=connect_s,
            shortest_s=min(self._first_s, self._idle_s, total_s),
            keepalive_s=keepalive_s,
            max_connections=max_connections,
            tls=tls_context(name, ca_file) if base.scheme == "https" else None,
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

    @property
    def connections(self) -> int:
        """How many connections to it are open."""
        return self._transport.connections

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
        install_id: str | None = None,
        on_sent: Callable[[BackendName], None] | None = None,
        holders: Holders = (),
    ) -> BackendResponse:
        """Send a request to a path below /v1/, and wait for the beginning of the answer. Use it as `with …:`.

        The beginning is a whole answer, if it is small, or a stream up to its first event that carries something.

        Args:
            path: below /v1/, without a slash at its beginning.
            headers: the client's; those that may pass do.
            body: whole, or as it arrives.
            method: in capitals.
            stream: whether the client asked for a stream, which then is one whatever its Content-Type.
            install_id: whom it is for, to the breaker; None for a call of the relay's own, which it does not count.
            on_sent: called with the backend's name once the whole request is written.
            holders: whose share of the connections it takes, where they are bounded.

        Raises BackendFailed, at once when the breaker is open; ProblemRaised when a streamed body broke off.
        """
        try:
            try:
                attempt = self.breaker.enter(install_id)
            except CircuitOpen as circuit:
                problem = self._problem("has failed repeatedly and is not called for now", circuit.retry_after_s)
                raise BackendFailed(problem, outcome="breaker_open") from None
            try:
                return await self._begun(
                    method, path, headers, body, attempt, stream=stream, on_sent=on_sent, holders=holders
                )
            except BaseException as error:
                if isinstance(error, BackendFailed):
                    self._judged(attempt, error)
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
        elif failure.outcome != "busy" and attempt.fail():
            _LOG.error(
                "Circuit breaker opened: the backend %r keeps failing and is not called for now: %s",
                self.name,
                failure,
                extra=event("circuit_breaker_opened", backend=self.name),
            )

    def _over(self, attempt: Attempt, outcome: Outcome) -> None:
        """End a call. A stream that its client left before it carried anything is no result for the breaker."""
        attempt.end()
        self._called(outcome)

    async def _begun(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: bytes | Streamed,
        attempt: Attempt,
        *,
        stream: bool,
        on_sent: Callable[[BackendName], None] | None,
        holders: Holders,
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
                on_sent=None if on_sent is None else partial(on_sent, self.name),
                holders=holders,
            )
            self._refuse_redirect(exchange.status)
            exchange.ends_s = min(exchange.deadline_s, now_s() + self._first_s)
            exchange.idle_s = inf
            incoming = self._incoming(exchange.headers)
            streams = exchange.status in SUCCESS and (stream or is_event_stream(incoming))
            answer = BackendResponse(
                self.name,
                exchange,
                incoming,
                streams=streams,
                judged=partial(self._judged, attempt),
                over=partial(self._over, attempt),
            )
            then = {"idle_s": self._idle_s, "ends_s": began_s + self._total_s}
            if streams:
                await answer.begin_stream(pass_on_s=began_s + self._pass_on_s, **then)
            elif answer.succeeded:
                await answer.begin_whole(**then)
            else:
                await self._refused(answer, exchange, **then)
        except BaseException as error:
            if exchange is not None:
                exchange.close()
            if not isinstance(error, FAILURES):
                raise
            if isinstance(body, Streamed) and (fault := body.fault()) is not None:
                raise fault from None
            raise failed(self.name, error) from error
        if not streams or answer.delivered:
            self._judged(attempt, None)
        return answer

    def _outgoing(self, headers: Mapping[str, str], body: bytes | Streamed, *, stream: bool) -> dict[str, str]:
        """Return the headers for the backend: the client's that may pass, and the relay's own."""
        outgoing: dict[str, str] = {}
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

    async def _refused(self, answer: BackendResponse, exchange: Exchange, *, idle_s: float, ends_s: float) -> None:
        """Read what a backend says instead of serving, as far as the client may see it.

        Raises BackendFailed for what concerns the operator and not the client: of a key, an account or a place the
        client knows nothing.
        """
        status = answer.status
        passes = status not in _PASSING and status < _SERVER_ERROR
        if passes:
            await answer.begin_whole(idle_s=idle_s, ends_s=ends_s)
        else:  # it is a failure, whatever its text says
            with suppress(*FAILURES):
                async with asyncio.timeout(_REFUSAL_S):
                    await answer.begin_whole(idle_s=idle_s, ends_s=ends_s)
        plain = unpacked(answer.begun, packing_of(answer.headers), MAX_WHOLE_BYTES) if answer.complete else b""
        refusal = about_operator(status, plain or b"")
        if refusal is not None:
            self._log_refusal(status, refusal)
        after_s = wait_s(exchange.headers, plain or b"")
        if not passes:
            raise BackendFailed(self._problem(f"answered {status}", after_s), alive=status in _PASSING)
        if refusal is not None and (status, refusal.cause) != (_NOT_FOUND, "model"):
            # The next try ends the same way; but by words alone, which a client may have had quoted, no breaker opens.
            problem = self._problem(f"refuses this relay ({status})", after_s)
            raise BackendFailed(problem, alive=not refusal.is_certain, is_logged=True)
        if not answer.complete:
            problem = self._problem(f"answered {status} with a body that is too long")
            raise BackendFailed(problem, alive=True)
        answer.headers.pop(hdrs.CONTENT_ENCODING, None)
        if plain is None or refusal is not None:  # it stays a refusal: served by another backend it would be debited
            plain = _UNREADABLE % status if refusal is None else _NO_MODEL
            answer.headers[hdrs.CONTENT_TYPE] = "application/json"
        answer.begun = self._without_key(plain)

    def _without_key(self, text: bytes) -> bytes:
        """Mask the operator's key, which a backend may quote."""
        return text.replace(self._api_key.encode(), b"***") if self._api_key else text

    def _log_refusal(self, status: int, refusal: Refusal) -> None:
        """Log a refusal that is about the operator, unless one with its cause was logged a short time ago."""
        now_s = time.monotonic()
        if now_s < self._logged_s.get(refusal.cause, 0.0):
            return
        self._logged_s[refusal.cause] = now_s + _LOG_AGAIN_S
        _LOG.error(
            "The backend %r refuses this relay, not its clients: %s (%d: %s)",
            self.name,
            _CAUSES[refusal.cause],
            status,
            self._without_key(refusal.text.encode()).decode()[:500] or "no text",
            extra=event("backend_refuses_operator", backend=self.name, cause=refusal.cause, status=status),
        )

    def _refuse_redirect(self, status: int) -> None:
        """Raise BackendFailed for an answer that a relay does not follow."""
        if status in _REDIRECT or status < SUCCESS.start:
            problem = self._problem(f"answered {status}, a redirect")
            raise BackendFailed(problem, alive=True)

    def _problem(self, what: str, retry_after_s: int = 1) -> Problem:
        return backend_problem(self.name, 502, "backend_unavailable", what, retry_after_s)


def _ignore(outcome: Outcome) -> None:
    """Do nothing: the default for a client without an observer."""
