"""A backend that fails at random, as a process: it remembers whom it may have served.

    python -m tests.support.flaky_backend

A request names itself in OpenAI's member `user`. Its name is noted down, to be seen at `/delivered`, before the first
body byte of a stream or all of a whole answer is sent: whoever is not there was served nothing.
"""

import asyncio
import json
import random

import uvloop
from aiohttp import web

from tests.support.openai_backend import CHUNK, chat

_TROUBLE = 0.35  # the share of the calls that go wrong, of each kind alike


class Flaky:
    """Its state: the names of the requests that it may have served."""

    def __init__(self) -> None:
        self.delivered: set[str] = set()

    async def serve(self, request: web.Request) -> web.StreamResponse:
        asked = json.loads(await request.read())
        kinds = (self._refuse, self._hang, self._break_before, self._break_inside)
        behave = random.choice(kinds) if random.random() < _TROUBLE else self._answer
        try:
            return await behave(request, asked)
        except ConnectionError:  # the relay left; aiohttp's traceback of that would hide others
            return web.Response()

    async def _answer(self, request: web.Request, asked: dict[str, object]) -> web.StreamResponse:
        if random.random() < 0.3:
            await asyncio.sleep(random.random() * 0.2)
        if not asked.get("stream"):
            self._note(asked)
            return web.json_response(chat("Hello"))
        response = await self._begin(request, asked)
        for number in range(random.randint(1, 8)):
            await asyncio.sleep(random.random() * 0.02)
            await response.write(CHUNK % number)
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    async def _refuse(self, _request: web.Request, _asked: dict[str, object]) -> web.StreamResponse:
        error = {"message": "no", "type": "invalid_request_error", "code": None, "param": None}
        return web.json_response({"error": error}, status=random.choice((400, 429, 500, 503)))

    async def _hang(self, request: web.Request, asked: dict[str, object]) -> web.StreamResponse:
        """Say nothing, or a first chunk and then nothing."""
        if asked.get("stream") and random.random() < 0.5:
            await self._begin(request, asked)
        await asyncio.Event().wait()
        raise AssertionError("not reached")

    async def _break_before(self, request: web.Request, _asked: dict[str, object]) -> web.StreamResponse:
        assert request.transport
        if random.random() < 0.5:
            request.transport.write(b"HTTP/1.1 200 OK\r\nContent-Ty")
        request.transport.close()
        return web.Response()

    async def _break_inside(self, request: web.Request, asked: dict[str, object]) -> web.StreamResponse:
        """Break off after the first chunk of a stream, or within a whole answer, which then is none."""
        assert request.transport
        if asked.get("stream"):
            response = await self._begin(request, asked)
        else:
            response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": "1000"})
            await response.prepare(request)
            await response.write(b'{"id":')
        request.transport.close()
        return response

    async def _begin(self, request: web.Request, asked: dict[str, object]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        self._note(asked)
        await response.write(CHUNK % 0)
        return response

    def _note(self, asked: dict[str, object]) -> None:
        self.delivered.add(str(asked["user"]))

    async def show(self, _request: web.Request) -> web.Response:
        return web.json_response(sorted(self.delivered))


async def main() -> None:
    """Serve on a free port, whose number is printed, until the process is ended."""
    flaky = Flaky()
    app = web.Application()
    app.router.add_get("/delivered", flaky.show)
    app.router.add_post("/v1/{path:.*}", flaky.serve)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(runner.addresses[0][1], flush=True)  # noqa: T201  what the starter waits for
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())
