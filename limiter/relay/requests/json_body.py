"""Reads and checks a JSON body. It reserves nothing and sends nothing."""

import asyncio
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import orjson
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from limiter.relay.http.problems import fail
from limiter.relay.requests.memory_budget import Reservation
from limiter.relay.requests.model_member import with_model
from limiter.relay.upstream.client import BackendClient, Streamed


class ForwardableRequest(Protocol):
    """A request to forward: the path below /v1/, the client's headers, and a body for each backend.

    replayable: whether the complete body can be sent a second time. stream: whether it asks for a stream.
    """

    @property
    def path(self) -> str: ...  # noqa: D102  the class says it
    @property
    def headers(self) -> Mapping[str, str]: ...  # noqa: D102
    @property
    def replayable(self) -> bool: ...  # noqa: D102
    @property
    def stream(self) -> bool: ...  # noqa: D102
    def body_for(self, client: BackendClient) -> bytes | Streamed: ...  # noqa: D102


class ForwardableJson(NamedTuple):
    """A JSON body that names a model, as the bytes that the client sent.

    The parsed objects are not kept: those of `[[],[],…]` take twenty times its bytes.
    """

    path: str
    headers: Mapping[str, str]
    body: bytes
    model: str
    stream: bool
    replayable: bool = True  # it is in memory anyway

    def body_for(self, client: BackendClient) -> bytes:
        """Return the body with the backend's name for the model, and all else as the client sent it."""
        model = client.model(self.model)
        if model == self.model:
            return self.body
        try:
            return with_model(self.body, model)
        except RecursionError:
            fail(400, "invalid_json", "Invalid JSON", "The body is nested too deeply.")


async def read_json(request: web.Request, reservation: Reservation, *, within_s: float) -> ForwardableJson:
    """Read the body of a JSON route within a number of seconds. Raises ProblemRaised, HTTPRequestEntityTooLarge."""
    if request.content_type != "application/json":
        fail(415, "unsupported_media_type", "Unsupported media type", "Send the body as application/json.")
    try:
        if request.content.is_eof():  # it arrived with the head, as most bodies do
            body = await _whole(request, reservation)
        else:
            async with asyncio.timeout(within_s):
                body = await _whole(request, reservation)
    except TimeoutError:
        fail(408, "request_timeout", "Request timeout", f"The body did not arrive within {within_s:g} s.")
    except (web.RequestPayloadError, HttpProcessingError):
        fail(400, "invalid_body", "Invalid body", "The body cannot be read: its chunks are damaged.")
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        fail(400, "invalid_json", "Invalid JSON", f"The body is not JSON: {error}.")
    if not isinstance(document, dict):
        fail(400, "invalid_json", "Invalid JSON", "The body must be a JSON object.")
    model = document.get("model")
    if not isinstance(model, str):
        fail(400, "missing_model", "Missing model", "The body must name a model.", param="model")
    return ForwardableJson(
        request.path.removeprefix("/v1/"), request.headers, body, model, document.get("stream") is True
    )


async def _whole(request: web.Request, reservation: Reservation) -> bytes:
    """Read the whole body, reserving memory as it arrives: a length that is only claimed reserves nothing."""
    limit_b = request.client_max_size
    size_b = request.content_length or 0
    parts: list[bytes] = []
    while size_b <= limit_b:
        part = await request.content.readany()
        if not part:
            return b"".join(parts)
        reservation.add(len(part))
        parts.append(part)
        size_b = max(size_b, reservation.size_b)
    raise web.HTTPRequestEntityTooLarge(limit_b, size_b)
