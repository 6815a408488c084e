"""Coverage of the processes that tests start: a plugin of coverage.py, loaded in every measured process.

Ray ends its workers without running Python's exit handlers, so each process that a test started saves what it has
measured every two seconds. Its lines count for the test that started it.
"""

import os
import threading
import time
from typing import Any

import coverage

CURRENT_TEST = "PYTEST_CURRENT_TEST"
PERIOD_S = 2.0


class ContextOfParent(coverage.CoveragePlugin):
    """Names the test that started this process as the context of its lines."""

    def configure(self, config: Any) -> None:
        test, _, _phase = os.environ[CURRENT_TEST].rpartition(" ")
        config.set_option("run:context", test)


def coverage_init(reg: Any, options: dict[str, object]) -> None:
    if CURRENT_TEST not in os.environ:
        return  # pytest itself, which saves its data as it ends
    reg.add_configurer(ContextOfParent())
    threading.Thread(target=save_periodically, daemon=True, name="coverage").start()


def save_periodically() -> None:
    one_at_a_time, save = threading.Lock(), coverage.Coverage.save

    def locked(self: coverage.Coverage) -> None:
        with one_at_a_time:
            save(self)

    coverage.Coverage.save = locked  # type: ignore[method-assign]  # the process saves at its end, too
    while True:
        time.sleep(PERIOD_S)
        if (measurement := coverage.Coverage.current()) is not None:
            measurement.save()
