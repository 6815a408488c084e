"""What Prometheus reads from a node's metrics port."""

import re
import time
import urllib.request

import pytest
import ray

from pipeline.monitoring.metrics import QueueMetrics, ServiceMetrics, StageMetrics
from pipeline.rows import Batch, RowError
from pyramid_flow import Preset
from tests.pipeline.sample_tables import batch, item

PRESET = Preset(sizes=((64, 64),), max_num_frames=25)


def changed(before: Batch, **row: object) -> Batch:
    return before.with_items([one.with_tensors({}, **row) for one in before.items])


def exported(name: str) -> dict[str, float]:
    """Return a metric's values by its own tags."""
    [node] = ray.nodes()
    with urllib.request.urlopen(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    found = (re.fullmatch(rf"ray_pyramid_{name}{{(.*)}} ([0-9.e+-]+)", line) for line in lines)
    values = {}
    for match in filter(None, found):
        tags = dict(re.findall(r'(\w+)="([^"]*)"', match[1]))
        values["/".join(tags[tag] for tag in ("stage", "status", "reason") if tag in tags)] = float(match[2])
    return values


@pytest.mark.ray
@pytest.mark.integration
def test_rows_failures_seconds_and_bytes_are_exported(cluster):
    rows = batch(*(item(PRESET, prompt=prompt) for prompt in "abc"))
    error = RowError(stage="decode", type="ArithmeticError", message="why")
    metrics, queue = StageMetrics(), QueueMetrics(10)
    failed = changed(rows, error=error, seconds={"test-a": 1.0})
    metrics.count("test-a", rows, changed(rows, seconds={"test-a": 0.5, "other": 9.0}))
    metrics.count("test-a", rows, failed)
    metrics.count("test-a", failed, failed)  # they had failed before
    metrics.count("test-b", rows, changed(rows, bytes=100))
    metrics.count("test-b", rows, changed(rows, skipped=True))
    queue.finished(3)
    service = ServiceMetrics()
    service.queued(0.2)
    service.first_fragment(2)
    service.ended("failed", "worker_lost")

    deadline = time.monotonic() + 60
    while not {"test-a/succeeded", "test-b/skipped"} <= set(exported("rows_total")):
        assert time.monotonic() < deadline
        time.sleep(1)
    rows_total = exported("rows_total")
    assert [rows_total[f"test-a/{status}"] for status in ("succeeded", "failed")] == [3, 3]
    assert [rows_total[f"test-b/{status}"] for status in ("succeeded", "skipped")] == [3, 3]
    assert exported("failures_total")["test-a/ArithmeticError"] == 3
    assert exported("busy_seconds_total")["test-a"] == pytest.approx(4.5)
    assert exported("batch_seconds_count")["test-a"] == 2
    assert exported("batch_rows_count")["test-a"] == 2
    for name in ("queue_seconds_count", "first_fragment_seconds_count"):
        assert exported(name)[""] >= 1  # other tests of this process count too
    assert exported("videos_total")["failed/worker_lost"] >= 1
    assert exported("published_bytes_total")[""] >= 300
    assert 7 in exported("rows_left").values()
