"""A FastAPI service that charges credits with `CreditLimiter`, without the relay.

Run it in this folder, with fastapi and uvicorn installed:

    uvicorn library_fastapi:app
    curl -i localhost:8000/summaries -H 'X-Install-Id: alice' -H 'Content-Type: text/plain' -d 'First. Second.'
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import FastAPI, Header, HTTPException, Request
from fastapi.responses import JSONResponse

from limiter import CreditLimiter, Decision, InvalidInstallId, LimiterUnavailable, Tiers, connect

TIERS = Tiers.from_mapping({"core": {"lifetime": 3, "max_in_flight": 2}})


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open one client and one limiter for all requests of this process."""
    redis = await connect(os.environ.get("REDIS_URL", "embedded:./data"))
    try:
        app.state.limiter = CreditLimiter(redis, TIERS)
        yield
    finally:
        await redis.aclose()


app = FastAPI(lifespan=lifespan)


@app.post("/summaries")
async def summarise(request: Request, x_install_id: Annotated[str, Header()]) -> dict[str, str]:
    """Summarise a text for one credit: it is debited when the block ends, and returned if the block raises."""
    limiter: CreditLimiter = request.app.state.limiter
    async with limiter.hold(x_install_id, tier="core", has_hardware=True) as hold:
        if not hold.allowed:
            raise refused(hold.decision)
        text = (await request.body()).decode()  # stands for the expensive call
        return {"summary": text.partition(".")[0] + "."}


def refused(decision: Decision) -> HTTPException:
    """Return the answer to a refusal: 429 if a retry will help, else 402."""
    if decision.reason in {"credits_in_flight", "too_many_in_flight"}:
        return HTTPException(429, decision.reason, headers={"Retry-After": "1"})
    return HTTPException(402, decision.reason)


@app.exception_handler(LimiterUnavailable)
async def unavailable(_request: Request, error: Exception) -> JSONResponse:
    """Answer 503 when Redis did not answer: nobody knows whether there are credits, so nothing is served."""
    return JSONResponse({"detail": str(error)}, 503, headers={"Retry-After": "2"})


@app.exception_handler(InvalidInstallId)
async def invalid(_request: Request, error: Exception) -> JSONResponse:
    """Answer 400 to an install id that cannot be part of a Redis key."""
    return JSONResponse({"detail": str(error)}, 400)
