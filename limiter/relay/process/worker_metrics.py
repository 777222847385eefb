"""The slots of the workers on one port, and their metrics, shown as one page by any of them.

Each worker keeps its own counters and labels them `worker`, so that a restart is a counter that was reset, which
Prometheus understands, and not a sum that fell.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import aiohttp
import orjson
from aiohttp import web
from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

_ANSWER_S = 1.0  # a worker that does not answer within this time is left out
Render = Callable[[], bytes]


@dataclass(frozen=True, slots=True)
class WorkerSlot:
    """What one worker gets from its supervisor.

    Args:
        number: of the worker, from 0.
        workers: how many there are.
        listener: the file descriptor of its listening socket.
        line: the file descriptor on which it reports once that it serves; its end means that the supervisor has ended.
        folder: of the sockets at which the workers query each other's metrics.
    """

    number: int
    workers: int
    listener: int
    line: int
    folder: str

    @classmethod
    def from_text(cls, text: str) -> "WorkerSlot":
        """Return the slot that `as_text` wrote."""
        return cls(**orjson.loads(text))

    def as_text(self) -> str:
        """Return the slot as text for a command line."""
        return orjson.dumps(asdict(self)).decode()

    def socket_of(self, number: int) -> str:
        """Return the path of the socket at which a worker serves its metrics."""
        return str(Path(self.folder) / f"{number}.sock")


@asynccontextmanager
async def worker_metrics_served(slot: WorkerSlot, render: Render) -> AsyncIterator[None]:
    """Serve this worker's metrics to the others until the block ends."""

    async def show(_request: web.Request) -> web.Response:
        return web.Response(body=render())

    app = web.Application()
    app.router.add_get("/", show)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0)
    await runner.setup()
    try:
        await web.UnixSite(runner, slot.socket_of(slot.number)).start()
        yield
    finally:
        await runner.cleanup()


async def render_all(slot: WorkerSlot, render: Render) -> bytes:
    """Return the metrics of all workers, in Prometheus' text format 0.0.4."""
    texts = await asyncio.gather(
        *(_fetch(slot.socket_of(number)) for number in range(slot.workers) if number != slot.number)
    )
    numbers = [number for number in range(slot.workers) if number != slot.number]
    rendered = {slot.number: render().decode()} | dict(zip(numbers, texts, strict=True))
    registry = CollectorRegistry()
    registry.register(_Together({number: rendered[number] for number in sorted(rendered)}))
    return generate_latest(registry)


async def _fetch(path: str) -> str:
    try:
        async with (
            aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(path), timeout=aiohttp.ClientTimeout(_ANSWER_S)
            ) as session,
            session.get("http://worker/") as answer,
        ):
            return await answer.text()
    except (aiohttp.ClientError, TimeoutError, OSError):
        return ""


class _Together(Collector):
    """The metrics of several processes, each sample with one label more."""

    def __init__(self, texts: dict[int, str]) -> None:
        self._texts = texts

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for number, text in self._texts.items():
            for family in text_string_to_metric_families(text):
                same = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    same.add_sample(sample.name, {"worker": str(number), **sample.labels}, sample.value)
        yield from families.values()
