"""What `schemathesis` loads (`SCHEMATHESIS_HOOKS`) when tests/system/test_schemathesis.py runs it."""

import uuid
from typing import Any

import schemathesis
from openapi_schema_validator import OAS31Validator

from limiter.relay.handlers.openapi_schema import PARAMETERS

KEY: Any = PARAMETERS["idempotencyKey"]


@schemathesis.hook
def before_call(_context: object, case: Any, _kwargs: object) -> None:
    """Make each request one of its own: with the same key, another body is rightly a 422."""
    key = (case.headers or {}).get(KEY["name"])
    if key and OAS31Validator(KEY["schema"]).is_valid(key):
        case.headers[KEY["name"]] = f'"{uuid.uuid4()}"' if key.startswith('"') else str(uuid.uuid4())
