"""One process that makes decisions as fast as it can; `benchmarks.decisions` starts it and reads its one line.

    python -m benchmarks.decision_worker HOW URL MIX TASKS SECONDS

HOW: `debit` and `reserve` are ours, `evalsha` is redis-py running our debit script, `limits` is that package's fixed
window. MIX: `hot` is one install, `uniform` and `zipf` are 10,000. TASKS: how many decide at once.
"""

import asyncio
import json
import random
import sys
import time
from collections.abc import Awaitable, Callable
from itertools import accumulate, cycle

import uvloop

from limiter import CreditLimiter, Tiers, connect
from limiter.redis.lua_source import compose

INSTALLS = 10_000
MANY = 1_000_000_000
TIERS = Tiers.from_mapping({"core": {"lifetime": MANY}, "pro": {"monthly": MANY, "gemini_cap": MANY}})
Decide = Callable[[str], Awaitable[object]]


def mixed(mix: str) -> list[str]:
    """Give installs in the order in which they ask."""
    installs = [f"{number:08x}-0000-4000-8000-000000000000" for number in range(INSTALLS)]
    if mix == "hot":
        return installs[:1]
    weights = [1 if mix == "uniform" else 1 / rank for rank in range(1, INSTALLS + 1)]
    return random.Random(1).choices(installs, cum_weights=list(accumulate(weights)), k=50_000)


async def ours(url: str, how: str) -> Decide:
    """Give our decision: `debit` is one call, as a peer's is; `reserve` leaves a hold."""
    limiter = CreditLimiter(await connect(url, timeout_ms=20_000), TIERS, timeout_ms=20_000, deadline_ms=20_000)
    if how == "debit":
        return lambda install: limiter.debit(install, tier="pro", has_hardware=True)
    return lambda install: limiter.reserve(install, tier="pro", has_hardware=True)


async def by_evalsha(url: str) -> Decide:
    """Give the debit script's own call by redis-py, with nothing around it: no reply is decoded, nothing is checked."""
    redis = await connect(url, timeout_ms=20_000, max_connections=1000)
    script = compose("debit")
    await redis.script_load(script.text)
    return lambda install: redis.evalsha(
        script.sha, 1, f"credits:install:{install}", "pro", "monthly", MANY, MANY, 1, 1, 1, "core", 1, "", "", 1
    )


async def by_limits(url: str) -> Decide:
    """Give the decision of `limits`; it is not among our own packages."""
    from limits import RateLimitItemPerDay  # type: ignore[import-not-found]  # noqa: PLC0415
    from limits.aio.storage import RedisStorage  # type: ignore[import-not-found]  # noqa: PLC0415
    from limits.aio.strategies import FixedWindowRateLimiter  # type: ignore[import-not-found]  # noqa: PLC0415

    storage = RedisStorage(f"async+{url}", implementation="redispy", max_connections=1000)  # redis-py's 100 are too few
    limiter = FixedWindowRateLimiter(storage)
    item = RateLimitItemPerDay(MANY)
    return lambda install: limiter.hit(item, install)


async def run(how: str, url: str, mix: str, tasks: int, seconds: float) -> None:
    """Decide for so long, and print how many decisions there were and what each took."""
    if how == "limits":
        call = await by_limits(url)
    else:
        call = await (by_evalsha(url) if how == "evalsha" else ours(url, how))
    installs = cycle(mixed(mix))
    took_s: list[float] = []
    for _ in range(3):  # connections are made before the time begins
        await asyncio.gather(*(call(next(installs)) for _ in range(tasks)))
    end_s = time.perf_counter() + seconds

    async def one_task() -> int:
        count = 0
        while (began_s := time.perf_counter()) < end_s:
            await call(next(installs))
            count += 1
            if tasks == 1:
                took_s.append(time.perf_counter() - began_s)
        return count

    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    count = sum(await asyncio.gather(*(one_task() for _ in range(tasks))))
    wall_s, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
    took_s.sort()
    p50_us = took_s[len(took_s) // 2] * 1e6 if took_s else wall_s / count * tasks * 1e6
    print(json.dumps({"per_s": count / wall_s, "p50_us": p50_us, "cpu_us": cpu_s / count * 1e6}))


if __name__ == "__main__":
    how, url, mix, tasks, seconds = sys.argv[1:]
    uvloop.run(run(how, url, mix, int(tasks), float(seconds)))
