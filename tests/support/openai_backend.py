"""An OpenAI-compatible server of the tests' own, in this process or as one.

    python -m tests.support.openai_backend --port 0

The model name says how it behaves, as `WORD` or `WORD:ARGUMENT:…` (see `_BEHAVIOURS`); any other name is answered as
it should be. It keeps what it received, and shows it at `/seen`; of an upload only its start, its size and its hash.
"""

import argparse
import asyncio
import gzip
import hashlib
import json
import re
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson
from aiohttp import hdrs, web
from multidict import CIMultiDict

CHUNK = (
    b'data: {"id":"c1","object":"chat.completion.chunk","created":1,"model":"m",'
    b'"choices":[{"index":0,"delta":{"content":"w%d "}}]}\n\n'
)
Document = dict[str, Any]
_KEPT_OF_UPLOADS = 65_536


@dataclass
class Seen:
    """One request as it came. `gone_s`: when the client hung up, on the monotonic clock; `sent`: body bytes so far."""

    path: str
    headers: CIMultiDict[str]
    body: bytes
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    gone_s: float | None = None
    sent: int = 0
    received: int = 0
    sha256: str = ""

    @property
    def document(self) -> Document:
        document: Document = orjson.loads(self.body)
        return document

    @property
    def model(self) -> str:
        if not self.body:
            return ""
        if self.headers.get(hdrs.CONTENT_TYPE, "").startswith("multipart/"):
            field = re.search(rb'name="model"[^\r\n]*\r\n\r\n([^\r\n]*)\r\n--', self.body)
            return field[1].decode() if field else ""
        return str(self.document.get("model"))

    def as_dict(self) -> Document:
        return {
            "path": self.path,
            "headers": [list(item) for item in self.headers.items()],
            "body": self.body.decode(errors="replace"),
            "gone_s": self.gone_s,
            "sent": self.sent,
            "received": self.received,
            "sha256": self.sha256,
        }


class Backend:
    """The server's state: what it has seen, and when it was told to let the waiting go on."""

    def __init__(self) -> None:
        self.url = ""
        self.models = ["m"]
        self.seen: list[Seen] = []
        self.arrived = asyncio.Event()  # set at each request; the test clears it
        self.go_on = asyncio.Event()  # what `wait` waits for
        self.always = ""  # how to behave whatever the request says, before its body is read
        self.refusal: tuple[int, object] = (400, "")  # what `refuse` answers
        self.reads = asyncio.Event()  # without it no upload is read
        self.reads.set()

    @property
    def last(self) -> Seen:
        return self.seen[-1]

    def app(self) -> web.Application:
        app = web.Application(client_max_size=256 << 20)
        app.router.add_get("/seen", self._show)
        app.router.add_post("/v1/{path:.*}", self._serve)
        app.router.add_get("/v1/models", self._serve)
        return app

    async def _show(self, _request: web.Request) -> web.Response:
        return web.json_response([seen.as_dict() for seen in self.seen])

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        seen = Seen(request.path, CIMultiDict(request.headers), b"")
        self.seen.append(seen)
        try:
            if not self.always:
                await self._receive(request, seen)
            self.arrived.set()
            word, *arguments = (self.always or seen.model).split(":")
            return await _BEHAVIOURS.get(word, _answer)(Call(self, request, seen, arguments))
        except (asyncio.CancelledError, ConnectionError):
            seen.gone_s = time.monotonic()
            seen.gone.set()
            raise

    async def _receive(self, request: web.Request, seen: Seen) -> None:
        if request.content_type != "multipart/form-data":
            seen.body = await request.read()
            return
        await self.reads.wait()
        digest = hashlib.sha256()
        async for chunk in request.content.iter_any():
            digest.update(chunk)
            seen.received += len(chunk)
            if len(seen.body) < _KEPT_OF_UPLOADS:
                seen.body += chunk
        seen.sha256 = digest.hexdigest()


@dataclass
class Call:
    """One request on its way: what a behaviour works with."""

    backend: Backend
    request: web.Request
    seen: Seen
    arguments: list[str]

    def number(self, index: int, default: float) -> float:
        return float(self.arguments[index]) if len(self.arguments) > index else default

    async def begin(self, content_type: str, **headers: str) -> web.StreamResponse:
        response = web.StreamResponse(headers={hdrs.CONTENT_TYPE: content_type, **headers})
        await response.prepare(self.request)
        return response

    async def write(self, response: web.StreamResponse, data: bytes) -> None:
        await response.write(data)
        self.seen.sent += len(data)

    def raw(self, data: bytes) -> None:
        assert self.request.transport
        self.request.transport.write(data)

    def hang_up(self) -> web.Response:
        assert self.request.transport
        self.request.transport.close()
        return web.Response()


def chat(text: str, model: str = "m") -> Document:
    """What a complete chat answer looks like."""
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": model,
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }


async def _answer(call: Call) -> web.StreamResponse:
    if call.seen.path.endswith("/embeddings"):
        data = [{"object": "embedding", "index": 0, "embedding": [0.6, -0.8]}]
        usage = {"prompt_tokens": 1, "total_tokens": 1}
        return web.json_response({"object": "list", "model": "m", "data": data, "usage": usage})
    if call.seen.path.endswith("/models"):
        models = [{"id": name, "object": "model", "created": 7, "owned_by": "tests"} for name in call.backend.models]
        return web.json_response({"object": "list", "data": [*models, {"odd": True}], "secret": "of the operator"})
    if call.seen.path.endswith("/transcriptions"):
        return web.json_response({"text": f"{call.seen.received} bytes"})
    if call.seen.document.get("stream") is True:
        call.arguments = ["3", "0"]
        return await _stream(call)
    return web.json_response(chat("Hello"))


async def _stream(call: Call) -> web.StreamResponse:
    """`stream:N:GAP_S`: N chunks, with a comment first, blank lines between and [DONE] last."""
    response = await call.begin("text/event-stream; charset=utf-8")
    await call.write(response, b": a comment\n\n")
    for number in range(int(call.number(0, 3))):
        await call.write(response, CHUNK % number + b"\n")
        await asyncio.sleep(call.number(1, 0))
    await call.write(response, b"data: [DONE]\n\n")
    await response.write_eof()
    return response


async def _stepwise(call: Call) -> web.StreamResponse:
    """`stepwise`: one chunk, then the next when the test says so."""
    response = await call.begin("text/event-stream")
    await call.write(response, CHUNK % 0)
    await call.backend.go_on.wait()
    await call.write(response, CHUNK % 1 + b"data: [DONE]\n\n")
    await response.write_eof()
    return response


async def _status(call: Call) -> web.StreamResponse:
    """`status:CODE:RETRY_AFTER`: an error in OpenAI's form that quotes the Authorization header, as some servers do."""
    status, headers = int(call.arguments[0]), {}
    if len(call.arguments) > 1:
        headers[hdrs.RETRY_AFTER] = call.arguments[1]
    quoted = call.seen.headers.get(hdrs.AUTHORIZATION, "nothing")
    error = {"message": f"no: you sent {quoted}", "type": "invalid_request_error", "code": "bad", "param": None}
    return web.json_response({"error": error}, status=status, headers=headers)


async def _refuse(call: Call) -> web.StreamResponse:
    """`refuse`: what the test put into `refusal`: a status and a document, a text, or None for one without an end."""
    status, document = call.backend.refusal
    if document is None:
        response = web.StreamResponse(status=status)
        await response.prepare(call.request)
        await response.write(b"[")
        return await _hang(call)
    return (
        web.Response(status=status, text=document)
        if isinstance(document, str)
        else web.json_response(document, status=status)
    )


async def _packed_status(call: Call) -> web.StreamResponse:
    """`packed-status:PACKING`: the same as a 400, packed, and called so."""
    packing = call.arguments[0]
    text = json.dumps({"error": {"message": f"no: you sent {call.seen.headers.get(hdrs.AUTHORIZATION)}"}}).encode()
    body = gzip.compress(text) if packing == "gzip" else zlib.compress(text)
    return web.Response(
        status=400, body=body, headers={hdrs.CONTENT_ENCODING: packing, hdrs.CONTENT_TYPE: "application/json"}
    )


async def _bad_request(_call: Call) -> web.StreamResponse:
    error = {"message": "max_tokens is too large", "type": "invalid_request_error", "code": None, "param": "max_tokens"}
    return web.json_response({"error": error}, status=400)


async def _redirect(_call: Call) -> web.StreamResponse:
    return web.Response(status=302, headers={hdrs.LOCATION: "/seen"})


async def _slow(call: Call) -> web.StreamResponse:
    """`slow:SECONDS`: the first byte comes late."""
    await asyncio.sleep(call.number(0, 1))
    return await _answer(call)


async def _wait(call: Call) -> web.StreamResponse:
    """`wait`: answers when the test says so."""
    await call.backend.go_on.wait()
    return await _answer(call)


async def _hang(_call: Call) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError("not reached")


async def _hang_inside(call: Call) -> web.StreamResponse:
    """`hang-inside`: the head and half of a JSON body, then nothing."""
    response = await call.begin("application/json", **{"Content-Length": "1000"})
    await call.write(response, b'{"id":')
    return await _hang(call)


async def _break_before(call: Call) -> web.StreamResponse:
    return call.hang_up()


async def _break_head(call: Call) -> web.StreamResponse:
    call.raw(b"HTTP/1.1 200 OK\r\nContent-Ty")
    return call.hang_up()


async def _break_body(call: Call) -> web.StreamResponse:
    """`break-body:BYTES`: half of a JSON body of so many bytes."""
    size = int(call.number(0, 1000))
    response = await call.begin("application/json", **{"Content-Length": str(size)})
    await call.write(response, b'{"id": "' + b"x" * (size // 2))
    return call.hang_up()


async def _break_stream(call: Call) -> web.StreamResponse:
    response = await call.begin("text/event-stream")
    await call.write(response, CHUNK % 0)
    return call.hang_up()


async def _error_behind_200(call: Call) -> web.StreamResponse:
    """`error-200`: an error with status 200, as a stream if that was asked for."""
    error = {"error": {"message": "overloaded", "type": "server_error", "code": 503}}
    if call.seen.document.get("stream") is not True:
        return web.json_response(error)
    response = await call.begin("text/event-stream")
    await call.write(response, b": ping\n\ndata: " + json.dumps(error).encode() + b"\n\ndata: [DONE]\n\n")
    await response.write_eof()
    return response


async def _pings(call: Call) -> web.StreamResponse:
    """`pings:N:GAP_S`: comments, and then what a stream has."""
    response = await call.begin("text/event-stream")
    for _ in range(int(call.number(0, 3))):
        await call.write(response, b": ping\n\n")
        await asyncio.sleep(call.number(1, 0))
    await call.write(response, CHUNK % 0 + b"data: [DONE]\n\n")
    await response.write_eof()
    return response


async def _bad_chunk(call: Call) -> web.StreamResponse:
    """`bad-chunk`: a stream that turns into what is no chunked encoding."""
    response = await call.begin("text/event-stream")
    await call.write(response, CHUNK % 0)
    await asyncio.sleep(0.05)  # in one segment with it, the good chunk would never be seen
    call.raw(b"no chunk size\r\n\r\n")
    return call.hang_up()


async def _empty(_call: Call) -> web.StreamResponse:
    return web.Response(status=200, content_type="application/json")


async def _gzip(call: Call) -> web.StreamResponse:
    body = gzip.compress(json.dumps(chat("packed")).encode(), mtime=0)
    call.seen.sent = len(body)
    return web.Response(body=body, headers={hdrs.CONTENT_TYPE: "application/json", hdrs.CONTENT_ENCODING: "gzip"})


async def _gzip_stream(call: Call) -> web.StreamResponse:
    """`gzip-stream`: what `stream:2` sends, packed."""
    text = b": a comment\n\n" + b"".join(CHUNK % number + b"\n" for number in range(2)) + b"data: [DONE]\n\n"
    response = await call.begin("text/event-stream", **{"Content-Encoding": "gzip"})
    await call.write(response, gzip.compress(text, mtime=0))
    await response.write_eof()
    return response


async def _gzip_broken(call: Call) -> web.StreamResponse:
    """`gzip-broken`: a packed stream that breaks off after its first chunk."""
    response = await call.begin("text/event-stream", **{"Content-Encoding": "gzip"})
    await call.write(response, gzip.compress(CHUNK % 0, mtime=0)[:40])
    return call.hang_up()


async def _huge(call: Call) -> web.StreamResponse:
    """`huge:BYTES`: one big JSON answer."""
    return web.json_response(chat("y" * int(call.number(0, 3 << 20))))


async def _pour(call: Call) -> web.StreamResponse:
    """`pour:TYPE`: a body without an end, as fast as it is taken."""
    response = await call.begin("text/event-stream" if call.arguments == ["stream"] else "application/json")
    while True:
        await call.write(response, b"data: " + b"z" * 65_536 + b"\n\n")


async def _dribble(call: Call) -> web.StreamResponse:
    """`dribble:GAP_S`: a head that comes byte by byte and never ends."""
    call.raw(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    while True:
        await asyncio.sleep(call.number(0, 0.02))
        if call.request.transport is None:
            raise ConnectionResetError
        call.raw(b"a")


async def _switch(call: Call) -> web.StreamResponse:
    call.raw(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: odd\r\nConnection: Upgrade\r\n\r\nodd")
    return await _hang(call)


async def _odd_headers(call: Call) -> web.StreamResponse:
    """`odd-headers`: a header that is no ASCII, among those that are passed on."""
    body = json.dumps(chat("odd")).encode()
    call.raw(
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nOpenAI-Version: \xff\xfe\r\nSet-Cookie: a=b\r\n"
        b"Server: secret-server\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    return call.hang_up()


_BEHAVIOURS: dict[str, Callable[[Call], Awaitable[web.StreamResponse]]] = {
    "bad-chunk": _bad_chunk,
    "bad-request": _bad_request,
    "break-before": _break_before,
    "break-body": _break_body,
    "break-head": _break_head,
    "break-stream": _break_stream,
    "dribble": _dribble,
    "empty": _empty,
    "error-200": _error_behind_200,
    "gzip": _gzip,
    "gzip-broken": _gzip_broken,
    "gzip-stream": _gzip_stream,
    "hang": _hang,
    "hang-inside": _hang_inside,
    "huge": _huge,
    "odd-headers": _odd_headers,
    "packed-status": _packed_status,
    "pings": _pings,
    "pour": _pour,
    "redirect": _redirect,
    "refuse": _refuse,
    "slow": _slow,
    "status": _status,
    "stepwise": _stepwise,
    "stream": _stream,
    "switch": _switch,
    "wait": _wait,
}


@asynccontextmanager
async def running_backend(port: int = 0) -> AsyncIterator[Backend]:
    """Run one in this process."""
    backend = Backend()
    runner = web.AppRunner(backend.app(), handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port).start()
        backend.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        yield backend
    finally:
        await runner.cleanup()


async def _main(port: int) -> None:
    async with running_backend(port) as backend:
        print(backend.url.split(":")[2].split("/")[0], flush=True)  # noqa: T201  what the starter waits for
        await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    asyncio.run(_main(parser.parse_args().port))
