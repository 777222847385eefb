"""The content of the OpenAPI description, as data: error codes, routes, schemas, headers.

It is correct rather than complete: of a body, it describes only what the relay checks. The rest is up to the backends,
which change more often than this.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from limiter.credits.models import Reason
from limiter.relay.requests.json_members import MAX_MODEL_LENGTH

Schema: TypeAlias = dict[str, object]
Content: TypeAlias = dict[str, Schema]  # a schema by media type
Route: TypeAlias = tuple[str, str]  # method, path

# Every code that an error object can have, by its status. A test compares it with the program.
CODES: Mapping[int, tuple[str, ...]] = {
    400: (
        "missing_install_id",
        "invalid_install_id",
        "invalid_idempotency_key",
        "invalid_body",
        "invalid_json",
        "missing_model",
        "request_over_bound",
        "upgrade_not_offered",
        "unsupported_http_version",
        "malformed_request",
    ),
    401: ("invalid_licence", "licence_revoked", "unknown_tier"),
    402: (Reason.OUT_OF_CREDITS, Reason.GEMINI_CAP),
    403: ("licence_seats_taken",),
    404: ("unknown_path", "model_not_found"),
    405: ("method_not_allowed",),
    408: ("request_timeout",),
    409: ("idempotency_in_progress", "idempotency_answer_not_kept"),
    413: ("request_too_large",),
    415: ("packed_body", "unsupported_media_type"),
    417: ("expectation_failed",),
    422: ("idempotency_key_reused",),
    429: (
        Reason.CREDITS_IN_FLIGHT,
        Reason.TOO_MANY_IN_FLIGHT,
        Reason.RATE_LIMITED,
        "install_mint_limited",
        "too_many_connections",
    ),
    431: ("head_too_large",),
    500: ("internal_error", "broken_row"),
    502: ("backend_unavailable",),
    503: ("limiter_unavailable", "limiter_out_of_memory", "limiter_overloaded", "relay_busy"),
    504: ("backend_timeout",),
}
MEANING: Mapping[int, str] = {
    400: "The request cannot be read, or does not identify its install.",
    401: "The licence is not valid here.",
    402: "The credits are used up. A retry does not help.",
    403: "Other installs use all seats of the licence.",
    404: "No backend lists a model of this name.",
    408: "The body did not arrive in time.",
    409: "The same request is being served, or was served without its answer being kept.",
    413: "The body is larger than this relay accepts.",
    415: "This path does not accept a body of this type.",
    422: "The `Idempotency-Key` was sent before with another request.",
    429: "Running requests hold the remaining credits, or there are too many requests, repeats or new installs.",
    500: "The relay failed.",
    502: "No backend could serve the request.",
    503: "Redis is unavailable or out of memory, too many decisions wait, or the relay has no memory for the body.",
    504: "The backend did not answer in time.",
}
RETRY_AFTER = frozenset({429, 502, 503, 504})
ALSO_BACKENDS = frozenset({400, 409, 413, 415, 422})  # a backend's own error answer can have these statuses, too
_IDENTITY = (400, 401)
_CREDITS = (*_IDENTITY, 500, 503)
_METERED = (*_CREDITS, 402, 403, 408, 409, 413, 415, 422, 429, 502, 504)


@dataclass(frozen=True, slots=True)
class Operation:
    """The description of one route.

    Attributes:
        summary: one sentence.
        answers: the content of the 200, by media type.
        errors: the statuses with an error object.
        body: the content of the request, by media type.
        parameters: names in `PARAMETERS`.
        identified: whether it needs the identity of the client.
        has_ratelimit: whether the answer has the RateLimit headers.
        metered: whether it costs credits.
        not_ready: whether a 503 has the readiness document.
    """

    summary: str
    answers: Content
    errors: tuple[int, ...] = ()
    body: Content | None = None
    parameters: tuple[str, ...] = ()
    identified: bool = False
    has_ratelimit: bool = False
    metered: bool = False
    not_ready: bool = False


def ref(name: str) -> Schema:
    """Return a reference to a schema of `SCHEMAS`."""
    return {"$ref": f"#/components/schemas/{name}"}


def _metered(summary: str, body: Content, answers: Content | None = None) -> Operation:
    """Describe a metered route. answers: more media types than JSON and a stream."""
    of_backend: Content = {"application/json": {"type": "object"}, "text/event-stream": {}}
    return Operation(
        summary,
        {**of_backend, **(answers or {})},
        _METERED,
        body=body,
        parameters=("idempotencyKey", "creditsEvent"),
        identified=True,
        has_ratelimit=True,
        metered=True,
    )


def _object(properties: Schema, *, required: Iterable[str] | None = None) -> Schema:
    """Describe an object; without `required`, all of its members are always present."""
    names = list(properties) if required is None else list(required)
    return {"type": "object", "properties": properties, "required": names}


def _json_body(**described: str) -> Content:
    """Describe a JSON body that must name a model; the other members are up to the backend."""
    members: Schema = {name: {"description": text} for name, text in described.items()}
    return {"application/json": _object({"model": _MODEL} | members, required=["model"])}


_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_COUNT_OR_NONE: Schema = {"type": ["integer", "null"], "minimum": 0}
_MODEL: Schema = {
    "type": "string",
    "minLength": 1,
    "maxLength": MAX_MODEL_LENGTH,
    "description": "A model that `/v1/models` lists.",
}
_STREAM = "true: the answer is sent as server-sent events."
_FIELD_NAME = r"^[^\x00-\x1f\x7f]*$"  # the only names that a form can contain
_TRANSCRIPTION: Content = {
    "multipart/form-data": _object(
        {"model": _MODEL, "file": {"type": "string", "contentMediaType": "application/octet-stream"}},
        required=["model", "file"],
    )
    | {"propertyNames": {"pattern": _FIELD_NAME}}
}
SCHEMAS: dict[str, Schema] = {
    "Error": _object(
        {
            "type": {"type": "string", "format": "uri", "description": "The kind of problem (RFC 9457)."},
            "title": _TEXT,
            "status": {"type": "integer"},
            "detail": _TEXT,
            "instance": {"type": "string", "description": "Identifies this request, like `X-Request-Id`."},
            "violated-policies": {"type": "array", "items": {"enum": ["credits", "gemini"]}},
            "renews_at": {"type": ["string", "null"], "description": "When the credits renew; null: never."},
            "error": _object({"message": _TEXT, "type": _TEXT, "code": _TEXT, "param": {"type": ["string", "null"]}}),
        },
        required=["type", "title", "status", "detail", "instance", "error"],
    ),
    "BackendRefusal": {"description": "A backend's own error, unchanged: not always an object."},
    "Credits": _object(
        {
            "object": {"const": "credits"},
            "install_id": {"type": "string", "format": "uuid"},
            "tier": _TEXT,
            "capped": {"enum": ["lifetime", "monthly"], "description": "The counter that the tier limits."},
            "quota": _COUNT_OR_NONE | {"description": "null: no limit."},
            "remaining": {"type": ["integer", "null"], "description": "Not yet committed; null: no limit."},
            "gemini_cap": _COUNT_OR_NONE,
            "gemini_remaining": {"type": ["integer", "null"]},
            "held": _COUNT | {"description": "Credits that running requests hold."},
            "renews_at": {"type": ["string", "null"], "description": "null: these credits do not renew."},
        }
    ),
    "Model": _object({"id": _TEXT, "object": {"const": "model"}, "created": {"type": "integer"}, "owned_by": _TEXT}),
    "Models": _object({"object": {"const": "list"}, "data": {"type": "array", "items": ref("Model")}}),
    "Health": _object({"status": {"const": "ok"}}),
    "Readiness": _object(
        {"status": {"enum": ["ready", "unmetered", "not ready"]}, "redis": _TEXT, "backends": {"type": "object"}},
        required=["status"],
    ),
}
HEADERS: Schema = {
    "X-Request-Id": {"required": True, "schema": _TEXT, "description": "The id of the request, and of its hold."},
    "X-Credits-Backend": {
        "schema": {"enum": ["gemini", "hardware"]},
        "description": "The backend that answered.",
    },
    "X-Credits-Unmetered": {
        "schema": {"const": "true"},
        "description": "Only when credits cannot be checked and the operator lets hardware serve without them.",
    },
    "X-Licence": {
        "schema": {"const": "expired"},
        "description": "Only when the licence has expired, so that the install is served as core.",
    },
    "RateLimit-Policy": {
        "schema": _TEXT,
        "description": "Quotas, in the syntax of draft-ietf-httpapi-ratelimit-headers. Absent if there is no limit.",
    },
    "RateLimit": {"schema": _TEXT, "description": "The credits that can still be spent, in the same syntax."},
    "Retry-After": {"required": True, "schema": {"type": "integer", "minimum": 1}, "description": "Seconds."},
    "x-should-retry": {"schema": {"const": "false"}, "description": "Tells SDKs not to retry."},
}
PARAMETERS: Schema = {
    "modelId": {
        "name": "id",
        "in": "path",
        "required": True,
        "schema": {"type": "string", "minLength": 1},
        "description": "A model's `id` in the list; slashes need no escaping.",
    },
    "unmetered": {
        "name": "unmetered",
        "in": "query",
        "required": False,
        "schema": _TEXT,
        "description": "`1`: 200 also while Redis is unavailable and hardware serves unmetered.",
    },
    "idempotencyKey": {
        "name": "Idempotency-Key",
        "in": "header",
        "required": False,
        "schema": {
            "type": "string",
            "anyOf": [
                {"pattern": "^[!#-~]([ -~]*[!-~])?$", "maxLength": 255},
                {"pattern": '^"([ !#-\\[\\]-~]|\\\\["\\\\]){1,255}"$'},
            ],
        },
        "description": "Identifies one request of this install, which is then served and paid for only once.",
    },
    "creditsEvent": {
        "name": "X-Credits-Event",
        "in": "header",
        "required": False,
        "schema": _TEXT,
        "description": "`1`: a stream ends with a comment line with the charge and the remaining credits.",
    },
}
SECURITY: Schema = {
    "installId": {"type": "apiKey", "in": "header", "name": "X-Install-Id", "description": "The install id: a UUID."},
    "licence": {
        "type": "http",
        "scheme": "bearer",
        "bearerFormat": "JWT",
        "description": "A licence, for a tier other than core.",
    },
    "installIdAsToken": {
        "type": "http",
        "scheme": "bearer",
        "description": "The install id, for clients without a licence.",
    },
}
IDENTITIES: list[Schema] = [{"installId": []}, {"installId": [], "licence": []}, {"installIdAsToken": []}]
OPERATIONS: Mapping[Route, Operation] = {
    ("POST", "/v1/chat/completions"): _metered(
        "Chat, on the backend that the credits allow.", _json_body(messages="The conversation.", stream=_STREAM)
    ),
    ("POST", "/v1/completions"): _metered("Complete a text.", _json_body(prompt="The text.", stream=_STREAM)),
    ("POST", "/v1/responses"): _metered("Create a response.", _json_body(input="What to respond to.", stream=_STREAM)),
    ("POST", "/v1/embeddings"): _metered(
        "Embed texts.", _json_body(input="A text, or a list of them.", encoding_format="float or base64.")
    ),
    ("POST", "/v1/audio/transcriptions"): _metered(
        "Transcribe a recording, which is passed on as it arrives.", _TRANSCRIPTION, {"*/*": {}}
    ),
    ("GET", "/v1/models"): Operation(
        "List the models of all backends. It costs nothing.",
        {"application/json": ref("Models")},
        (*_IDENTITY, 502),
        identified=True,
    ),
    ("GET", "/v1/models/{id}"): Operation(
        "Show one model of the list. It costs nothing.",
        {"application/json": ref("Model")},
        (*_IDENTITY, 404, 502),
        parameters=("modelId",),
        identified=True,
    ),
    ("GET", "/v1/credits"): Operation(
        "Show the balance of the client's install. It costs nothing.",
        {"application/json": ref("Credits")},
        _CREDITS,
        identified=True,
        has_ratelimit=True,
    ),
    ("GET", "/healthz"): Operation("Show that the process runs.", {"application/json": ref("Health")}),
    ("GET", "/readyz"): Operation(
        "Show whether requests can be served for credits.",
        {"application/json": ref("Readiness")},
        parameters=("unmetered",),
        not_ready=True,
    ),
    ("GET", "/metrics"): Operation("Show the metrics, in Prometheus' text format.", {"text/plain": _TEXT}),
    ("GET", "/openapi.json"): Operation("Show this description.", {"application/json": {"type": "object"}}),
}
