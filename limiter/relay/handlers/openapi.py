"""The OpenAPI 3.1 description of the relay, at /openapi.json: built from the app's own routes and `openapi_schema`."""

import re
from collections.abc import Iterable
from functools import lru_cache

import orjson
from aiohttp import web

from limiter import __version__
from limiter.relay.handlers.openapi_schema import (
    ALSO_BACKENDS,
    CODES,
    HEADERS,
    IDENTITIES,
    MEANING,
    OPERATIONS,
    PARAMETERS,
    RETRY_AFTER,
    SCHEMAS,
    SECURITY,
    Content,
    Operation,
    Route,
    Schema,
    ref,
)


def describe(served: Iterable[Route]) -> Schema:
    """Return the document for these routes, each a method and a path; those without a description are left out."""
    paths: dict[str, Schema] = {}
    for method, path in sorted(served, key=lambda route: (route[1], route[0])):
        if operation := OPERATIONS.get((method, path)):
            paths.setdefault(path, {})[method.lower()] = _described(method, path, operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Limiter",
            "version": __version__,
            "summary": "An OpenAI-compatible relay that spends an install's credits.",
            "description": "Any OpenAI SDK works with this as its `base_url`. An unknown path is 404 `unknown_path`, a "
            "method that a path does not accept 405 `method_not_allowed`, both with the error object.",
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "schemas": SCHEMAS | {f"Error{status}": _error_schema(status) for status in sorted(MEANING)},
            "headers": HEADERS,
            "parameters": PARAMETERS,
            "securitySchemes": SECURITY,
        },
    }


async def show_openapi(request: web.Request) -> web.Response:
    """Serve the description of the app."""
    served = {
        (route.method, route.resource.canonical)
        for route in request.app.router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    return web.Response(body=_rendered(tuple(sorted(served))), content_type="application/json")


@lru_cache(maxsize=4)
def _rendered(served: tuple[Route, ...]) -> bytes:
    return orjson.dumps(describe(served))


def _described(method: str, path: str, operation: Operation) -> Schema:
    headers = ["X-Request-Id"]
    headers += ["X-Licence"] if operation.identified else []
    headers += ["RateLimit-Policy", "RateLimit"] if operation.has_ratelimit else []
    if operation.metered:
        headers += ["X-Credits-Backend", "X-Credits-Unmetered"]
    responses: Schema = {"200": _response("Served.", operation.answers, headers)}
    for status in sorted(operation.errors):
        responses[str(status)] = _error(status, operation)
    if operation.not_ready:
        responses["503"] = _response("Not ready.", {"application/json": ref("Readiness")}, headers)
    if operation.metered:
        refusal = "The backend's own error answer, unchanged."
        responses["4XX"] = _response(refusal, {"*/*": {}}, headers)
    responses["default"] = _response("Any other error.", _as_problem(ref("Error")), ["X-Request-Id"])
    described: Schema = {
        "operationId": "_".join([method.lower(), *re.findall(r"\w+", path)]),
        "summary": operation.summary,
        "responses": responses,
    }
    if operation.identified:
        described["security"] = IDENTITIES
    if operation.parameters:
        described["parameters"] = [{"$ref": f"#/components/parameters/{name}"} for name in operation.parameters]
    if operation.body is not None:
        content = {kind: {"schema": schema} for kind, schema in operation.body.items()}
        described["requestBody"] = {"required": True, "content": content}
    return described


def _error(status: int, operation: Operation) -> Schema:
    headers = ["X-Request-Id"]
    headers += ["Retry-After"] if status in RETRY_AFTER else []
    headers += ["x-should-retry"] if status in {402, 403, 409} else []
    headers += ["RateLimit-Policy", "RateLimit"] if status in {402, 429} else []
    schema, meaning = ref(f"Error{status}"), MEANING[status]
    content = _as_problem(schema)
    if operation.metered and status in ALSO_BACKENDS:
        either: Schema = {"anyOf": [schema, ref("BackendRefusal")]}
        content = {"application/json": either, "application/problem+json": schema, "*/*": {}}
        meaning += " Or it is the backend's own error answer, unchanged: then `X-Credits-Backend` is present."
        headers.append("X-Credits-Backend")
    return _response(meaning, content, headers)


def _response(description: str, content: Content, headers: Iterable[str]) -> Schema:
    return {
        "description": description,
        "headers": {name: {"$ref": f"#/components/headers/{name}"} for name in headers},
        "content": {kind: {"schema": schema} for kind, schema in content.items()},
    }


def _as_problem(schema: Schema) -> Content:
    return {"application/json": schema, "application/problem+json": schema}


def _error_schema(status: int) -> Schema:
    own = {
        "status": {"const": status},
        "error": {"properties": {"code": {"enum": [str(code) for code in CODES[status]]}}},
    }
    required = ["violated-policies", "renews_at"] if status == 402 else []  # noqa: PLR2004  only this one has a policy
    return {"allOf": [ref("Error"), {"properties": own, "required": required}]}
