"""The least that a relay in Python can be, as a process: aiohttp on uvloop, which sends on what it gets, and back.

    python -m benchmarks.aiohttp_passthrough BACKEND_URL

It prints its port.
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable

import aiohttp
import uvloop
from aiohttp import web


async def main(backend: str) -> None:
    """Serve until the process is ended."""
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=1000), cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False
    ) as session:

        async def pass_on(request: web.Request) -> web.StreamResponse:
            body = await request.read()
            headers = {"Content-Type": request.headers["Content-Type"]}
            async with session.post(backend + request.path, data=body, headers=headers) as answer:
                kind = answer.headers["Content-Type"]
                if kind != "text/event-stream":
                    return web.Response(status=answer.status, body=await answer.read(), headers={"Content-Type": kind})
                response = web.StreamResponse(status=answer.status, headers={"Content-Type": kind})
                await response.prepare(request)
                async for chunk in answer.content.iter_any():
                    await response.write(chunk)
                await response.write_eof()
                return response

        await serve(pass_on)


async def serve(handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> None:
    """Serve each POST by a handler until the process is ended, and print the port."""
    app = web.Application()
    app.router.add_post("/{path:.*}", handler)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1]))
