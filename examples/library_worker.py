"""A queue worker that holds credits for each job: debited when the job succeeds, returned when it fails.

It reads jobs from stdin, one JSON object a line, and runs two at a time:

    echo '{"id": "job-1", "install_id": "alice", "text": "abc"}' | python library_worker.py
"""

import asyncio
import json
import os
import sys
from typing import Any

from limiter import CreditLimiter, LimiterUnavailable, Tiers, connect

TIERS = Tiers.from_mapping({"core": {"lifetime": 3, "max_in_flight": 1}})
WORKERS = 2
RETRY_S = 0.2  # before a job that met a refusal that passes, or no Redis, is tried again
Job = dict[str, Any]


async def run(job: Job) -> str:
    """Do the work of a job; it stands for the expensive call."""
    await asyncio.sleep(0.05)
    return job["text"].upper()  # type: ignore[no-any-return]  # JSON; raises if it has no text


async def work(limiter: CreditLimiter, jobs: asyncio.Queue[Job]) -> None:
    """Take jobs from the queue for ever."""
    while True:
        job = await jobs.get()
        try:
            # The hold is named after the job, so `limiter row alice` shows which job holds what.
            async with limiter.hold(job["install_id"], tier="core", has_hardware=True, hold_id=job["id"]) as hold:
                reason = hold.decision.reason
                if hold.allowed:
                    print(job["id"], "done:", await run(job))
        except LimiterUnavailable as error:
            # If the commit got no answer, the job's result is there but its debit is not certain. A queue that must not
            # run a job twice notes its result before the block ends; this one prefers to run it again.
            print(job["id"], "will be retried:", error)
            await retry(jobs, job)
        except Exception as error:  # noqa: BLE001  whatever a job raises, its credits are back and the worker goes on
            print(job["id"], "failed:", repr(error))
        else:
            if reason in {"credits_in_flight", "too_many_in_flight"}:
                await retry(jobs, job)
            elif reason:
                print(job["id"], "refused:", reason)
        finally:
            jobs.task_done()


async def retry(jobs: asyncio.Queue[Job], job: Job) -> None:
    """Put a job back at the end of the queue, after a pause."""
    await asyncio.sleep(RETRY_S)
    jobs.put_nowait(job)


async def main() -> None:
    """Run the jobs of stdin."""
    redis = await connect(os.environ.get("REDIS_URL", "embedded:./data"))
    try:
        limiter = CreditLimiter(redis, TIERS)
        jobs: asyncio.Queue[Job] = asyncio.Queue()
        for line in sys.stdin:
            jobs.put_nowait(json.loads(line))
        workers = [asyncio.create_task(work(limiter, jobs)) for _ in range(WORKERS)]
        await jobs.join()
        for worker in workers:
            worker.cancel()
    finally:
        await redis.aclose()


if __name__ == "__main__":
    asyncio.run(main())
