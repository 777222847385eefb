"""The record of a request for its log line and metrics. Handlers fill it in; it decides nothing."""

from dataclasses import dataclass

from aiohttp import web

from limiter.credits.models import Backend


@dataclass(slots=True)
class RequestRecord:
    """The record of one request; a field that is not known is None.

    Attributes:
        install_id: as the client sent it, in lower case.
        tier: the one that the request is served as.
        status: that of the decision.
        reason: that of a denied decision.
        backend: the one that answered, or else the last that was tried.
        cost: reserved credits.
        model: the name that the client sent.
        fell_back: whether hardware was tried after Gemini had failed.
        from_memory: whether the decision came from the cache of denials, without Redis.
        first_byte_s: when the head of a streamed answer was sent, in seconds on the monotonic clock.
    """

    install_id: str | None = None
    tier: str | None = None
    status: str | None = None
    reason: str | None = None
    backend: Backend | None = None
    cost: int | None = None
    model: str | None = None
    fell_back: bool = False
    from_memory: bool = False
    first_byte_s: float | None = None


REQUEST_RECORD = web.RequestKey("record", RequestRecord)


def request_record(request: web.Request) -> RequestRecord:
    """Return the record of a request; create it on first use."""
    try:
        return request[REQUEST_RECORD]
    except KeyError:
        record = request[REQUEST_RECORD] = RequestRecord()
        return record
