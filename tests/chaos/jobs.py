"""Jobs of simulated stages on a cluster, each with a driver in a process of its own."""

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.ledger import ledger
from pipeline.storage.storage import Storage
from tests.chaos.cluster import Nodes
from tests.chaos.driver import write_settings
from tests.chaos.scenario import Scenario
from tests.chaos.stages import read_log

PATIENCE_S = 180

Driver = subprocess.Popen[bytes]


def rows_by_node(folder: Path) -> Counter[object]:
    """Return how many batches each node has sampled."""
    return Counter(record["node"] for record in read_log(folder / "samples"))


def wait_until(condition: Callable[[], object], driver: Driver, what: str) -> None:
    """Wait for something that a running job is to bring about."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert driver.poll() is None, f"the driver has ended before {what}"
        assert time.monotonic() < deadline, f"stuck before {what}"
        time.sleep(0.2)


@contextmanager
def rendering(folder: Path, nodes: Nodes, scenario: Scenario, **plan: Any) -> Iterator[Driver]:
    """Run a driver; plan: see `write_settings`."""
    write_settings(folder, nodes.address, str(folder / "out"), scenario, **plan)
    command = [sys.executable, "-m", "tests.chaos.driver", str(folder)]
    with (
        (folder / "driver.log").open("a") as log,
        subprocess.Popen(command, env=nodes.environment, stdout=log, stderr=log) as driver,
    ):
        try:
            yield driver
        finally:
            driver.kill()


def finish(folder: Path, driver: Driver, scenario: Scenario) -> None:
    """Let a driver come to its end, and check what it leaves."""
    assert driver.wait(PATIENCE_S) == 0, (folder / "driver.log").read_text()[-3000:]
    view = ledger.read(Storage(str(folder / "out")), ["id", "status"])
    assert len(view) == len(set(view["id"].to_pylist())) == scenario.rows
    assert set(view["status"].to_pylist()) == {"succeeded"}
