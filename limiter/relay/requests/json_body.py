"""Reads and checks a JSON body. It reserves nothing and sends nothing."""

from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple, NoReturn, Protocol

from aiohttp import web

from limiter.relay.http.problems import fail
from limiter.relay.requests.body_reader import BodyPace, BodyReader
from limiter.relay.requests.json_members import InvalidBody, Members, MissingModel, read_members, with_model
from limiter.relay.requests.memory_budget import SMALL_B, Reservation
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
    """A JSON body that names a model, as the bytes that the client sent. members: what is known of it."""

    path: str
    headers: Mapping[str, str]
    body: bytes
    members: Members
    replayable: bool = True  # it is in memory anyway

    @property
    def model(self) -> str:
        """The client's name of the model."""
        return self.members.model

    @property
    def stream(self) -> bool:
        """Whether it asks for a stream."""
        return bytes(self.members.stream) == b"true"

    def body_for(self, client: BackendClient) -> bytes:
        """Return the body with the backend's name for the model, and all else as the client sent it."""
        model = client.model(self.model)
        if model == self.model:
            return self.body
        try:
            return with_model(self.body, model)
        except InvalidBody as error:
            _fail_invalid(error)


async def read_json(
    request: web.Request, reservation: Reservation, pace: BodyPace, *, before_large: Callable[[], Awaitable[None]]
) -> ForwardableJson:
    """Read the body of a JSON route. Raises ProblemRaised, HTTPRequestEntityTooLarge, and what `before_large` raises.

    before_large: called once more than SMALL_B bytes have arrived; the rest is read when it has returned.
    """
    if request.content_type != "application/json":
        fail(415, "unsupported_media_type", "Unsupported media type", "Send the body as application/json.")
    body = await _whole(request, reservation, pace, before_large)
    try:
        members = read_members(body)
    except MissingModel as error:
        detail = f"The body must name a model: {error}."
        fail(400, "missing_model", "Missing model", detail, param="model")
    except InvalidBody as error:
        _fail_invalid(error)
    return ForwardableJson(request.path.removeprefix("/v1/"), request.headers, body, members)


def _fail_invalid(error: InvalidBody) -> NoReturn:
    fail(400, "invalid_json", "Invalid JSON", f"The body must be a JSON object: {error}.")


async def _whole(
    request: web.Request, reservation: Reservation, pace: BodyPace, before_large: Callable[[], Awaitable[None]]
) -> bytes:
    """Read the whole body, reserving memory as it arrives: a length that is only claimed reserves nothing."""
    limit_b = request.client_max_size
    size_b = request.content_length or 0
    if size_b <= limit_b:
        reader, parts, is_small = BodyReader(request, pace), list[bytes](), True
        while not reader.is_at_end:
            part = await reader.read()
            reservation.add(len(part))
            parts.append(part)
            if reader.read_b > limit_b:
                break
            if is_small and reader.read_b > SMALL_B and not request.content.is_eof():
                is_small = False
                await before_large()
        else:
            return b"".join(parts)
        size_b = reader.read_b
    raise web.HTTPRequestEntityTooLarge(limit_b, size_b)
