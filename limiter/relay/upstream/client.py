"""The client of a backend: a URL that speaks OpenAI's API, a key, timeouts and model names.

Credentials never pass, neither a client's to the backend nor the backend's to a client: only listed headers do.
"""

import asyncio
import logging
import ssl
import zlib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.request import getproxies_environment, proxy_bypass_environment  # type: ignore[attr-defined]

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
    SUCCESS,
    BackendFailed,
    BackendResponse,
    Outcome,
    backend_problem,
    failed,
)
from limiter.relay.upstream.transport import KEEPALIVE_S, HttpTransport

_LOG = logging.getLogger("limiter.relay")
_REQUEST_HEADERS = (hdrs.ACCEPT, hdrs.ACCEPT_ENCODING, hdrs.CONTENT_TYPE, "OpenAI-Beta")
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
_MAX_REFUSAL_BYTES = 1 << 20


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
    base = _base(name, url)
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


def _unpacked(text: bytes, packing: str) -> bytes | None:
    """Decompress a short text; return None if it is damaged, too long, or in an encoding that is not supported."""
    if packing == "identity":
        return text
    if packing not in ("gzip", "deflate"):
        return None
    unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # detects which of the two it is
    try:
        plain = unpacker.decompress(text, _MAX_REFUSAL_BYTES)
    except zlib.error:
        return None
    return plain if unpacker.eof else None


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
        breaker: by default one that never opens.
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
        breaker: CircuitBreaker | None = None,
        keepalive_s: float = KEEPALIVE_S,
        max_connections: int = 0,
        ca_file: str = "",
    ) -> None:
        self.name = name
        base = _base(name, url)
        if api_key and base.user is not None:
            raise SettingsError(f"backends.{name} has an api_key and a user in its url: set one of them only")
        if not _may_pass(api_key):
            raise SettingsError(
                f"backends.{name}.api_key has a character that a header cannot contain, such as a newline"
            )
        self.label = label or str(base.with_user(None).with_query(None)).rstrip("/")
        self.models: Mapping[str, str] = models or {}
        self.breaker = breaker or CircuitBreaker(failures=0, reset_s=0)
        self._api_key = api_key
        self._authorization = f"Bearer {api_key}" if api_key else _basic(name, base)
        self._first_s, self._idle_s, self._total_s = timeout_s, idle_s or timeout_s, total_s
        self._passed = _REQUEST_HEADERS + (_TRACE_HEADERS if name == "hardware" else ())
        self._on_call: Callable[[Outcome], None] = _ignore
        self._transport = HttpTransport(
            base.with_user(None),
            connect_s=connect_s,
            shortest_s=min(self._first_s, self._idle_s, total_s),
            keepalive_s=keepalive_s,
            max_connections=max_connections,
            tls=tls_context(name, ca_file) if base.scheme == "https" else None,
        )

    def watch(self, on_call: Callable[[Outcome], None]) -> None:
        """Call a function with the outcome of each call, including those that the breaker prevented."""
        self._on_call = on_call

    @property
    def connections(self) -> int:
        """How many connections to it are open."""
        return self._transport.connections

    def model(self, name: str) -> str:
        """Return this backend's name for a model."""
        return self.models.get(name, name)

    async def send(
        self, path: str, headers: Mapping[str, str], body: bytes | Streamed, *, method: str = hdrs.METH_POST
    ) -> BackendResponse:
        """Send a request to a path below /v1/, and wait for the first bytes of the answer. Use it as `with …:`.

        Raises BackendFailed, at once if the breaker is open; ProblemRaised if the client broke a streamed body off.
        """
        try:
            upstream = await self._attempt(method, path, headers, body)
        except BaseException as error:
            self._on_call(error.outcome if isinstance(error, BackendFailed) else "cancelled")
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
        await self._transport.aclose()

    async def _attempt(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | Streamed
    ) -> BackendResponse:
        """Send a request if the breaker allows it, and record the result with the breaker."""
        try:
            attempt = self.breaker.enter()
        except CircuitOpen as circuit:
            problem = self._problem("has failed repeatedly and is not called for now", circuit.retry_after_s)
            raise BackendFailed(problem, outcome="breaker_open") from None
        try:
            upstream = await self._request(method, path, headers, body)
        except BackendFailed as failure:
            if failure.alive:
                self._succeed(attempt)
            elif failure.outcome != "busy" and attempt.fail():
                _LOG.error(
                    "Circuit breaker opened: the backend %r keeps failing and is not called for now: %s",
                    self.name,
                    failure,
                    extra=event("circuit_breaker_opened", backend=self.name),
                )
            raise
        else:
            self._succeed(attempt)
            return upstream
        finally:
            attempt.end()

    def _succeed(self, attempt: Attempt) -> None:
        if attempt.succeed():
            _LOG.warning(
                "Circuit breaker closed: the backend %r works again",
                self.name,
                extra=event("circuit_breaker_closed", backend=self.name),
            )

    async def _request(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | Streamed
    ) -> BackendResponse:
        outgoing = self._outgoing(headers, body)
        began_s = asyncio.get_running_loop().time()
        response: Exchange | None = None
        try:
            content = body if isinstance(body, bytes) else body.chunks
            within_s = min(self._first_s, self._total_s)
            response = await self._transport.request(method, path, outgoing, content, within_s=within_s)
            left_s = response.deadline_s - asyncio.get_running_loop().time()
            response.idle_s = min(self._first_s, max(0.0, left_s))  # to the first byte
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
        response.idle_s, response.ends_s = self._idle_s, began_s + self._total_s
        return BackendResponse(
            self.name,
            response,
            first,
            self._incoming(response.headers),
            on_end=self._on_call,
        )

    async def _first(self, response: Exchange) -> bytes:
        first = await response.read()
        if not first and response.status in SUCCESS:
            raise BackendFailed(self._problem("sent an empty answer"))
        return first

    def _outgoing(self, headers: Mapping[str, str], body: bytes | Streamed) -> dict[str, str]:
        """Return the headers for the backend: those of the client that pass, and the relay's own."""
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
        """Return the headers that pass to the client."""
        passed = CIMultiDict[str]()
        for name in _RESPONSE_HEADERS:
            value = headers.get(name)
            if value is not None and _may_pass(value) and not (self._api_key and self._api_key in value):
                passed[name] = value
        return passed

    async def _clean(self, upstream: BackendResponse) -> None:
        """Read and decompress an error answer, and mask the operator's key, which it may quote."""
        packing = upstream.headers.pop(hdrs.CONTENT_ENCODING, "identity").lower()
        text = bytearray(upstream.first)
        while chunk := await upstream.read():
            text += chunk
            if len(text) > _MAX_REFUSAL_BYTES:
                problem = self._problem(f"answered {upstream.status} with a body that is too long")
                raise BackendFailed(problem, alive=True)
        plain = _unpacked(bytes(text), packing)
        if plain is None:
            problem = self._problem(f"answered {upstream.status} with a body that cannot be decompressed")
            raise BackendFailed(problem, alive=True)
        upstream.first = plain.replace(self._api_key.encode(), b"***") if self._api_key else plain

    def _refuse(self, response: Exchange) -> None:
        """Raise BackendFailed for an answer that concerns the operator and not the client."""
        status = response.status
        if status in _OPERATORS_FAULT:
            # Its text is about the operator's key, account or region. The next call would fail, too.
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
    """Do nothing, until `watch` is called."""
