"""The built-in echo backend: a small OpenAI-compatible server on a loopback port, for trying the relay out.

It stands in for both backends when none is set, and is reached like them, over HTTP.
"""

import base64
import hashlib
import struct
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import orjson
from aiohttp import web

_DIMENSIONS = 8


@asynccontextmanager
async def echo_server() -> AsyncIterator[str]:
    """Run the echo until the block ends; gives its base URL."""
    app = web.Application()
    app.router.add_post("/v1/chat/completions", _chat)
    app.router.add_post("/v1/embeddings", _embeddings)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port = runner.addresses[0][1]
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        await runner.cleanup()


async def _chat(request: web.Request) -> web.StreamResponse:
    document = orjson.loads(await request.read())
    text = _last_text(document)
    head = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": str(document.get("model", "echo")),
    }
    if document.get("stream") is True:
        return await _stream(request, head, text)
    words = len(text.split())
    answer = head | {
        "object": "chat.completion",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": words, "completion_tokens": words, "total_tokens": 2 * words},
    }
    return web.Response(body=orjson.dumps(answer), content_type="application/json")


async def _stream(request: web.Request, head: dict[str, object], text: str) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    await response.prepare(request)
    deltas: list[dict[str, str]] = [{"role": "assistant", "content": ""}]
    deltas += [{"content": word} for word in text.replace(" ", " \0").split("\0")]
    for delta in deltas:
        await response.write(_event(head, delta, None))
    await response.write(_event(head, {}, "stop"))
    await response.write(b"data: [DONE]\n\n")
    await response.write_eof()
    return response


def _event(head: dict[str, object], delta: dict[str, str], finish_reason: str | None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return b"data: " + orjson.dumps(head | {"object": "chat.completion.chunk", "choices": [choice]}) + b"\n\n"


def _last_text(document: dict[str, object]) -> str:
    """Give the text of the last message; of its parts, if it comes in parts."""
    messages = document.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    content = last.get("content") if isinstance(last, dict) else None
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return str(content) if content is not None else ""


async def _embeddings(request: web.Request) -> web.Response:
    document = orjson.loads(await request.read())
    given = document.get("input", "")
    texts = given if isinstance(given, list) else [given]
    packed = document.get("encoding_format") == "base64"
    data = [
        {"object": "embedding", "index": index, "embedding": _pack(vector) if packed else vector}
        for index, vector in enumerate(_vector(str(text)) for text in texts)
    ]
    usage = {"prompt_tokens": len(texts), "total_tokens": len(texts)}
    answer = {"object": "list", "model": str(document.get("model", "echo")), "data": data, "usage": usage}
    return web.Response(body=orjson.dumps(answer), content_type="application/json")


def _vector(text: str) -> list[float]:
    """Make a unit vector of a text: the same text gives the same vector."""
    raw = [byte - 127.5 for byte in hashlib.sha256(text.encode()).digest()[:_DIMENSIONS]]
    length = sum(value * value for value in raw) ** 0.5
    return [value / length for value in raw]


def _pack(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
