"""The list of models: the operator's names first, then what the backends say they have. It costs no credits."""

import asyncio
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import orjson
from aiohttp import hdrs, web

from limiter.credits.models import Backend
from limiter.relay.handlers.context import RELAY
from limiter.relay.http.json_response import json_response
from limiter.relay.http.problems import Problem, ProblemRaised, fail
from limiter.relay.requests.identity import Identity
from limiter.relay.upstream.client import BackendClient
from limiter.relay.upstream.response import BackendFailed

_FRESH_S = 30  # whoever asks without end must not make the operator's key ask without end
_PATIENCE_S = 10
_MAX_LIST_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Model:
    """One line of the list, in OpenAI's form."""

    id: str
    created: int
    owned_by: str

    def as_dict(self) -> dict[str, object]:
        """Give it as OpenAI's API does."""
        return {"id": self.id, "object": "model", "created": self.created, "owned_by": self.owned_by}


class Models:
    """What can be asked for, remembered for a short while: one asks the backends, and who came meanwhile shares it."""

    def __init__(self, backends: Mapping[Backend, BackendClient]) -> None:
        self._backends = backends
        self._lock = asyncio.Lock()
        self._list: list[Model] = []
        self._fresh_until_s = 0.0

    async def known(self) -> list[Model]:
        """Give the models. A backend that fails is left out. Raises ProblemRaised (502) when all do."""
        async with self._lock:
            if time.monotonic() >= self._fresh_until_s:
                self._list = await self._ask()
                self._fresh_until_s = time.monotonic() + _FRESH_S
            return self._list

    async def _ask(self) -> list[Model]:
        lists = await asyncio.gather(*(_models_of(client) for client in self._backends.values()))
        if all(models is None for models in lists):
            detail = "No backend tells its models now."
            raise ProblemRaised(Problem(502, "backend_unavailable", "Backend unavailable", detail, retry_after_s=1))
        mapped = [Model(name, 0, "operator") for client in self._backends.values() for name in client.models]
        merged: dict[str, Model] = {}
        for model in [*mapped, *(model for models in lists for model in models or ())]:
            merged.setdefault(model.id, model)
        return [*merged.values()]


MODELS = web.AppKey("models", Models)


async def show_models(request: web.Request) -> web.Response:
    """List the models as OpenAI does, to whoever could use them."""
    identity = request.app[RELAY].identify(request)
    models = await request.app[MODELS].known()
    document = {"object": "list", "data": [model.as_dict() for model in models]}
    return json_response(document, headers=_headers(identity))


async def show_model(request: web.Request) -> web.Response:
    """Show one of the list. Raises ProblemRaised (404)."""
    identity = request.app[RELAY].identify(request)
    name = request.match_info["id"]
    model = next((model for model in await request.app[MODELS].known() if model.id == name), None)
    if model is None:
        fail(404, "model_not_found", "Model not found", "No backend here lists a model of this name.", param="model")
    return json_response(model.as_dict(), headers=_headers(identity))


def _headers(identity: Identity) -> dict[str, str]:
    return {hdrs.CACHE_CONTROL: "no-store", **identity.headers()}


async def _models_of(client: BackendClient) -> list[Model] | None:
    """Ask one backend; None when it gives no list that can be read."""
    try:
        async with asyncio.timeout(_PATIENCE_S):
            with await client.send("models", {}, b"", method=hdrs.METH_GET) as answer:
                body = bytearray(answer.first)
                while chunk := await answer.read():
                    body += chunk
                    if len(body) > _MAX_LIST_BYTES:
                        return None
                return [*_read(orjson.loads(body))] if answer.succeeded else None
    except (BackendFailed, TimeoutError, ValueError):
        return None


def _read(document: object) -> Iterator[Model]:
    """Read what is a model in a list; whatever else is in there stays here."""
    data = document.get("data") if isinstance(document, dict) else None
    if not isinstance(data, list):
        raise ValueError("no list of models")  # noqa: TRY004  as orjson says it of what is no JSON
    for item in data:
        if isinstance(item, dict) and isinstance(name := item.get("id"), str):
            created, owner = item.get("created"), item.get("owned_by")
            yield Model(name, created if isinstance(created, int) else 0, owner if isinstance(owner, str) else "")
