"""The two backends, as the relay sees them: a URL that speaks OpenAI's API, a key, timeouts and model names.

A backend's credentials stay in here, and so do a client's out there: headers pass by a list of names, both ways.
"""

import asyncio
import io
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Literal

import aiohttp
from aiohttp import hdrs
from aiohttp.http_exceptions import HttpProcessingError
from multidict import CIMultiDict
from yarl import URL

from limiter.errors import SettingsError
from limiter.model import Backend as BackendName
from limiter.relay.answers import Problem, ProblemRaised, retry_seconds
from limiter.relay.breaker import Breaker, CircuitOpen

Outcome = Literal["served", "refused", "failed", "timeout", "cancelled", "breaker_open"]
_CONNECTIONS = 1000
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
_FAILURES = (TimeoutError, aiohttp.ClientError, HttpProcessingError, OSError)  # the third: a body that is no HTTP
_OPERATORS_FAULT = frozenset({401, 402, 403, 407})
_PASSING = frozenset({408, 429})
_SUCCESS = range(200, 300)
_REDIRECT = range(300, 400)
_SERVER_ERROR = 500
_LONGEST_REFUSAL = 1 << 20


class BackendFailed(Exception):  # noqa: N818  reads as what happened
    """A backend gave nothing that the client should see.

    passing: another backend may be tried. alive: it answered, if not well, so that nothing speaks against the next try.
    outcome: what the call is counted as.
    """

    def __init__(
        self, problem: Problem, *, passing: bool = True, alive: bool = False, outcome: Outcome = "failed"
    ) -> None:
        super().__init__(problem.detail)
        self.problem = problem
        self.passing = passing
        self.alive = alive
        self.outcome = outcome


@dataclass(frozen=True, slots=True)
class Streamed:
    """A body that comes bit by bit. length: in bytes, None when nobody knows.

    fault: why it ended before its end, when that is the client's doing; it is then no failure of the backend.
    """

    chunks: AsyncIterator[bytes]
    length: int | None
    fault: Callable[[], ProblemRaised | None]


@dataclass(slots=True)
class _Course:
    """How a call goes: `cancelled`, as by a client that leaves, until it comes to another end."""

    outcome: Outcome = "cancelled"


@dataclass(frozen=True, slots=True)
class Upstream:
    """A backend's answer whose first bytes have come. `rest` has the others; both are as the backend sent them."""

    backend: BackendName
    status: int
    headers: CIMultiDict[str]
    first: bytes
    rest: AsyncIterator[bytes]

    @property
    def succeeded(self) -> bool:
        """Whether the backend served the request."""
        return self.status in _SUCCESS

    @property
    def streams(self) -> bool:
        """Whether the answer is a stream of server-sent events."""
        return self.headers.get(hdrs.CONTENT_TYPE, "").lower().startswith("text/event-stream")


def _base(name: BackendName, url: str) -> URL:
    try:
        base = URL(url.rstrip("/") + "/")
    except ValueError:
        base = URL()
    if base.scheme not in ("http", "https") or not base.host:
        raise SettingsError(f"backends.{name}.url is no http:// or https:// URL")
    return base


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
        plain = unpacker.decompress(text, _LONGEST_REFUSAL)
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
        breaker: Breaker | None = None,
    ) -> None:
        self.name = name
        self._url = _base(name, url)
        if api_key and self._url.user is not None:
            raise SettingsError(f"backends.{name} has an api_key and a user in its url: give one of them")
        if not _may_pass(api_key):
            raise SettingsError(f"backends.{name}.api_key has a character that no header can carry, as a line's end")
        self.label = label or str(self._url.with_user(None).with_query(None)).rstrip("/")
        self.models: Mapping[str, str] = models or {}
        self.breaker = breaker or Breaker(failures=0, reset_s=0)
        self._api_key = api_key
        self._first_s, self._idle_s, self._total_s = timeout_s, idle_s or timeout_s, total_s
        self._passed = _REQUEST_HEADERS + (_TRACE_HEADERS if name == "hardware" else ())
        self._called: Callable[[Outcome], None] | None = None
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=_CONNECTIONS),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,  # the body passes as it is, with its Content-Encoding
            skip_auto_headers=(hdrs.USER_AGENT, hdrs.ACCEPT_ENCODING),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_s),
        )

    def watch(self, called: Callable[[Outcome], None]) -> None:
        """Have a function told how each call ended, one that the breaker kept back included."""
        self._called = called

    def model(self, name: str) -> str:
        """Give what this backend calls a model."""
        return self.models.get(name, name)

    @asynccontextmanager
    async def send(
        self, path: str, headers: Mapping[str, str], body: bytes | Streamed, *, method: str = hdrs.METH_POST
    ) -> AsyncIterator[Upstream]:
        """Make a request to a path below /v1/, and wait for the first bytes of the answer.

        Leaving the block before the end of the answer closes the connection, which stops the backend's work.
        Raises BackendFailed, at once when the breaker is open; ProblemRaised when a streamed body broke off.
        """
        course = _Course()
        try:
            async with self._sent(course, method, path, headers, body) as upstream:
                yield upstream
        except BackendFailed as failure:
            course.outcome = failure.outcome
            raise
        finally:
            if self._called is not None:
                self._called(course.outcome)

    @asynccontextmanager
    async def _sent(
        self, course: _Course, method: str, path: str, headers: Mapping[str, str], body: bytes | Streamed
    ) -> AsyncIterator[Upstream]:
        try:
            attempt = self.breaker.enter()
        except CircuitOpen as circuit:
            problem = self._problem(502, "backend_unavailable", "has failed lately and rests", circuit.retry_after_s)
            raise BackendFailed(problem, outcome="breaker_open") from None
        try:
            try:
                response, first, rest = await self._begin(course, method, path, headers, body)
            except BackendFailed as failure:
                attempt.succeed() if failure.alive else attempt.fail()
                raise
            attempt.succeed()
            attempt.end()
            try:
                passed = CIMultiDict(
                    (name, response.headers[name])
                    for name in _RESPONSE_HEADERS
                    if _may_pass(response.headers.get(name, "\0")) and not self._quotes_key(response.headers[name])
                )
                if response.status not in _SUCCESS:
                    packing = passed.pop(hdrs.CONTENT_ENCODING, "identity").lower()
                    first = await self._refusal(response.status, packing, first, rest)
                yield Upstream(self.name, response.status, passed, first, rest)
            finally:
                response.release() if response.content.at_eof() and isinstance(body, bytes) else response.close()
        finally:
            attempt.end()

    def _quotes_key(self, value: str) -> bool:
        return self._api_key != "" and self._api_key in value

    async def aclose(self) -> None:
        """Close the connections."""
        await self._session.close()

    async def _begin(
        self, course: _Course, method: str, path: str, headers: Mapping[str, str], body: bytes | Streamed
    ) -> tuple[aiohttp.ClientResponse, bytes, AsyncIterator[bytes]]:
        outgoing = {name: headers[name] for name in self._passed if _may_pass(headers.get(name, "\0"))}
        outgoing.setdefault(hdrs.ACCEPT_ENCODING, "identity")
        if self._api_key:
            outgoing[hdrs.AUTHORIZATION] = f"Bearer {self._api_key}"
        if isinstance(body, Streamed) and body.length is not None:
            outgoing[hdrs.CONTENT_LENGTH] = str(body.length)
        began_s = asyncio.get_running_loop().time()
        response: aiohttp.ClientResponse | None = None
        try:
            with self._failures(body):
                # The timeouts are ours: aiohttp's sock_read ends, and tells nobody, at a chunk that its C parser
                # refuses (3.14), and a head that dribbles in must end, too.
                async with asyncio.timeout_at(began_s + min(self._first_s, self._total_s)) as patience:
                    response = await self._session.request(
                        method,
                        self._url / path,
                        data=self._paced(body, patience),
                        headers=outgoing,
                        allow_redirects=False,
                    )
                    self._refuse(response)
                    rest = self._chunks(response, began_s + self._total_s, course)
                    first = await self._first(response)
        except BaseException:
            if response is not None:
                response.close()
            raise
        return response, first, rest

    async def _first(self, response: aiohttp.ClientResponse) -> bytes:
        first = await response.content.readany()
        if not first and response.status in _SUCCESS:
            raise BackendFailed(self._problem(502, "backend_unavailable", "answered with nothing"))
        return first

    def _paced(self, body: bytes | Streamed, patience: asyncio.Timeout) -> io.BytesIO | AsyncIterator[bytes] | None:
        """Give the body as aiohttp takes it; while the client's bytes are awaited, no time of the backend's runs."""
        if isinstance(body, bytes):
            # Sent bit by bit: bytes would go to the socket at once, and a big body block the loop.
            return io.BytesIO(body) if body else None
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

    async def _chunks(self, response: aiohttp.ClientResponse, ends_s: float, course: _Course) -> AsyncIterator[bytes]:
        loop = asyncio.get_running_loop()
        while True:
            try:
                with self._failures():
                    async with asyncio.timeout_at(min(loop.time() + self._idle_s, ends_s)):
                        chunk = await response.content.readany()
            except BackendFailed as failure:  # a stream's client is told of it, and the call ends as if it were well
                course.outcome = failure.outcome
                raise
            if not chunk:
                course.outcome = "served" if response.status in _SUCCESS else "refused"
                return
            yield chunk

    @contextmanager
    def _failures(self, body: bytes | Streamed = b"") -> Iterator[None]:
        """Turn what aiohttp raises into what happened, which may be that the client's body broke off."""
        try:
            yield
        except _FAILURES as error:
            if isinstance(body, Streamed) and (fault := body.fault()) is not None:
                raise fault from None
            raise self._failed(error) from error

    async def _refusal(self, status: int, packing: str, first: bytes, rest: AsyncIterator[bytes]) -> bytes:
        """Read and unpack what a backend says against the request: it may quote the operator's key, a secret."""
        text = bytearray(first)
        async for chunk in rest:
            text += chunk
            if len(text) > _LONGEST_REFUSAL:
                problem = self._problem(502, "backend_unavailable", f"answered {status} at too great a length")
                raise BackendFailed(problem, alive=True)
        plain = _unpacked(bytes(text), packing)
        if plain is None:
            problem = self._problem(502, "backend_unavailable", f"answered {status} in a way that cannot be read")
            raise BackendFailed(problem, alive=True)
        return plain.replace(self._api_key.encode(), b"***") if self._api_key else plain

    def _refuse(self, response: aiohttp.ClientResponse) -> None:
        """Keep to ourselves what is between the backend and its operator; the rest is the client's to read."""
        status = response.status
        if status in _OPERATORS_FAULT:
            # Its text is for the operator: about a key, an account or a place.
            problem = self._problem(502, "backend_unavailable", f"refuses this relay ({status})")
            raise BackendFailed(problem, passing=False, alive=True)
        if status in _REDIRECT or status < _SUCCESS.start:
            problem = self._problem(502, "backend_unavailable", f"answered {status}, which leads elsewhere")
            raise BackendFailed(problem, alive=True)
        if status in _PASSING or status >= _SERVER_ERROR:
            retry_after_s = retry_seconds(response.headers.get(hdrs.RETRY_AFTER))
            problem = self._problem(502, "backend_unavailable", f"answered {status}", retry_after_s)
            raise BackendFailed(problem, alive=status in _PASSING)

    def _failed(self, error: Exception) -> BackendFailed:
        if isinstance(error, TimeoutError):
            return BackendFailed(self._problem(504, "backend_timeout", "did not answer in time"), outcome="timeout")
        return BackendFailed(self._problem(502, "backend_unavailable", "cannot be reached, or broke off"))

    def _problem(self, status: int, code: str, what: str, retry_after_s: int = 1) -> Problem:
        title = "Backend timeout" if code == "backend_timeout" else "Backend unavailable"
        return Problem(status, code, title, f"The backend {self.name!r} {what}.", retry_after_s=retry_after_s)
