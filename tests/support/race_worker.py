"""One node of the race tests: many tasks spend one install's credits until none are left. Prints what it spent.

    python -m tests.support.race_worker URL INSTALL TIER LIMITS HAS_HARDWARE GIVE_BACK

LIMITS: the tier's limits, as JSON. GIVE_BACK: the share of the holds that are released instead of committed. It
waits for a line on stdin, so that all nodes begin together. Prints credits by backend, and those of repeated commits
as GONE.
"""

import asyncio
import json
import random
import sys
from collections import Counter

from limiter import CreditLimiter, Reason, SettlementStatus, Tiers, connect

TASKS = 64
LASTING = (Reason.OUT_OF_CREDITS, Reason.GEMINI_CAP)


async def spend(
    limiter: CreditLimiter, install_id: str, *, tier: str, has_hardware: bool, give_back: float
) -> "Counter[str]":
    spent: Counter[str] = Counter()
    while True:
        decision = await limiter.reserve(install_id, tier=tier, has_hardware=has_hardware)
        if decision.reason in LASTING:
            return spent
        if not decision.allowed:  # others hold what is left, and may give it back
            continue
        if random.random() < give_back:
            await limiter.release(install_id, decision.hold_id)
            continue
        settlement = await limiter.commit(install_id, decision.hold_id)
        if settlement.status is SettlementStatus.GONE:  # it was debited when it was sent first, and the answer was lost
            spent[settlement.status] += 1
            continue
        assert settlement.backend
        spent[settlement.backend] += settlement.cost


async def main(url: str, install_id: str, tier: str, limits: str, has_hardware: str, give_back: str) -> None:
    tiers = Tiers.from_mapping({"core": {"lifetime": 0}, tier: json.loads(limits)})
    redis = await connect(url, timeout_ms=10_000)
    limiter = CreditLimiter(redis, tiers, timeout_ms=10_000, deadline_ms=30_000)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    tasks = [
        spend(limiter, install_id, tier=tier, has_hardware=has_hardware == "1", give_back=float(give_back))
        for _ in range(TASKS)
    ]
    async with asyncio.timeout(30):  # a credit that is held for ever would be waited for as long
        sys.stdout.write(json.dumps(sum(await asyncio.gather(*tasks), Counter())))
    await redis.aclose()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
