"""What `schemathesis` loads (`SCHEMATHESIS_HOOKS`) when tests/test_schemathesis.py runs it."""

import uuid
from typing import Any

import schemathesis

KEY = "Idempotency-Key"
_SHORTEST, _LONGEST = 1, 255


@schemathesis.hook
def before_call(_context: object, case: Any, _kwargs: object) -> None:
    """Make each request one of its own: with the same key, another body is rightly a 422."""
    key = (case.headers or {}).get(KEY)
    if isinstance(key, str) and key.isascii() and key.isprintable() and _SHORTEST <= len(key.strip()) <= _LONGEST:
        quoted = key.startswith('"') and key.endswith('"') and "\\" not in key and key.count('"') == 2
        if quoted or not key.startswith('"'):
            case.headers[KEY] = f'"{uuid.uuid4()}"' if quoted else str(uuid.uuid4())
