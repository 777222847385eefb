"""The built-in echo backend: a small OpenAI-compatible server on a loopback port, for trying the relay out.

It replaces both backends if none is configured, and is called like them, over HTTP.
"""

import base64
import hashlib
import struct
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager

import orjson
from aiohttp import BodyPartReader, web
from aiohttp.http_exceptions import HttpProcessingError

_DIMENSIONS = 8
_MAX_BODY = 1 << 40


@asynccontextmanager
async def echo_server() -> AsyncIterator[str]:
    """Run the echo server until the block ends; yields its base URL."""
    app = web.Application(client_max_size=_MAX_BODY)  # the relay has limits of its own
    app.router.add_post("/v1/chat/completions", _chat)
    app.router.add_post("/v1/completions", _completions)
    app.router.add_post("/v1/responses", _responses)
    app.router.add_post("/v1/embeddings", _embeddings)
    app.router.add_post("/v1/audio/transcriptions", _transcriptions)
    app.router.add_get("/v1/models", _models)
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
        deltas = [{"role": "assistant", "content": ""}, *({"content": word} for word in _words(text))]
        choices: list[object] = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
        choices.append({"index": 0, "delta": {}, "finish_reason": "stop"})
        chunks = [head | {"object": "chat.completion.chunk", "choices": [choice]} for choice in choices]
        return await _stream(request, [*map(_data, chunks), b"data: [DONE]\n\n"])
    words = len(text.split())
    answer = head | {
        "object": "chat.completion",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": words, "completion_tokens": words, "total_tokens": 2 * words},
    }
    return _json(answer)


async def _completions(request: web.Request) -> web.StreamResponse:
    document = orjson.loads(await request.read())
    prompt = document.get("prompt", "")
    text = str(prompt[0] if isinstance(prompt, list) and prompt else prompt)
    head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time())}
    head["model"] = str(document.get("model", "echo"))
    if document.get("stream") is True:
        choices = [{"index": 0, "text": word, "logprobs": None, "finish_reason": None} for word in _words(text)]
        choices.append({"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"})
        chunks = [_data(head | {"choices": [choice]}) for choice in choices]
        return await _stream(request, [*chunks, b"data: [DONE]\n\n"])
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": "stop"}
    count = len(text.split())
    usage = {"prompt_tokens": count, "completion_tokens": count, "total_tokens": 2 * count}
    return _json(head | {"choices": [choice], "usage": usage})


async def _responses(request: web.Request) -> web.StreamResponse:
    document = orjson.loads(await request.read())
    given = document.get("input", "")
    text = _last_text({"messages": given}) if isinstance(given, list) else str(given)
    part = {"type": "output_text", "text": text, "annotations": []}
    item = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "status": "completed"}
    answer: dict[str, object] = {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "model": str(document.get("model", "echo")),
        "status": "completed",
        "output": [item | {"content": [part]}],
        "parallel_tool_calls": False,
        "tool_choice": "auto",
        "tools": [],
    }
    if document.get("stream") is not True:
        return _json(answer)
    at = {"item_id": item["id"], "output_index": 0, "content_index": 0}
    begun = item | {"status": "in_progress", "content": []}
    events: list[dict[str, object]] = [
        {"type": "response.created", "response": answer | {"status": "in_progress", "output": []}},
        {"type": "response.output_item.added", "output_index": 0, "item": begun},
        {"type": "response.content_part.added", "part": part | {"text": ""}, **at},
        *({"type": "response.output_text.delta", "delta": word, "logprobs": [], **at} for word in _words(text)),
        {"type": "response.output_text.done", "text": text, "logprobs": [], **at},
        {"type": "response.content_part.done", "part": part, **at},
        {"type": "response.output_item.done", "output_index": 0, "item": item | {"content": [part]}},
        {"type": "response.completed", "response": answer},
    ]
    numbered = (event | {"sequence_number": number} for number, event in enumerate(events))
    return await _stream(request, [b"event: %s\n" % str(event["type"]).encode() + _data(event) for event in numbered])


async def _transcriptions(request: web.Request) -> web.Response:
    """Respond with the size of the file, as nothing here can transcribe it."""
    size = 0
    try:
        async for part in await request.multipart():
            if isinstance(part, BodyPartReader) and part.name == "file":
                while chunk := await part.read_chunk():
                    size += len(chunk)
    except (ValueError, HttpProcessingError) as error:
        raise web.HTTPBadRequest(text="The body is not a valid form.") from error
    return _json({"text": f"{size} bytes"})


async def _models(_request: web.Request) -> web.Response:
    echo = {"id": "echo", "object": "model", "created": 0, "owned_by": "limiter"}
    return _json({"object": "list", "data": [echo]})


async def _stream(request: web.Request, events: Iterable[bytes]) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    await response.prepare(request)
    for event in events:
        await response.write(event)
    await response.write_eof()
    return response


def _data(document: Mapping[str, object]) -> bytes:
    return b"data: " + orjson.dumps(document) + b"\n\n"


def _json(document: Mapping[str, object]) -> web.Response:
    return web.Response(body=orjson.dumps(document), content_type="application/json")


def _words(text: str) -> list[str]:
    return text.replace(" ", " \0").split("\0")


def _last_text(document: dict[str, object]) -> str:
    """Return the text of the last message, joined if it is in parts."""
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
    return _json(answer)


def _vector(text: str) -> list[float]:
    """Return a unit vector that depends on the text only."""
    raw = [byte - 127.5 for byte in hashlib.sha256(text.encode()).digest()[:_DIMENSIONS]]
    length = sum(value * value for value in raw) ** 0.5
    return [value / length for value in raw]


def _pack(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
