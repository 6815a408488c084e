"""What Prometheus reads: the table's counts, and the series of nodes merged into one text."""

import asyncio
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pipeline.serving.http.scrape import scraped
from pipeline.serving.queue.records import Priority, Status
from pipeline.serving.queue.store import Census

NODE = """\
# HELP ray_node_disk_free Of Ray itself
# TYPE ray_node_disk_free gauge
ray_node_disk_free{{NodeAddress="192.0.2.1"}} 5.0
# HELP ray_pyramid_rows_total Rows that left a stage
# TYPE ray_pyramid_rows_total counter
ray_pyramid_rows_total{{NodeAddress="192.0.2.1",WorkerId="{worker}",stage="sample",status="succeeded"}} 3.0
# HELP ray_pyramid_batch_seconds Seconds per batch
# TYPE ray_pyramid_batch_seconds histogram
ray_pyramid_batch_seconds_bucket{{NodeAddress="192.0.2.1",WorkerId="{worker}",stage="sample",le="+Inf"}} 1.0
ray_pyramid_batch_seconds_count{{NodeAddress="192.0.2.1",WorkerId="{worker}",stage="sample"}} 1.0
ray_pyramid_batch_seconds_sum{{NodeAddress="192.0.2.1",WorkerId="{worker}",stage="sample"}} 0.5
"""


class Node(BaseHTTPRequestHandler):
    """A node's metrics port: the path is the name of its worker."""

    def do_GET(self) -> None:
        self.send_response(500 if self.path == "/broken" else 200)
        self.end_headers()
        self.wfile.write(NODE.format(worker=self.path[1:]).encode())

    def log_message(self, *_arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def node() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Node)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def series(text: str) -> dict[str, float]:
    """Return values by name and own labels."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found["/".join([sample.name, *(value for _, value in sorted(sample.labels.items()))])] = sample.value
    return found


def test_the_table_is_counted():
    census = Census({(Status.QUEUED, Priority.BATCH): 3, (Status.FAILED, Priority.INTERACTIVE): 1}, 2.5)
    found = series(asyncio.run(scraped(census, [])).decode())
    assert found["pyramid_service_videos/batch/queued"] == 3
    assert found["pyramid_service_videos/interactive/failed"] == 1
    assert found["pyramid_service_videos/interactive/queued"] == 0
    assert found["pyramid_service_oldest_wait_seconds"] == 2.5
    assert found["pyramid_service_silent_nodes"] == 0


def test_nodes_are_merged_and_those_that_do_not_answer_counted(node):
    urls = [f"{node}/a", f"{node}/b", f"{node}/broken", "http://127.0.0.1:1/metrics"]
    text = asyncio.run(scraped(Census({}, 0.0), urls)).decode()
    found = series(text)
    assert found["pyramid_service_silent_nodes"] == 2
    for worker in "ab":
        assert found[f"ray_pyramid_rows_total/{worker}/sample/succeeded"] == 3
        assert found[f"ray_pyramid_batch_seconds_bucket/{worker}/+Inf/sample"] == 1
        assert found[f"ray_pyramid_batch_seconds_sum/{worker}/sample"] == 0.5
    described = [line for line in text.splitlines() if line.startswith("#")]
    assert len(described) == len(set(described))
    assert "192.0.2.1" not in text
    assert "disk" not in text
