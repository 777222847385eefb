"""A JSON document as a response."""

from collections.abc import Mapping

import orjson
from aiohttp import web


def json_response(
    document: Mapping[str, object],
    *,
    status: int = 200,
    content_type: str = "application/json",
    headers: Mapping[str, str] | None = None,
) -> web.Response:
    """Return a response whose body is the document."""
    return web.Response(status=status, body=orjson.dumps(document), content_type=content_type, headers=headers)
