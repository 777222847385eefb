"""The two backends, as the relay sees them: a URL that speaks OpenAI's API, a key, timeouts and model names.

A backend's credentials stay in here, and so do a client's out there: headers pass by a list of names, both ways.
"""

import asyncio
import io
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

import aiohttp
from aiohttp import hdrs
from aiohttp.http_exceptions import HttpProcessingError
from multidict import CIMultiDict
from yarl import URL

from limiter.errors import SettingsError
from limiter.model import Backend as BackendName
from limiter.relay.answers import Problem, retry_seconds

T = TypeVar("T")
_CONNECT_TIMEOUT_S = 10
_CONNECTIONS = 1000
_REQUEST_HEADERS = (hdrs.ACCEPT, hdrs.ACCEPT_ENCODING, hdrs.CONTENT_TYPE, "OpenAI-Beta")
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
    """A backend gave nothing that the client should see. `passing` tells that another backend may be tried."""

    def __init__(self, problem: Problem, *, passing: bool = True) -> None:
        super().__init__(problem.detail)
        self.problem = problem
        self.passing = passing


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


class BackendClient:
    """One backend. Make it inside the running event loop and close it with `aclose`."""

    def __init__(
        self,
        name: BackendName,
        url: str,
        *,
        timeout_s: float,
        label: str = "",
        api_key: str = "",
        models: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self._url = _base(name, url)
        if api_key and self._url.user is not None:
            raise SettingsError(f"backends.{name} has an api_key and a user in its url: give one of them")
        if not _may_pass(api_key):
            raise SettingsError(f"backends.{name}.api_key has a character that no header can carry, as a line's end")
        self.label = label or str(self._url.with_user(None).with_query(None)).rstrip("/")
        self._api_key = api_key
        self._models = models or {}
        self._timeout_s = timeout_s
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=_CONNECTIONS),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,  # the body passes as it is, with its Content-Encoding
            skip_auto_headers=(hdrs.USER_AGENT, hdrs.ACCEPT_ENCODING),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S),
        )

    def model(self, name: str) -> str:
        """Give what this backend calls a model."""
        return self._models.get(name, name)

    @asynccontextmanager
    async def send(self, path: str, headers: Mapping[str, str], body: bytes) -> AsyncIterator[Upstream]:
        """Post a request to a path below /v1/, and wait for the first bytes of the answer, `timeout_s` at most.

        Leaving the block before the end of the answer closes the connection, which stops the backend's work.
        Raises BackendFailed.
        """
        outgoing = {name: headers[name] for name in _REQUEST_HEADERS if _may_pass(headers.get(name, "\0"))}
        outgoing.setdefault(hdrs.ACCEPT_ENCODING, "identity")
        if self._api_key:
            outgoing[hdrs.AUTHORIZATION] = f"Bearer {self._api_key}"
        first_by = asyncio.get_running_loop().time() + self._timeout_s
        # Not `async with`: its exit would wait for nothing, but must not turn an error of the block into ours.
        data = io.BytesIO(body)  # sent bit by bit: bytes would go to the socket at once, and a big body block the loop
        response = await self._by(
            first_by, self._session.post(self._url / path, data=data, headers=outgoing, allow_redirects=False)
        )
        try:
            self._refuse(response)
            rest = self._chunks(response)
            first = await self._by(first_by, anext(rest, b""))
            if response.status not in _SUCCESS:
                first = await self._refusal(response.status, first, rest)
            elif not first:
                raise BackendFailed(self._problem(502, "backend_unavailable", "answered with nothing"))
            passed = CIMultiDict(
                (name, response.headers[name])
                for name in _RESPONSE_HEADERS
                if _may_pass(response.headers.get(name, "\0"))
            )
            yield Upstream(self.name, response.status, passed, first, rest)
        finally:
            response.close() if not response.content.at_eof() else response.release()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._session.close()

    async def _chunks(self, response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        # The timeout is ours: aiohttp's sock_read ends, and tells nobody, at a chunk that its C parser refuses (3.14).
        loop = asyncio.get_running_loop()
        while chunk := await self._by(loop.time() + self._timeout_s, response.content.readany()):
            yield chunk

    async def _by(self, deadline_s: float, step: Awaitable[T]) -> T:
        """Wait for one step of the backend's, until a moment of the loop's clock: a head that dribbles ends, too."""
        try:
            async with asyncio.timeout_at(deadline_s):
                return await step
        except _FAILURES as error:
            raise self._failed(error) from error

    async def _refusal(self, status: int, first: bytes, rest: AsyncIterator[bytes]) -> bytes:
        """Read what a backend says against the request, whole: it may quote the operator's key, which stays here."""
        text = bytearray(first)
        async for chunk in rest:
            text += chunk
            if len(text) > _LONGEST_REFUSAL:
                raise BackendFailed(
                    self._problem(502, "backend_unavailable", f"answered {status} at too great a length")
                )
        return bytes(text).replace(self._api_key.encode(), b"***") if self._api_key else bytes(text)

    def _refuse(self, response: aiohttp.ClientResponse) -> None:
        """Keep to ourselves what is between the backend and its operator; the rest is the client's to read."""
        status = response.status
        if status in _OPERATORS_FAULT:
            # Its text is for the operator: about a key, an account or a place.
            problem = self._problem(502, "backend_unavailable", f"refuses this relay ({status})")
            raise BackendFailed(problem, passing=False)
        if status in _REDIRECT or status < _SUCCESS.start:
            raise BackendFailed(self._problem(502, "backend_unavailable", f"answered {status}, which leads elsewhere"))
        if status in _PASSING or status >= _SERVER_ERROR:
            retry_after_s = retry_seconds(response.headers.get(hdrs.RETRY_AFTER))
            raise BackendFailed(self._problem(502, "backend_unavailable", f"answered {status}", retry_after_s))

    def _failed(self, error: Exception) -> BackendFailed:
        if isinstance(error, TimeoutError):
            return BackendFailed(self._problem(504, "backend_timeout", "did not answer in time"))
        return BackendFailed(self._problem(502, "backend_unavailable", "cannot be reached, or broke off"))

    def _problem(self, status: int, code: str, what: str, retry_after_s: int = 1) -> Problem:
        title = "Backend timeout" if code == "backend_timeout" else "Backend unavailable"
        return Problem(status, code, title, f"The backend {self.name!r} {what}.", retry_after_s=retry_after_s)
