"""The `Relay` that the handlers of one app share."""

from collections.abc import Mapping
from dataclasses import dataclass

from aiohttp import web

from limiter.credits.models import Backend, Tiers
from limiter.licences.tokens import Licences
from limiter.relay.http.request_record import request_record
from limiter.relay.metering.admission import Admission
from limiter.relay.metering.availability import RedisAvailability, WatchedLimiter
from limiter.relay.metering.background_retries import BackgroundRetries
from limiter.relay.metering.idempotency import Idempotency
from limiter.relay.metering.settlement import Settlements
from limiter.relay.requests.identity import Identity, identify
from limiter.relay.requests.memory_budget import MemoryBudget
from limiter.relay.requests.upload import UploadLimits
from limiter.relay.upstream.client import BackendClient


@dataclass(frozen=True, slots=True)
class Relay:
    """Everything that handlers need. `backends` has the configured ones, or the echo server as both."""

    tiers: Tiers
    limiter: WatchedLimiter
    availability: RedisAvailability
    licences: Licences
    backends: Mapping[Backend, BackendClient]
    costs: Mapping[str, int]
    uploads: UploadLimits
    memory: MemoryBudget
    admission: Admission
    idempotency: Idempotency
    retries: BackgroundRetries
    settlements: Settlements

    @property
    def has_hardware(self) -> bool:
        """Whether requests can be served without Gemini."""
        return "hardware" in self.backends

    def identify(self, request: web.Request) -> Identity:
        """Return the identity of a request's client, and record it. Raises ProblemRaised."""
        identity = identify(request, self.licences, self.tiers)
        record = request_record(request)
        record.install_id, record.tier = identity.install_id, identity.tier
        return identity

    def cost(self, request: web.Request) -> int:
        """Return the cost of a request, in credits."""
        return self.costs.get(request.path, self.costs["default"])


RELAY = web.AppKey("relay", Relay)
