"""The `Relay` that the handlers of one app share."""

from collections.abc import Mapping
from dataclasses import dataclass

from aiohttp import web

from limiter._util.fair_share import Holders
from limiter.credits.models import Backend, Tiers
from limiter.licences.tokens import Licences
from limiter.relay.http.client_address import ClientAddresses
from limiter.relay.http.problems import fail
from limiter.relay.http.request_record import request_record
from limiter.relay.metering.admission import Admission
from limiter.relay.metering.availability import RedisAvailability, WatchedLimiter
from limiter.relay.metering.background_retries import BackgroundRetries
from limiter.relay.metering.idempotency import Idempotency
from limiter.relay.metering.settlement import Settlements
from limiter.relay.requests.bounds import Bounds
from limiter.relay.requests.identity import Identity, identify
from limiter.relay.requests.memory_budget import MemoryBudget
from limiter.relay.requests.places import Places
from limiter.relay.requests.upload import UploadLimits
from limiter.relay.telemetry.over_bounds import OverBounds
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
    bounds: Bounds
    uploads: UploadLimits
    memory: MemoryBudget
    places: Places
    addresses: ClientAddresses
    admission: Admission
    idempotency: Idempotency
    retries: BackgroundRetries
    settlements: Settlements
    over_bounds: OverBounds

    def served_by(self, request: web.Request, model: str | None) -> Mapping[Backend, BackendClient]:
        """Return the backends that can serve a request: those with its route, and its model unless it is None.

        Raises ProblemRaised (404) if there is none.
        """
        able = {name: client for name, client in self.backends.items() if client.has_route(request.path)}
        if not able:
            fail(404, "unknown_path", "Not found", "No backend of this relay serves this path.")
        if model is None:
            return able
        able = {name: client for name, client in able.items() if client.has_model(model)}
        if not able:
            detail = "The backend that has this model is not available here, or does not serve this path."
            fail(404, "model_not_found", "Model not found", detail, param="model")
        return able

    def identify(self, request: web.Request) -> Identity:
        """Return the identity of a request's client, and record it. Raises ProblemRaised."""
        identity = identify(request, self.licences, self.tiers)
        record = request_record(request)
        record.install_id, record.tier = identity.install_id, identity.tier
        return identity

    def holders(self, request: web.Request, identity: Identity) -> Holders:
        """Return who takes what a request needs: its install and, unless it is exempt, its address."""
        address = self.addresses.limited(request)
        return (identity.install_id,) if address is None else (identity.install_id, address)

    def cost(self, request: web.Request) -> int:
        """Return the cost of a request, in credits."""
        return self.costs.get(request.path, self.costs["default"])


RELAY = web.AppKey("relay", Relay)
