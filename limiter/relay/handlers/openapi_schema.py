"""What the OpenAPI description says, as data: error codes, routes, schemas, headers. Nothing is built here.

It is true rather than complete: it says of a body what this relay checks, and leaves the rest to the backends, which
change more often than this.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from limiter.credits.models import Reason

Schema: TypeAlias = dict[str, object]
Content: TypeAlias = dict[str, Schema]  # a schema by media type
Route: TypeAlias = tuple[str, str]  # method, path

# Every code that an error object can have, by the status that it comes with. A test compares it with the program.
CODES: Mapping[int, tuple[str, ...]] = {
    400: (
        "missing_install_id",
        "invalid_install_id",
        "invalid_idempotency_key",
        "invalid_body",
        "invalid_json",
        "missing_model",
        "upgrade_not_offered",
        "unsupported_http_version",
        "malformed_request",
    ),
    401: ("invalid_licence", "unknown_tier"),
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
    429: (Reason.CREDITS_IN_FLIGHT, Reason.TOO_MANY_IN_FLIGHT, "install_mint_limited"),
    431: ("head_too_large",),
    500: ("internal_error", "broken_row"),
    502: ("backend_unavailable",),
    503: ("limiter_unavailable", "limiter_overloaded", "relay_busy"),
    504: ("backend_timeout",),
}
MEANING: Mapping[int, str] = {
    400: "The request cannot be read, or does not say who asks.",
    401: "The licence is not valid here.",
    402: "The credits are used up. Sending it again does not help.",
    403: "As many installs use the licence as it is for.",
    404: "No backend lists a model of this name.",
    408: "The body did not come in time.",
    409: "The same request is being served, or was served and its answer not kept.",
    413: "The body is larger than this relay takes.",
    415: "The body is of another type than this path takes.",
    422: "The `Idempotency-Key` was sent before with another request.",
    429: "The credits are enough, but requests under way hold them; or too many requests or new installs at once.",
    500: "The relay failed.",
    502: "No backend could serve the request.",
    503: "Redis is away, or too many decisions wait for it; or this relay has no memory left for the body.",
    504: "The backend did not answer in time.",
}
RETRY_AFTER = frozenset({429, 502, 503, 504})
ALSO_BACKENDS = frozenset({400, 409, 413, 415, 422})  # statuses with which a backend's own refusal passes, too
_IDENTITY = (400, 401)
_CREDITS = (*_IDENTITY, 500, 503)
_METERED = (*_CREDITS, 402, 403, 408, 409, 413, 415, 422, 429, 502, 504)


@dataclass(frozen=True, slots=True)
class Operation:
    """One route. body: content by type. answers: content of the 200. errors: statuses with the error object.

    parameters: names in `PARAMETERS`. identified: whether it wants to know who asks.
    """

    summary: str
    answers: Content
    errors: tuple[int, ...] = ()
    body: Content | None = None
    parameters: tuple[str, ...] = ()
    identified: bool = False
    credits_told: bool = False
    metered: bool = False
    not_ready: bool = False


def ref(name: str) -> Schema:
    """Point to a schema of `SCHEMAS`."""
    return {"$ref": f"#/components/schemas/{name}"}


def _metered(summary: str, body: Content, answers: Content | None = None) -> Operation:
    """Describe a route that costs credits; answers: beside JSON and a stream."""
    of_backend: Content = {"application/json": {"type": "object"}, "text/event-stream": {}}
    return Operation(
        summary,
        {**of_backend, **(answers or {})},
        _METERED,
        body=body,
        parameters=("idempotencyKey", "creditsEvent"),
        identified=True,
        credits_told=True,
        metered=True,
    )


def _object(properties: Schema, *, required: Iterable[str] | None = None) -> Schema:
    """Describe an object; without `required`, all of its members always are there."""
    names = list(properties) if required is None else list(required)
    return {"type": "object", "properties": properties, "required": names}


def _asked(**described: str) -> Content:
    """Describe a JSON body that must name a model; what the other members may be is the backend's business."""
    members: Schema = {name: {"description": text} for name, text in described.items()}
    return {"application/json": _object({"model": _MODEL} | members, required=["model"])}


_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_COUNT_OR_NONE: Schema = {"type": ["integer", "null"], "minimum": 0}
_MODEL: Schema = {"type": "string", "description": "A model that `/v1/models` lists."}
_STREAM = "true: the answer comes as server-sent events."
_FIELD_NAME = r"^[^\x00-\x1f\x7f]*$"  # a form can carry no others
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
            "type": {"type": "string", "format": "uri", "description": "What kind of problem it is (RFC 9457)."},
            "title": _TEXT,
            "status": {"type": "integer"},
            "detail": _TEXT,
            "instance": {"type": "string", "description": "Names this request, as `X-Request-Id` does."},
            "violated-policies": {"type": "array", "items": {"enum": ["credits", "gemini"]}},
            "renews_at": {"type": ["string", "null"], "description": "When there are credits again; null for never."},
            "error": _object({"message": _TEXT, "type": _TEXT, "code": _TEXT, "param": {"type": ["string", "null"]}}),
        },
        required=["type", "title", "status", "detail", "instance", "error"],
    ),
    "BackendRefusal": {"description": "A backend's own error, as it wrote it: not always an object."},
    "Credits": _object(
        {
            "object": {"const": "credits"},
            "install_id": {"type": "string", "format": "uuid"},
            "tier": _TEXT,
            "capped": {"enum": ["lifetime", "monthly"], "description": "Which of its counters the tier goes by."},
            "quota": _COUNT_OR_NONE | {"description": "null: no limit."},
            "remaining": {"type": ["integer", "null"], "description": "Not yet committed; null: no limit."},
            "gemini_cap": _COUNT_OR_NONE,
            "gemini_remaining": {"type": ["integer", "null"]},
            "held": _COUNT | {"description": "Credits that requests under way hold."},
            "renews_at": {"type": ["string", "null"], "description": "null: these credits do not renew."},
        }
    ),
    "Model": _object({"id": _TEXT, "object": {"const": "model"}, "created": {"type": "integer"}, "owned_by": _TEXT}),
    "Models": _object({"object": {"const": "list"}, "data": {"type": "array", "items": ref("Model")}}),
    "Health": _object({"status": {"const": "ok"}}),
    "Readiness": _object(
        {"status": {"enum": ["ready", "unmetered", "not ready"]}, "redis": _TEXT, "backends": {"type": "object"}}
    ),
}
HEADERS: Schema = {
    "X-Request-Id": {"required": True, "schema": _TEXT, "description": "Names the request, and its hold."},
    "X-Credits-Backend": {
        "schema": {"enum": ["gemini", "hardware"]},
        "description": "The backend that answered.",
    },
    "X-Credits-Unmetered": {
        "schema": {"const": "true"},
        "description": "Only when credits cannot be checked and the operator lets hardware serve all the same.",
    },
    "X-Licence": {"schema": {"const": "expired"}, "description": "Only when a licence has expired: served as core."},
    "RateLimit-Policy": {
        "schema": _TEXT,
        "description": "Quotas, as draft-ietf-httpapi-ratelimit-headers has it. Absent where there is no limit.",
    },
    "RateLimit": {"schema": _TEXT, "description": "What can still be spent, in the same syntax."},
    "Retry-After": {"required": True, "schema": {"type": "integer", "minimum": 1}, "description": "Seconds."},
    "x-should-retry": {"schema": {"const": "false"}, "description": "Tells SDKs that another try is no use."},
}
PARAMETERS: Schema = {
    "modelId": {
        "name": "id",
        "in": "path",
        "required": True,
        "schema": {"type": "string", "minLength": 1},
        "description": "A model's `id` in the list; its slashes may stand as they are.",
    },
    "unmetered": {
        "name": "unmetered",
        "in": "query",
        "required": False,
        "schema": _TEXT,
        "description": "`1`: 200 also while hardware serves unmetered, as Redis is away.",
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
        "description": "Names one request of this install, which is then served and paid for once.",
    },
    "creditsEvent": {
        "name": "X-Credits-Event",
        "in": "header",
        "required": False,
        "schema": _TEXT,
        "description": "`1`: a stream ends with a comment line that tells what was charged and what remains.",
    },
}
SECURITY: Schema = {
    "installId": {"type": "apiKey", "in": "header", "name": "X-Install-Id", "description": "Who asks: a UUID."},
    "licence": {
        "type": "http",
        "scheme": "bearer",
        "bearerFormat": "JWT",
        "description": "For another tier than core.",
    },
    "installIdAsToken": {
        "type": "http",
        "scheme": "bearer",
        "description": "The install id, where there is no licence.",
    },
}
IDENTITIES: list[Schema] = [{"installId": []}, {"installId": [], "licence": []}, {"installIdAsToken": []}]
OPERATIONS: Mapping[Route, Operation] = {
    ("POST", "/v1/chat/completions"): _metered(
        "Chat, on whichever backend the credits allow.", _asked(messages="The conversation.", stream=_STREAM)
    ),
    ("POST", "/v1/completions"): _metered("Complete a text.", _asked(prompt="The text.", stream=_STREAM)),
    ("POST", "/v1/responses"): _metered("Make a response.", _asked(input="What to respond to.", stream=_STREAM)),
    ("POST", "/v1/embeddings"): _metered(
        "Embed texts.", _asked(input="A text, or a list of them.", encoding_format="float or base64.")
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
        "Tell the caller's own balance. It costs nothing.",
        {"application/json": ref("Credits")},
        _CREDITS,
        identified=True,
        credits_told=True,
    ),
    ("GET", "/healthz"): Operation("Tell that the process runs.", {"application/json": ref("Health")}),
    ("GET", "/readyz"): Operation(
        "Tell whether requests can be served for credits.",
        {"application/json": ref("Readiness")},
        parameters=("unmetered",),
        not_ready=True,
    ),
    ("GET", "/metrics"): Operation("Show the metrics, in Prometheus' text format.", {"text/plain": _TEXT}),
    ("GET", "/openapi.json"): Operation("Show this description.", {"application/json": {"type": "object"}}),
}
