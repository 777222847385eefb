"""What is known of a request so far, for whoever watches it. Handlers fill it in; nothing is decided by it."""

from dataclasses import dataclass

from aiohttp import web

from limiter.credits.models import Backend


@dataclass(slots=True)
class RequestRecord:
    """One request's record; what is not known yet, or never will be, is None.

    status, reason: the decision's words. backend: the one that answered, or else the last that was tried. cost: credits
    that were reserved. fell_back: whether hardware was tried after Gemini had failed. from_memory: whether the
    decision was made without Redis, which had just refused the same. first_byte_s: when the head of a streamed answer
    left, on the monotonic clock.
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
    """Give a request's record, empty ones at first."""
    try:
        return request[REQUEST_RECORD]
    except KeyError:
        record = request[REQUEST_RECORD] = RequestRecord()
        return record
