"""The list of models: the operator's names first, then those that the backends list. It costs no credits."""

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
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

_FRESH_S = 30  # a client that polls must not make the relay poll with the operator's key
_FAILED_S = 5  # the same while no backend lists any
_TIMEOUT_S = 10
_MAX_LIST_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Model:
    """One entry of the list, in OpenAI's format."""

    id: str
    created: int
    owned_by: str

    def as_dict(self) -> dict[str, object]:
        """Return the entry as OpenAI's API has it."""
        return {"id": self.id, "object": "model", "created": self.created, "owned_by": self.owned_by}


class Models:
    """The available models, or their absence, cached for a short time. Concurrent requests share one query."""

    def __init__(self, backends: Mapping[Backend, BackendClient]) -> None:
        self._backends = backends
        self._lock = asyncio.Lock()
        self._list: Sequence[Model] | None = None
        self._fresh_until_s = 0.0

    async def current(self) -> Sequence[Model]:
        """Return the models. A backend that fails is left out. Raises ProblemRaised (502) if all do."""
        async with self._lock:
            if time.monotonic() >= self._fresh_until_s:
                self._list = await self._query()
                self._fresh_until_s = time.monotonic() + (_FAILED_S if self._list is None else _FRESH_S)
        if self._list is None:
            detail = "No backend lists its models at the moment."
            problem = Problem(502, "backend_unavailable", "Backend unavailable", detail, retry_after_s=_FAILED_S)
            raise ProblemRaised(problem)
        return self._list

    async def _query(self) -> Sequence[Model] | None:
        """Return the models of all backends; None if all fail."""
        lists = await asyncio.gather(*(_query_models(client) for client in self._backends.values()))
        if all(models is None for models in lists):
            return None
        mapped = [Model(name, 0, "operator") for client in self._backends.values() for name in client.models]
        merged: dict[str, Model] = {}
        for model in [*mapped, *(model for models in lists for model in models or ())]:
            merged.setdefault(model.id, model)
        return [*merged.values()]


MODELS = web.AppKey("models", Models)


async def show_models(request: web.Request) -> web.Response:
    """Serve the list of models in OpenAI's format."""
    relay = request.app[RELAY]
    identity = relay.identify(request)
    models = await request.app[MODELS].current()
    document = {"object": "list", "data": [model.as_dict() for model in models if relay.bounds.serves(model.id)]}
    return json_response(document, headers=_headers(identity))


async def show_model(request: web.Request) -> web.Response:
    """Serve one entry of the list. Raises ProblemRaised (404)."""
    relay = request.app[RELAY]
    identity = relay.identify(request)
    name = request.match_info["id"]
    model = next((model for model in await request.app[MODELS].current() if model.id == name), None)
    if model is None or not relay.bounds.serves(name):
        fail(404, "model_not_found", "Model not found", "No backend here lists a model of this name.", param="model")
    return json_response(model.as_dict(), headers=_headers(identity))


def _headers(identity: Identity) -> dict[str, str]:
    return {hdrs.CACHE_CONTROL: "no-store", **identity.headers()}


async def _query_models(client: BackendClient) -> Sequence[Model] | None:
    """Return the models of one backend; None if it fails, or sends anything but a list of models."""
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            with await client.send("models", {}, b"", method=hdrs.METH_GET) as answer:
                body = bytearray(answer.begun)
                while chunk := await answer.read():
                    body += chunk
                    if len(body) > _MAX_LIST_BYTES:
                        return None
                return [*_parse(orjson.loads(body))] if answer.succeeded else None
    except (BackendFailed, TimeoutError, ValueError):
        return None


def _parse(document: object) -> Iterator[Model]:
    """Yield the models of a list; anything else in it is left out."""
    data = document.get("data") if isinstance(document, dict) else None
    if not isinstance(data, list):
        raise ValueError("not a list of models")  # noqa: TRY004  as orjson does for invalid JSON
    for item in data:
        if isinstance(item, dict) and isinstance(name := item.get("id"), str):
            created, owner = item.get("created"), item.get("owned_by")
            yield Model(name, created if isinstance(created, int) else 0, owner if isinstance(owner, str) else "")
