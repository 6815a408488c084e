"""What Prometheus reads: the table's counts, and the series that the farm's processes leave with Ray on every node."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from aiohttp import ClientError, ClientSession, ClientTimeout
from prometheus_client import generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from starlette.concurrency import run_in_threadpool

from pipeline.serving.queue.records import PRIORITIES, Status
from pipeline.serving.queue.store import Census, Store

logger = logging.getLogger(__name__)

NODE_TIMEOUT_S = 2.0
CACHE_S = 5.0
PREFIX = "ray_pyramid_"
LABELS = frozenset({"stage", "status", "reason", "le", "WorkerId"})
"""Labels of a node's series that are passed on: addresses stay inside."""


@dataclass
class Scrape:
    """The text for Prometheus; requests within `CACHE_S` seconds share one."""

    text: bytes = b""
    made_at: float = -CACHE_S
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def latest(self, store: Store, nodes: Callable[[], Sequence[str]]) -> bytes:
        """Return the text, made anew if it is too old."""
        async with self.lock:
            if time.monotonic() - self.made_at >= CACHE_S:
                census, urls = await run_in_threadpool(store.census), await run_in_threadpool(nodes)
                self.text, self.made_at = await scraped(census, urls), time.monotonic()
            return self.text


@dataclass(frozen=True)
class Families(Collector):
    """Metrics as they were counted."""

    metrics: Sequence[Metric]

    def collect(self) -> Iterable[Metric]:
        """Return the metrics."""
        return self.metrics


async def scraped(census: Census, nodes: Sequence[str]) -> bytes:
    """Return all series as text; nodes: URLs of their metrics. One that does not answer in time is counted only."""
    async with ClientSession(timeout=ClientTimeout(NODE_TIMEOUT_S)) as session:
        texts = await asyncio.gather(*(_text(session, url) for url in nodes))
    heard = [text for text in texts if text is not None]
    silent = GaugeMetricFamily(
        "pyramid_service_silent_nodes", "Nodes whose series are missing", len(nodes) - len(heard)
    )
    return generate_latest(Families([*_counted(census), silent, *_merged(heard)]))


async def _text(session: ClientSession, url: str) -> str | None:
    try:
        async with session.get(url) as answer:
            answer.raise_for_status()
            return await answer.text()
    except (ClientError, TimeoutError) as error:
        logger.warning("a node's metrics are missing: %s: %s", type(error).__name__, error)
        return None


def _counted(census: Census) -> Iterator[Metric]:
    videos = GaugeMetricFamily("pyramid_service_videos", "Videos in the table", labels=["status", "priority"])
    for status in Status:
        for name, priority in PRIORITIES.items():
            videos.add_metric([status, name], census.counts.get((status, priority), 0))
    yield videos
    help_text = "Seconds that the oldest video has waited"
    yield GaugeMetricFamily("pyramid_service_oldest_wait_seconds", help_text, census.oldest_wait_s)


def _merged(texts: Iterable[str]) -> Iterable[Metric]:
    """Return the farm's series of all nodes, each family once."""
    families: dict[str, Metric] = {}
    for text in texts:
        own = "".join(line for line in text.splitlines(keepends=True) if PREFIX in line.partition("{")[0])
        for family in text_string_to_metric_families(own):
            known = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                labels = {name: value for name, value in sample.labels.items() if name in LABELS}
                known.add_sample(sample.name, labels, sample.value)
    return families.values()
